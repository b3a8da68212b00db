"""The paper's clip of a kernel, with its derivative."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from opnorm_jax._blocks.clip import clip_with_derivative, excess
from opnorm_jax._blocks.guard import forbid_derivative
from opnorm_jax._blocks.symbol import (
    block_taps,
    kernel_from_block_taps,
    scan_frequencies,
    symbol,
    symbol_adjoint,
)
from opnorm_jax._execution import Execution
from opnorm_jax._geometry import Plan
from opnorm_jax._kernel.inside import unless_inside
from opnorm_jax._rounding import rounding

_once = forbid_derivative(
    "clip_operator_norm has no second derivative. Use rescale_operator_norm, or a penalty on operator_norm, where a "
    "Hessian is needed."
)


def fit(kernel: jax.Array, norm: jax.Array, bound: jax.Array) -> jax.Array:
    """Scales the kernel so that its norm, with its rounding allowed for, is at most ``bound``."""
    upper = norm * (1 + rounding(kernel.shape, kernel.dtype))
    return kernel * jnp.minimum(1, bound / jnp.where(upper > 0, upper, 1))


def weigh(weights, blocks):
    """Multiplies the blocks of each frequency by its weight."""
    return weights[:, None, None, None].astype(blocks.dtype) * blocks


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def clip(kernel, bound, plan: Plan, execution: Execution):
    """Computes what one clip adds to the kernel, and the kernel's norm (0 if no value is above the bound)."""
    return unless_inside(_nothing, _clip, plan, execution)(kernel, bound)


def _nothing(plan, execution, kernel, bound):
    return jnp.zeros_like(kernel), jnp.zeros((), kernel.dtype)


def _clip(plan, execution, kernel, bound):
    def step(carry, blocks, phase, weights, x):
        part, _, largest = excess(blocks, bound, execution.factorization)
        return carry - symbol_adjoint(weigh(weights, part), phase), largest

    taps = block_taps(kernel, plan)
    change, norms = scan_frequencies(step, jnp.zeros_like(taps), taps, plan, execution.holding(8))
    return kernel_from_block_taps(change, plan, kernel.shape[-2:]), jnp.max(norms)


@clip.defjvp
def _clip_jvp(plan, execution, primals, tangents):
    (kernel, bound), (kernel_dot, bound_dot) = map(_once, primals), tangents
    taps, taps_dot = block_taps(kernel, plan), block_taps(kernel_dot, plan)

    def step(carry, blocks, phase, weights, x):
        out, out_dot = clip_with_derivative(blocks, symbol(taps_dot, phase), bound, bound_dot)
        carry = tuple(c + symbol_adjoint(weigh(weights, o[0]), phase) for c, o in zip(carry, (out, out_dot)))
        flat = [o[1].reshape(len(blocks), -1) for o in (out, out_dot)]
        at = jnp.argmax(flat[0], axis=1)[:, None]
        return carry, tuple(jnp.take_along_axis(z, at, 1)[:, 0] for z in flat)

    carry = (jnp.zeros_like(taps), jnp.zeros_like(taps))
    (add, add_dot), (norms, slopes) = scan_frequencies(step, carry, taps, plan, execution)
    back = lambda z: kernel_from_block_taps(z, plan, kernel.shape[-2:])
    at = jnp.argmax(norms)
    return (back(add), norms[at]), (back(add_dot), slopes[at])
