"""Steepest descent in the operator norm: the kernel of norm at most 1 along which a gradient is largest."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opnorm_jax._blocks import factor, products
from opnorm_jax._blocks.clip import apply_spectral
from opnorm_jax._blocks.guard import forbid_derivative
from opnorm_jax._blocks.symbol import (
    block_taps,
    kernel_from_block_taps,
    scan_frequencies,
    squared_norm_of_coupling,
    symbol_adjoint,
)
from opnorm_jax._conv import Conv, as_conv, canonical_shape
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._geometry import Geometry, Plan, coarse_plan, resolve
from opnorm_jax._kernel.clip import clip, weigh
from opnorm_jax._kernel.compiled import compiled, exportable, place
from opnorm_jax._kernel.nearest import nearest
from opnorm_jax._kernel.norm import circular_norm
from opnorm_jax._kernel.prepare import prepare, restore
from opnorm_jax._rounding import eps, rounding

_FAR = 100.0
"""The exact direction is the projection of the gradient, scaled to this norm, onto the unit ball."""
_TOLERANCE = 3e-4
_NEAR = 10.0
_CLIPS = 3
"""The cheap direction takes so many clips of the gradient, scaled to this norm."""
_POINTS = 4
"""The small grid has so many points for each unit of the taps' span: 8 for three taps."""

_once = forbid_derivative("steepest_direction has no derivative. It is a step of an optimizer.")


@exportable
class Steepest(NamedTuple):
    """A direction of steepest descent, and what is known of it."""

    direction: jax.Array  # shaped like the gradient; its certified norm is at most 1
    descent: jax.Array  # shape=(): <gradient, direction>
    # shape=(): no kernel in the ball has a descent larger by more; infinite if nothing is known. What the layer does
    # not see, as taps that meet no pixel, does not count
    gap: jax.Array


def steepest_direction(
    gradient: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    exact: bool = False,
    execution: Execution = Execution(),
) -> Steepest:
    r"""Computes a kernel X with \|X\| <= 1 for which <gradient, X> is (nearly) largest: Muon's step, for a convolution.

    The norm is that on the circulant embedding (see :func:`operator_norm_bounds`), so the bound holds for the layer
    really used.

    For dense layers, 1x1 kernels, and kernels as large as the image it is the matrix sign (polar factor) of the
    gradient's block at each frequency, exactly. For other kernels there are two ways:

    * cheap (the default): a multiple of the gradient, clipped three times on a small grid of frequencies (see
      :func:`clip_operator_norm`) and divided by its certified norm.
    * ``exact=True``: the projection of a larger multiple onto the unit ball (see :func:`project_operator_norm`), with a
      bound on how far from best it can be.

    Args:
      gradient: any real floating dtype, shaped like the kernel, in ``conv.kernel_layout``; computed in float32, or
        float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      exact: which of the two.
      execution: how to compute; see :class:`Execution`.

    Returns:
      A :class:`Steepest`. The direction has the shape and dtype of the gradient. Its norm is at most 1, besides the
      final rounding to its dtype. It is zero at taps that meet no pixel (where several taps meet the same pixels only
      their sum counts), and if the gradient is zero; it is NaN if that holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the gradient does not fit ``conv``.

    Cost: cheap, three decompositions for each frequency of the small grid (8 points an axis for 3 taps), and two norms.
    Exact, some 10 to 20 decompositions at each frequency of the layer's grid.

    Differentiable: no; a derivative raises ``NotImplementedError``.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> gradient = jax.random.normal(jax.random.key(0), (3, 3, 4, 4))
      >>> step = oj.steepest_direction(gradient, (8, 8), exact=True)
      >>> bool(oj.operator_norm(step.direction, (8, 8)) <= 1 + 1e-6), bool(step.gap < 0.05 * step.descent)
      (True, True)

    References:
      Bernstein and Newhouse, `Old Optimizer, New Norm: An Anthology <https://arxiv.org/abs/2409.20325>`_, 2024.
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    conv = as_conv(conv)
    check_execution(execution)
    if not isinstance(exact, bool):
        raise TypeError(f"expected exact to be True or False, got {exact!r}.")
    geometry = resolve(conv, canonical_shape(gradient, conv))
    gradient = jnp.asarray(gradient)
    out = _steepest_direction(gradient, geometry, exact, execution)
    return out._replace(direction=place(out.direction, gradient))


@compiled(1)
def _steepest_direction(gradient, geometry: Geometry, exact, execution):
    gradient = _once(gradient)
    small, scale = prepare(gradient, geometry)
    plan = geometry.plan
    if squared_norm_of_coupling(plan) > 1 + 1e-9:  # taps fold: only their sums count
        small = kernel_from_block_taps(block_taps(small, plan), plan, small.shape[-2:])
    if _is_onto(plan, small.shape):
        found, most = _sign(small, plan, execution)
    elif exact:
        found, most = _by_projection(small, plan, execution)
    else:
        found = _by_clips(small, coarse_plan(plan, _POINTS)[0], execution)
        most = jnp.where(jnp.any(small), jnp.inf, jnp.zeros((), small.dtype))
    allowed = rounding(small.shape, small.dtype)
    upper = circular_norm(found, plan, execution) * (geometry.gain * (1 + allowed))
    found = found / jnp.where(upper > 0, upper, 1)
    found = jnp.where(jnp.isfinite(small).all() & jnp.isfinite(upper), found, jnp.nan)
    descent = jnp.sum(found * small)
    gap = jnp.maximum(most * ((1 + allowed) / geometry.gain) - descent, 0)
    dead = jnp.where(jnp.isfinite(gradient).all(), jnp.zeros_like(gradient), jnp.nan)
    return Steepest(restore(found, dead, geometry), scale * descent, scale * gap)


def _is_onto(plan: Plan, shape: tuple[int, ...]) -> bool:
    """Decides whether every set of blocks (with the symmetry of a real kernel) is that of a kernel."""
    taps = jax.eval_shape(functools.partial(block_taps, plan=plan), jax.ShapeDtypeStruct(shape, jnp.float32))
    return taps.shape[0] == math.prod(plan.grid) and math.prod(taps.shape) == math.prod(shape)


def _sign(kernel, plan: Plan, execution: Execution):
    """Returns the taps of the polar factors of all blocks, and a bound on <kernel, Y> for all Y of norm at most 1.

    The bound is the sum of the blocks' singular values. Those that are smaller than their errors count as if they were
    as large; their part of the polar factor may be shorter than 1.
    """

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, *blocks.shape[2:])
        if execution.factorization == "products":
            signs, largest = products.polar(stack)
            error = min(stack.shape[-2:]) * eps(weights.dtype) ** 0.5 * largest
            nuclear = jnp.sum((signs.conj() * stack).real, axis=(-2, -1)) + error
        else:
            values, vectors = factor.eigh(factor.gram(stack))
            values = jnp.sqrt(jnp.maximum(values, 0))
            # Values below this have no correct digit in the Gram matrix; they are left at less than 1.
            least = 4 * eps(values.dtype) ** 0.5 * values[:, -1:]
            values = jnp.maximum(values, least)
            signs, nuclear = apply_spectral(stack, vectors, 1 / jnp.where(values > 0, values, 1)), values.sum(-1)
        nuclear = weights * nuclear.reshape(len(blocks), -1).sum(-1)
        return carry + symbol_adjoint(weigh(weights, signs.reshape(blocks.shape)), phase), nuclear

    taps = block_taps(kernel, plan)
    signs, nuclear = scan_frequencies(step, jnp.zeros_like(taps), taps, plan, execution)
    return kernel_from_block_taps(signs, plan, kernel.shape[-2:]), jnp.sum(nuclear)


def _by_clips(kernel, plan: Plan, execution: Execution):
    """Alternates between the ball of the blocks and the blocks of kernels: the beginning of a projection."""
    norm = circular_norm(kernel, plan, execution)
    found, one = kernel * (_NEAR / jnp.where(norm > 0, norm, 1)), jnp.ones((), kernel.dtype)
    for _ in range(_CLIPS):
        found = found + clip(found, one, plan, execution)[0]
    return found


def _by_projection(kernel, plan: Plan, execution: Execution):
    r"""Projects t G onto the unit ball. Returns X, and a bound on <G, Y> for all Y in it.

    If the squared distance from t G to X exceeds the least by at most d, then for every Y in the ball
    <G, Y> <= <G, X> + (\|Y\|² - \|X\|² + d) / 2t, and \|Y\|² is at most the number of singular values of a block.
    (Where taps fold, of a Y in which taps that count together are equal; no other has a larger product with G.)
    """
    norm = circular_norm(kernel, plan, execution)
    times = _FAR / jnp.where(norm > 0, norm, 1)
    far, one = times * kernel, jnp.ones((), kernel.dtype)
    found, info = nearest(far, one, plan, (_TOLERANCE, 200), execution)
    found = jnp.where(norm > 0, found, 0)
    g, m, n = jax.eval_shape(functools.partial(block_taps, plan=plan), kernel).shape[1:]
    excess = info.gap * (2 * info.distance - info.gap)
    room = jnp.maximum(g * min(m, n) - jnp.sum(found**2), 0)
    return found, jnp.where(norm > 0, jnp.sum(found * kernel) + (room + excess) / (2 * times), 0)
