"""Muon for convolutions: steepest descent in each layer's operator norm, as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from opnorm_jax._conv import Conv
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._kernel.compiled import exportable
from opnorm_jax._kernel.steepest import steepest_direction
from opnorm_jax._tree.alike import map_kernels
from opnorm_jax._tree.layers import broadcast, check_convs, is_masked


@exportable
class ScaleByConvMuonState(NamedTuple):
    """The state of :func:`scale_by_conv_muon`."""

    count: jax.Array  # shape=(), dtype=int32: the number of updates so far
    mu: Any  # shaped like the parameters: the moving average of the gradients


def scale_by_conv_muon(
    convs: Any,
    *,
    beta: Any = 0.95,
    nesterov: bool = True,
    exact: bool = False,
    mu_dtype: Any = None,
    execution: Execution = Execution(),
) -> optax.GradientTransformation:
    r"""Replaces each kernel's momentum by the direction of steepest descent in its layer's operator norm.

    Muon does so for matrices: their momentum's singular values become 1. A convolution's kernel, flattened to a matrix,
    has another norm than the layer; here it is the layer's. See :func:`steepest_direction`. Each kernel's update, as a
    convolution, has a certified norm of at most 1 (:func:`operator_norm_bounds`), so a learning rate is the distance in
    operator norm that a step moves each layer at most. For dense layers (``Conv(())``) it is Muon itself, with the
    exact polar factor.

    Kernels only: every leaf that is not masked must have a ``Conv``. :func:`conv_muon` gives the others to Adam.

    Args:
      convs: a tree shaped like the parameters, with a :class:`Conv` at each kernel, as :func:`find_convs` makes it.
      beta: the decay of the momentum.
      nesterov: use Nesterov's momentum, as ``optax.contrib.muon`` does.
      exact: take the best direction, with the cost of a projection, rather than the cheap one.
      mu_dtype: the dtype of the momentum; ``None`` for that of the parameters.
      execution: how to compute; see :class:`Execution`.

    Returns:
      An ``optax.GradientTransformation`` whose updates have the dtypes of the gradients. Its state is a
      :class:`ScaleByConvMuonState`.

    Raises:
      ValueError, TypeError: here for the arguments; in ``init`` and ``update``, with the parameter's path, where a leaf
        has no ``Conv``, or ``convs`` and the parameters do not fit.

    Cost: that of :func:`steepest_direction` for each kernel. Layers of equal shape and geometry share one call.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, opnorm_jax as oj
      >>> params = {"kernel": jnp.ones((3, 3, 4, 4))}
      >>> convs = {"kernel": oj.Conv((8, 8), padding="SAME")}
      >>> tx = optax.chain(oj.scale_by_conv_muon(convs), optax.scale_by_learning_rate(0.1))
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 4))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> bool(oj.operator_norm_bounds(updates["kernel"], convs["kernel"]).upper <= 0.1 * (1 + 1e-5))
      True

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.
      Bernstein and Newhouse, `Old Optimizer, New Norm: An Anthology <https://arxiv.org/abs/2409.20325>`_, 2024.
    """
    convs = check_convs(convs)
    check_execution(execution)

    def init_fn(params: Any) -> ScaleByConvMuonState:
        if jax.tree.leaves(params):  # optax.tree.map_params gives a placeholder
            _check_all_are_kernels(params, convs)
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        return ScaleByConvMuonState(jnp.zeros((), jnp.int32), mu)

    def update_fn(updates: Any, state: Any, params: Any = None):
        del params
        _check_all_are_kernels(updates, convs)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = jnp.asarray(optax.safe_increment(state.count))
        if nesterov:
            ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
            own = optax.tree.bias_correction(updates, beta, count)
            momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, own)
        else:
            momentum = mu  # the direction of a multiple is the same
        one = lambda conv, kernel, _: steepest_direction(kernel, conv, exact=exact, execution=execution).direction
        directions = map_kernels(one, momentum, convs)
        out = jax.tree.map(lambda new, old: new.astype(old.dtype), directions, updates)
        return out, ScaleByConvMuonState(count, optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(init_fn, update_fn)


def conv_muon(
    learning_rate: Any,
    convs: Any,
    *,
    beta: Any = 0.95,
    nesterov: bool = True,
    exact: bool = False,
    weight_decay: Any = 0.0,
    mu_dtype: Any = None,
    adam_learning_rate: Any = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_eps: Any = 1e-8,
    adam_weight_decay: Any = 0.0,
    execution: Execution = Execution(),
) -> optax.GradientTransformation:
    """Makes an optimizer: :func:`scale_by_conv_muon` for the kernels, AdamW for all other parameters.

    Args:
      learning_rate: of the kernels, a number or an optax schedule. Without weight decay it is the most that a step
        moves a layer in operator norm.
      convs: a tree shaped like the parameters: a :class:`Conv` at each kernel, ``None`` at what Adam updates.
      beta, nesterov, exact, mu_dtype, execution: as in :func:`scale_by_conv_muon`.
      weight_decay: of the kernels, decoupled. It moves a layer by learning_rate * weight_decay * norm at most.
      adam_learning_rate: of the other parameters; ``None`` for ``learning_rate``.
      adam_b1, adam_b2, adam_eps, adam_weight_decay: as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformation``, to be given parameters in ``update``.

    Raises:
      ValueError, TypeError: as :func:`scale_by_conv_muon`.

    Cost: as :func:`scale_by_conv_muon`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, opnorm_jax as oj
      >>> params = {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.zeros(4)}
      >>> tx = oj.conv_muon(0.05, {"kernel": oj.Conv((8, 8)), "bias": None}, adam_learning_rate=1e-3)
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> jnp.round(updates["bias"], 4)
      Array([-0.001, -0.001, -0.001, -0.001], dtype=float32)
    """
    convs = check_convs(convs)
    kernels = optax.chain(
        scale_by_conv_muon(convs, beta=beta, nesterov=nesterov, exact=exact, mu_dtype=mu_dtype, execution=execution),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=adam_weight_decay,
    )
    return optax.partition({"kernel": kernels, "other": others}, _labels(convs))


def _labels(convs: Any) -> Callable[[Any], Any]:
    def label(params: Any) -> Any:
        rows = broadcast(convs, params, "convs", lambda node: node is None)
        treedef = jax.tree.structure(params, is_leaf=is_masked)
        return treedef.unflatten(["kernel" if isinstance(conv, Conv) else "other" for *_, conv in rows])

    return label


def _check_all_are_kernels(tree: Any, convs: Any) -> None:
    for path, leaf, conv in broadcast(convs, tree, "convs", lambda node: node is None):
        if conv is None and not is_masked(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)}: expected every parameter to have a Conv, got None. Use "
                "conv_muon, which gives the others to Adam, or optax.masked or optax.partition around this one."
            )
