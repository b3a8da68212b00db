"""Whole trees of parameters: the optax transformation, and its pure form."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from opnorm_jax._conv import check_max_norm, compute_dtype, prod
from opnorm_jax._kernel.constrain import Constrained, constrained, initial_dual
from opnorm_jax._tree.layers import Layer, checked_convs, is_hole, layers_of

METHODS = ("clip", "project", "rescale")

_NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` "
    "when calling `update`. Call tx.update(grads, state, params)."
)


class ConstrainOperatorNormState(NamedTuple):
    """State of :func:`constrain_operator_norm`."""

    count: jax.Array  # shape=(), dtype=int32: updates so far
    norms: Any  # shaped like convs; at each Conv shape=(), dtype=float32: its norm when last acted on, before that
    duals: Any  # with warm_start, shaped like convs: the projections' dual variables; else None


def constrain_operator_norm(
    max_norm: Any, convs: Any, *, every: int = 1, method: str = "clip", warm_start: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps convolutions' operator norms in check, inside the training step.

    In a chain of transformations this should be the **last** one: it expects signed, learning-rate-scaled updates u and
    replaces them so that ``optax.apply_updates(params, updates)`` gives the constrained parameters. It acts on the
    updates number 0, ``every``, 2 ``every``, ...; the others pass through untouched, at no cost.

    ``method``: ``"rescale"`` (certified, cheapest), ``"project"`` (certified, nearest), or ``"clip"`` (the paper's,
    which leaves the norm at 1.2 to 1.4 times ``max_norm``). See the functions of those names.

    Args:
      max_norm: a positive float, an ``optax`` schedule, or a tree of them that is a prefix of the parameters' (``None``
        leaves a subtree unconstrained).
      convs: a tree shaped like the parameters, with a :class:`Conv` (or an input shape) at each kernel and ``None``
        elsewhere; one ``None`` may stand for a whole subtree. :func:`find_convs` makes it.
      every: act on one update in so many.
      method: ``"clip"``, ``"project"`` or ``"rescale"``.
      warm_start: with ``"project"``, keep the dual variables in the state. Kernels move little between projections, so
        that most iterations are saved, for the memory of half the frequencies' blocks per layer.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state, a :class:`ConstrainOperatorNormState`, carries the count
      and the norms last seen: ``optax.tree.get(opt_state, "norms")``.

    Raises:
      ValueError, TypeError: here for the arguments; in ``init`` and ``update``, with the parameter's path, where
        ``convs`` and the parameters do not fit; in ``update``, if ``params`` is missing.

    Cost: layers of equal shape and geometry are constrained in one batched call.

    What holds afterwards: with "rescale" and "project", on the steps acted on, norm <= max_norm up to rounding of the
    parameters' own dtype. ``optax.masked``, ``optax.partition`` and ``optax.MultiSteps`` may wrap it. Under
    ``optax.inject_hyperparams``, ``max_norm`` and ``every`` become traced, so their values are not checked.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, opnorm_jax as oj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.zeros(4)}}
      >>> convs = {"conv": {"kernel": oj.Conv((8, 8), padding="SAME"), "bias": None}}
      >>> tx = optax.chain(optax.sgd(0.1), oj.constrain_operator_norm(1.0, convs, method="rescale"))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(oj.operator_norm_bounds(params["conv"]["kernel"], convs["conv"]["kernel"]).upper <= 1 + 1e-5)
      True
    """
    convs = checked_convs(convs)
    _check_method(method)
    _check_max_norms(max_norm)
    if warm_start and method != "project":
        raise ValueError(f"expected warm_start only with method='project', got {method=}.")
    if isinstance(every, bool) or not (isinstance(every, int) or hasattr(every, "dtype")):
        raise TypeError(f"expected every to be an int, got {every!r} ({type(every).__name__}).")
    if isinstance(every, int) and every < 1:
        raise ValueError(f"expected every to be at least 1, got {every}.")

    def init_fn(params: Any) -> ConstrainOperatorNormState:
        norms, treedef = jax.tree.flatten(jax.tree.map(lambda _: jnp.zeros((), jnp.float32), convs))
        duals = list(norms)
        if jax.tree.leaves(params):  # optax.tree.map_params calls this with a placeholder that has none
            for layer in layers_of(params, convs, max_norm):
                norms[layer.slot] = jnp.zeros(layer.stack, jnp.float32)
                if warm_start:
                    dual = initial_dual(layer.member, layer.conv)
                    duals[layer.slot] = jnp.zeros((*layer.stack, *dual.shape), dual.dtype)
        duals = treedef.unflatten(duals) if warm_start else None
        return ConstrainOperatorNormState(jnp.zeros((), jnp.int32), treedef.unflatten(norms), duals)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS_MSG)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_hole)
        moves = treedef.flatten_up_to(updates)
        layers = [layer for layer in layers_of(params, convs, max_norm) if not is_hole(moves[layer.index])]
        norms, norms_def = jax.tree.flatten(state.norms)
        duals, duals_def = jax.tree.flatten(state.duals)

        def act(operands):
            kernels, kernel_moves, norms, duals = operands
            targets = [(p + u).astype(p.dtype) for p, u in zip(kernels, kernel_moves, strict=True)]
            bounds = [_bound_at(layer.max_norm, state.count) for layer in layers]
            starts = [duals[layer.slot] if warm_start else None for layer in layers]
            outs = _constrain_layers(targets, bounds, layers, method, starts)
            norms, duals, kernel_moves = list(norms), list(duals), list(kernel_moves)
            for n, (layer, out, p) in enumerate(zip(layers, outs, kernels, strict=True)):
                wide = compute_dtype(p.dtype)
                step = (out.kernel.astype(wide) - p.astype(wide)).astype(kernel_moves[n].dtype)
                changed = out.changed.reshape(*layer.stack, *(1 for _ in layer.conv.kernel_layout))
                kernel_moves[n] = jnp.where(changed, step, kernel_moves[n])
                norms[layer.slot] = out.norm.astype(jnp.float32)
                if warm_start and out.info is not None:
                    duals[layer.slot] = out.info.dual
            return kernel_moves, norms, duals

        kernels = [jnp.asarray(leaves[layer.index]) for layer in layers]
        operands = (kernels, [jnp.asarray(moves[layer.index]) for layer in layers], norms, duals)
        if isinstance(every, int) and every == 1:
            kernel_moves, norms, duals = act(operands)
        else:
            due = state.count % jnp.asarray(every).astype(jnp.int32) == 0
            kernel_moves, norms, duals = jax.lax.cond(due, act, lambda operands: operands[1:], operands)
        for layer, move in zip(layers, kernel_moves, strict=True):
            moves[layer.index] = move
        count = jnp.asarray(optax.safe_increment(state.count))
        state = ConstrainOperatorNormState(count, norms_def.unflatten(norms), duals_def.unflatten(duals))
        return treedef.unflatten(moves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def constrain(params: Any, max_norm: Any, convs: Any, *, method: str = "clip") -> Any:
    """The parameters with their convolution kernels constrained: the pure form of :func:`constrain_operator_norm`.

    For use after ``optax.apply_updates``, on a checkpoint, or once at the end of training. Prefer the transformation
    where the optimizer is a chain; prefer this where something else moves the parameters last.

    Args:
      params: a tree of arrays.
      max_norm: a positive float, or a prefix tree of them (``None`` leaves a subtree unconstrained).
      convs, method: as in :func:`constrain_operator_norm`.

    Returns:
      A tree of the same structure, shapes and dtypes. Kernels already inside come back bit for bit.

    Raises:
      ValueError, TypeError: as :func:`constrain_operator_norm`.

    Cost: one call per distinct shape and geometry.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> params = {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
      >>> params = oj.constrain(params, 1.0, {"kernel": (8, 8), "bias": None}, method="rescale")
      >>> bool(oj.operator_norm(params["kernel"], (8, 8)) <= 1 + 1e-5)
      True
    """
    convs = checked_convs(convs)
    _check_method(method)
    _check_max_norms(max_norm, schedules=False)
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_hole)
    layers = layers_of(params, convs, max_norm)
    kernels, bounds = [jnp.asarray(layer.kernel) for layer in layers], [layer.max_norm for layer in layers]
    outs = _constrain_layers(kernels, bounds, layers, method, [None] * len(layers), norms_wanted=False)
    for layer, out in zip(layers, outs, strict=True):
        leaves[layer.index] = out.kernel
    return treedef.unflatten(leaves)


def _constrain_layers(
    kernels: list, bounds: list, layers: list[Layer], method: str, duals: list, norms_wanted: bool = True
) -> list[Constrained]:
    """Every layer constrained; those alike in shape, dtype and geometry in one batched call."""
    alike: dict[Any, list[int]] = {}
    for n, layer in enumerate(layers):
        geometry = dataclasses.replace(layer.conv, stacked=0)
        alike.setdefault((layer.member.shape, layer.member.dtype, geometry), []).append(n)
    outs: list[Any] = [None] * len(layers)
    for (shape, dtype, conv), members in alike.items():
        one = lambda kernel, limit, dual, conv=conv: constrained(
            method, kernel, conv, limit, dual=dual, norm_wanted=norms_wanted
        )
        limits = {n: jnp.asarray(bounds[n]).astype(compute_dtype(dtype)) for n in members}
        if len(members) == 1 and not layers[members[0]].stack:
            outs[members[0]] = one(kernels[members[0]], limits[members[0]], duals[members[0]])
            continue
        rows, counts = [], [prod(layers[n].stack) for n in members]
        for n, count in zip(members, counts):
            dual = None if duals[n] is None else duals[n].reshape(count, *duals[n].shape[len(layers[n].stack) :])
            rows.append((kernels[n].reshape(count, *shape), jnp.full(count, limits[n]), dual))
        batch = jax.vmap(one)(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows))
        for n, count, end in zip(members, counts, itertools.accumulate(counts)):
            own = lambda a, n=n, start=end - count, end=end: a[start:end].reshape(*layers[n].stack, *a.shape[1:])
            outs[n] = jax.tree.map(own, batch)
    return outs


def _bound_at(max_norm: Any, count: jax.Array) -> Any:
    return max_norm(count) if callable(max_norm) else max_norm


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {METHODS}, got {method!r}.")


def _check_max_norms(max_norm: Any, schedules: bool = True) -> None:
    def one(path, node):
        if node is None or (schedules and callable(node)):
            return
        try:
            check_max_norm(node)
        except (TypeError, ValueError) as error:
            raise type(error)(f"max_norm{jax.tree_util.keystr(path)}: {error}") from None

    jax.tree_util.tree_map_with_path(one, max_norm)
