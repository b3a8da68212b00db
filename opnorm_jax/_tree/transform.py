"""Whole trees of parameters: the optax transformation, and its pure form."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from opnorm_jax._conv import Conv, canonical_shape, compute_dtype, stacked_back, stacked_first
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._kernel.compiled import exportable, place
from opnorm_jax._kernel.constrain import Options, constrained
from opnorm_jax._rounding import inside_tolerance, rounding
from opnorm_jax._tree.alike import map_alike, replicate
from opnorm_jax._tree.landing import apply_update, find_scale, round_to, round_update, single_entry, wider
from opnorm_jax._tree.layers import Layer, bounded_layers, broadcast, check_convs, check_max_norms, is_masked

CONSTRAINTS = ("clip", "project", "rescale")

_NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` "
    "when calling `update`. Call tx.update(grads, state, params)."
)


@exportable
class ConstrainOperatorNormState(NamedTuple):
    """The state of :func:`constrain_operator_norm`."""

    count: jax.Array  # shape=(), dtype=int32: the number of updates so far
    norms: Any  # None; with log_norms, shaped like convs with shape=(), dtype=float32 at each Conv


def constrain_operator_norm(
    max_norm: Any,
    convs: Any,
    *,
    constraint: str = "rescale",
    every: int = 1,
    log_norms: bool = False,
    execution: Execution = Execution(),
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the operator norms of convolutions under a bound, inside the training step.

    In a chain of transformations this should be the **last** one. It expects signed, learning-rate-scaled updates u,
    and replaces them so that ``optax.apply_updates(params, updates)`` gives the constrained parameters. It acts on the
    updates number 0, ``every``, 2 ``every``, ...; the others pass through untouched, at no cost.

    What holds on the steps acted on, with ``"rescale"`` and ``"project"``: after ``apply_updates``, the certified norm
    of each kernel (:func:`operator_norm_bounds`) is at most ``max_norm * (1 + 4 eps)``, with the eps of the kernel's
    dtype, however far outside the kernel was and although ``p + u`` is rounded. A kernel whose certified norm is at
    most ``max_norm`` keeps its update bit for bit. The kernel is not zero either, unless ``max_norm`` is, or the kernel
    was so far outside (2^24 times in float32, 2^8 in bfloat16) that p + u reaches nothing else inside the ball.
    ``"clip"`` gives the clip of p + u, to rounding, and keeps no bound.

    Args:
      max_norm: a positive float, an ``optax`` schedule, or a tree of them that is a prefix of the parameters' (``None``
        leaves a subtree unconstrained). Where a schedule reaches 0 the kernel becomes zero; where it is negative or NaN
        the kernel becomes NaN.
      convs: a tree shaped like the parameters, with a :class:`Conv` at each kernel and ``None`` elsewhere; one ``None``
        may stand for a whole subtree. :func:`find_convs` makes it.
      constraint: ``"rescale"`` (certified, cheapest), ``"project"`` (certified, nearest), or ``"clip"`` (the paper's,
        which leaves the norm at 1.2 to 1.4 times ``max_norm``). See :func:`rescale_operator_norm`,
        :func:`project_operator_norm` and :func:`clip_operator_norm`.
      every: act on one update in so many.
      log_norms: keep in the state the norm that each kernel had when it was last acted on, before that. It is that of
        the circulant embedding, so at least the layer's own; 0 where there is no bound, and before the first time.
        This costs the norm of every kernel, also of those inside, for which a cheaper certificate would do.
      execution: how to compute; see :class:`Execution`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state is a :class:`ConstrainOperatorNormState`; with
      ``log_norms``, ``optax.tree.get(opt_state, "norms")`` fetches the norms. A kernel's update is returned in the
      dtype of the update or of the kernel, whichever is wider.

    Raises:
      ValueError, TypeError: here for the arguments; in ``init`` and ``update``, with the parameter's path, where
        ``convs`` and the parameters do not fit; in ``update``, if ``params`` is missing.

    Cost: layers of equal shape and geometry are constrained in one batched call. A kernel inside the ball costs the
    certificate described under :func:`rescale_operator_norm`, others what the constraint costs.

    ``optax.masked``, ``optax.partition`` and ``optax.MultiSteps`` may wrap it. Under ``optax.inject_hyperparams``,
    ``max_norm`` and ``every`` become traced, so their values are not checked.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, opnorm_jax as oj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.zeros(4)}}
      >>> convs = {"conv": {"kernel": oj.Conv((8, 8), padding="SAME"), "bias": None}}
      >>> tx = optax.chain(optax.sgd(0.1), oj.constrain_operator_norm(1.0, convs))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(oj.operator_norm_bounds(params["conv"]["kernel"], convs["conv"]["kernel"]).upper <= 1)
      True
    """
    convs = check_convs(convs)
    _check_constraint(constraint)
    check_execution(execution)
    check_max_norms(max_norm, schedules=True)
    every = _check_every(every)
    options = Options(norm_wanted=log_norms, execution=execution)

    def norm_indices(params: Any) -> list[int]:
        """Returns for each leaf of the parameters which of the norms in the state is its."""
        leaves, treedef = jax.tree.flatten(convs)
        numbers = treedef.unflatten(range(len(leaves)))
        return [index for *_, index in broadcast(numbers, params, "convs", lambda node: node is None)]

    def init_fn(params: Any) -> ConstrainOperatorNormState:
        # optax.tree.map_params gives a placeholder.
        layers = bounded_layers(params, max_norm, convs) if jax.tree.leaves(params) else []
        norms = None
        if log_norms:
            norms, treedef = jax.tree.flatten(jax.tree.map(lambda _: jnp.zeros((), jnp.float32), convs))
            indices = norm_indices(params) if layers else []
            for index, layer, _ in layers:
                norms[indices[index]] = replicate(jnp.zeros(layer.stack, jnp.float32), layer.kernel)
            norms = treedef.unflatten(norms)
        return ConstrainOperatorNormState(jnp.zeros((), jnp.int32), norms)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS_MSG)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_masked)
        moves = treedef.flatten_up_to(updates)
        found = [row for row in bounded_layers(params, max_norm, convs) if not is_masked(moves[row[0]])]
        layers = [layer for _, layer, _ in found]
        norms, norms_def = jax.tree.flatten(state.norms)

        def act(operands):
            kernels, steps, norms = operands
            bounds = [bound(state.count) if callable(bound) else bound for *_, bound in found]
            steps, new_norms = _constrain_layers(layers, kernels, steps, bounds, constraint, options)
            norms = list(norms)
            if log_norms:
                indices = norm_indices(params)
                for (index, *_), norm in zip(found, new_norms, strict=True):
                    norms[indices[index]] = norm.astype(jnp.float32)
            return steps, norms

        kernels = [jnp.asarray(leaves[index]) for index, *_ in found]
        steps = [jnp.asarray(moves[index]) for index, *_ in found]
        # An update narrower than its kernel could not carry it inside the ball.
        steps = [u.astype(wider(u.dtype, p.dtype)) for p, u in zip(kernels, steps, strict=True)]
        if isinstance(every, int) and every == 1:
            steps, norms = act((kernels, steps, norms))
        else:
            due = state.count % jnp.asarray(every).astype(jnp.int32) == 0
            steps, norms = jax.lax.cond(due, act, lambda operands: operands[1:], (kernels, steps, norms))
        for (index, *_), step in zip(found, steps, strict=True):
            moves[index] = step
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten(moves), ConstrainOperatorNormState(count, norms_def.unflatten(norms))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def constrain(
    params: Any,
    max_norm: Any,
    convs: Any,
    *,
    constraint: str = "rescale",
    execution: Execution = Execution(),
) -> Any:
    """Constrains the convolution kernels of a tree: the pure form of :func:`constrain_operator_norm`.

    For use after ``optax.apply_updates``, on a checkpoint, or once at the end of training. Prefer the transformation
    where the optimizer is a chain; prefer this where something else moves the parameters last.

    Args:
      params: a tree of arrays.
      max_norm: a positive float, or a prefix tree of them (``None`` leaves a subtree unconstrained).
      convs, constraint, execution: as in :func:`constrain_operator_norm`.

    Returns:
      A tree of the same structure, shapes and dtypes. What holds of the kernels is what holds after a step of
      :func:`constrain_operator_norm`; a kernel inside comes back bit for bit.

    Raises:
      ValueError, TypeError: as :func:`constrain_operator_norm`.

    Cost: one call per distinct shape and geometry.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> params = {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
      >>> convs = {"kernel": oj.Conv((8, 8), padding="SAME"), "bias": None}
      >>> params = oj.constrain(params, 1.0, convs)
      >>> bool(oj.operator_norm_bounds(params["kernel"], convs["kernel"]).upper <= 1)
      True
    """
    convs = check_convs(convs)
    _check_constraint(constraint)
    check_execution(execution)
    check_max_norms(max_norm)
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_masked)
    found = bounded_layers(params, max_norm, convs)
    layers = [layer for _, layer, _ in found]
    kernels = [jnp.asarray(layer.kernel) for layer in layers]
    options = Options(execution=execution)
    kernels, _ = _constrain_layers(layers, kernels, None, [bound for *_, bound in found], constraint, options)
    for (index, *_), kernel in zip(found, kernels, strict=True):
        leaves[index] = kernel
    return treedef.unflatten(leaves)


def _constrain_layers(
    layers: list[Layer], kernels: list, steps: list | None, bounds: list, constraint: str, options: Options
) -> tuple[list, list]:
    """Returns each layer's constrained update (without updates, its kernel), and its norm before.

    Layers that are alike in shape, dtype and geometry share one batched call.
    """
    limits = [jnp.asarray(bound).astype(compute_dtype(layer.kernel.dtype)) for layer, bound in zip(layers, bounds)]
    limits = [jnp.broadcast_to(limit, layer.stack) for layer, limit in zip(layers, limits, strict=True)]
    given = (kernels,) if steps is None else (kernels, steps)
    columns = [[stacked_first(array, layer.conv) for layer, array in zip(layers, arrays)] for arrays in given]
    constrain_one = lambda conv, bound, *arrays: _constrain_one(arrays, bound, conv, constraint, options)
    outs = map_alike(constrain_one, layers, list(zip(limits, *columns, strict=True)))
    results = [stacked_back(out, layer.conv) for layer, (out, _) in zip(layers, outs, strict=True)]
    return list(map(place, results, given[-1])), [norm for _, norm in outs]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _constrain_one(
    arrays: tuple[Any, ...], bound: jax.Array, conv: Conv, constraint: str, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Returns the constrained update of one kernel (without an update, the kernel), and the norm before.

    With r the rounding allowed for in a computed norm n, n (1 + r) is the certified norm. A kernel is left alone if
    that is at most (1 + 2 eps) of the bound. If not, the constraint aims a little lower than the bound, by 2 r and a
    few eps, so that n (1 + r) can be promised again after the last rounding: landing.py says how.
    """
    kernel, update = arrays[0], (arrays[1] if len(arrays) > 1 else None)
    wide = compute_dtype(kernel.dtype)
    before, dtype = kernel.astype(wide), kernel.dtype
    reach = lambda target: round_to(target, kernel.dtype)
    if update is not None:
        before, dtype = apply_update(kernel, update, wide), update.dtype
        reach = lambda target: apply_update(kernel, round_update(target, kernel, dtype), target.dtype)
    usable = jnp.where(bound > 0, bound, 1)
    if constraint == "clip":
        out = constrained(constraint, before, conv, usable, options)
        target, changed = out.kernel, out.changed
    else:
        eps, r = float(jnp.finfo(wide).eps), rounding(canonical_shape(kernel, conv), wide)
        aim = usable * (1 - 2 * r - inside_tolerance(wide) - 8 * eps)
        limit = usable * (1 + 2 * float(jnp.finfo(kernel.dtype).eps))
        out = constrained(constraint, before, conv, aim, options)
        changed = ~(out.norm * (1 + r) <= limit)
        aimed = out.kernel
        scale = find_scale(aimed, reach, conv, aim, limit * (1 - 2 * r))
        lone = single_entry(kernel, dtype, conv, usable, wide)
        target = jnp.where(scale > 0, scale * aimed, lone)
    target = jnp.where(bound > 0, target, jnp.where(bound == 0, jnp.zeros_like(target), jnp.nan))
    changed = changed | ~(bound > 0)
    if update is None:
        return jnp.where(changed, target.astype(kernel.dtype), kernel), out.norm
    return jnp.where(changed, round_update(target, kernel, dtype), update), out.norm


def _check_constraint(constraint: str) -> None:
    if constraint not in CONSTRAINTS:
        raise ValueError(f"expected constraint to be one of {CONSTRAINTS}, got {constraint!r}.")


def _check_every(every: Any) -> Any:
    """Returns the number as an int if its value is known; a traced one is returned as it is."""
    if isinstance(every, jax.core.Tracer):
        return every
    if isinstance(every, jax.Array) and every.shape == () and float(every).is_integer():
        every = int(every)  # optax.inject_hyperparams makes arrays of floats of all numbers
    try:
        if isinstance(every, (bool, np.bool)):
            raise TypeError
        every = operator.index(every)
    except TypeError:
        raise TypeError(f"expected every to be an int, got {every!r} ({type(every).__name__}).") from None
    if every < 1:
        raise ValueError(f"expected every to be at least 1, got {every}.")
    return every
