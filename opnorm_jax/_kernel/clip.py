"""Functions of the blocks' singular values, and the paper's clip with its derivative."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from opnorm_jax._blocks import factorizations, products
from opnorm_jax._blocks.symbol import (
    Plan,
    block_taps,
    kernel_from_block_taps,
    rounding,
    scan_frequencies,
    symbol,
    symbol_adjoint,
)
from opnorm_jax._execution import Execution
from opnorm_jax._kernel.inside import unless_inside
from opnorm_jax._kernel.spectrum import circular_norm

_HIGHEST = lax.Precision.HIGHEST


def inside_tolerance(dtype) -> float:
    """Relative excess of a computed norm over the bound that is put down to rounding: 32 eps (4e-6 in float32).

    Without it a kernel on the sphere, such as the result of an earlier projection, would not come back bit for bit.
    """
    return 32 * float(jnp.finfo(dtype).eps)


def fit(kernel: jax.Array, norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The kernel scaled so that its norm, with its rounding allowed for, is at most ``bound``."""
    upper = norm * (1 + rounding(kernel.shape, kernel.dtype))
    return kernel * jnp.minimum(1, bound / jnp.where(upper > 0, upper, 1))


def weigh(weights, blocks):
    return weights[:, None, None, None].astype(blocks.dtype) * blocks


def excess(blocks, bound, factorization, norm_wanted=True):
    """What a clip at ``bound`` takes off the blocks (c, g, m, n); and for each frequency the sum of the singular values
    of that, and the largest value of a block (or 0 if none is above the bound; a rough bound on it if not wanted)."""
    c, g, m, n = blocks.shape
    if factorization == "products":
        squarings = None if norm_wanted else products.ROUGH
        part, nuclear, largest = products.excess(blocks.reshape(c * g, m, n), bound, squarings)
    else:
        stack = factorizations.gram(blocks).reshape(c * g, min(m, n), min(m, n))
        values, vectors = factorizations.eigh_above(stack, bound**2)
        values = jnp.sqrt(jnp.maximum(values, 0))
        over = jnp.maximum(values - bound, 0)
        part = _apply_spectral(blocks.reshape(c * g, m, n), vectors, over / jnp.where(values > 0, values, 1))
        nuclear, largest = jnp.sum(over, axis=1), jnp.max(values, axis=1)
    return part.reshape(blocks.shape), jnp.sum(nuclear.reshape(c, g), 1), jnp.max(largest.reshape(c, g), 1)


def _apply_spectral(blocks, vectors, factor):
    """F V diag(factor) Vᴴ, or V diag(factor) Vᴴ F where the vectors are the left ones."""
    weighted = vectors * factor[..., None, :].astype(vectors.dtype)
    scaled = jnp.matmul(weighted, vectors.conj().swapaxes(-1, -2), precision=_HIGHEST)
    pair = (blocks, scaled) if blocks.shape[-1] <= blocks.shape[-2] else (scaled, blocks)
    return jnp.matmul(*pair, precision=_HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def clip(kernel, bound, plan: Plan, execution: Execution, norm_wanted: bool):
    """What one clip adds to the kernel, and the norm before (unless that is wanted, 0 will do for a kernel inside)."""
    return _clip(plan, execution, norm_wanted)(kernel, bound)


@functools.lru_cache(maxsize=512)
def _clip(plan, execution, norm_wanted):
    norm_inside = lambda kernel: circular_norm(kernel, plan, execution) if norm_wanted else jnp.zeros((), kernel.dtype)

    def outside(kernel, bound):
        def step(carry, blocks, phase, weights, x):
            part, _, largest = excess(blocks, bound, execution.factorization)
            return carry - symbol_adjoint(weigh(weights, part), phase), largest

        taps = block_taps(kernel, plan)
        change, norms = scan_frequencies(step, jnp.zeros_like(taps), taps, plan, execution)
        change = kernel_from_block_taps(change, plan, kernel.shape[-2:])
        largest = jnp.max(norms)  # 0 if no block has a value above the bound
        return change, lax.cond(largest == 0, norm_inside, lambda _: largest, kernel)

    inside = lambda kernel, _: (jnp.zeros_like(kernel), norm_inside(kernel))
    return unless_inside(inside, outside, plan, execution)


@clip.defjvp
def _clip_jvp(plan, execution, norm_wanted, primals, tangents):
    r"""The derivative of F phi(FᴴF), phi(l) = min(1, c / sqrt l), by divided differences of phi (Daleckii and Krein).

    They are written without cancellation, and 0 / 0 at the kink (a value equal to c, twice) is taken from inside.
    """
    (kernel, bound), (kernel_dot, bound_dot) = primals, tangents
    taps, taps_dot = block_taps(kernel, plan), block_taps(kernel_dot, plan)
    r = min(taps.shape[-2:])

    def step(carry, f, phase, weights, x):
        f_dot = symbol(taps_dot, phase)
        values, vectors = factorizations.eigh(factorizations.gram(f).reshape(-1, r, r))
        values = jnp.sqrt(jnp.maximum(values, 0)).reshape(*f.shape[:2], r)
        vectors = vectors.reshape(*f.shape[:2], r, r)
        outside = values > bound * (1 + inside_tolerance(kernel.dtype))
        safe = jnp.where(values > 0, values, 1)
        phi = jnp.where(outside, bound / safe, 1)
        a, b = values[..., :, None], values[..., None, :]
        out_a, out_b = outside[..., :, None], outside[..., None, :]
        low, high = jnp.minimum(a, b), jnp.maximum(a, b)
        span = jnp.where(high > low, high - low, 1)
        mixed = -((high - bound) / span) / jnp.where(high > 0, high * (low + high), 1)
        both_out = -bound / jnp.where(out_a & out_b, a * b * (a + b), 1)
        divided = jnp.where(out_a & out_b, both_out, jnp.where(out_a | out_b, mixed, 0))
        adjoint = lambda z: z.conj().swapaxes(-1, -2)
        mul = lambda *zs: functools.reduce(lambda p, q: jnp.matmul(p, q, precision=_HIGHEST), zs)
        left = f.shape[-1] > f.shape[-2]  # the Gram matrix is on the left side: transpose the problem
        h, h_dot = (adjoint(f), adjoint(f_dot)) if left else (f, f_dot)
        gram_dot = mul(adjoint(h_dot), h) + mul(adjoint(h), h_dot)
        phi_dot = divided.astype(f.dtype) * mul(adjoint(vectors), gram_dot, vectors)
        phi_dot = phi_dot + _diagonal(jnp.where(outside, bound_dot / safe, 0).astype(f.dtype))
        change = mul(h_dot, vectors * (phi - 1)[..., None, :].astype(f.dtype), adjoint(vectors))
        change = change + mul(h, vectors, phi_dot, adjoint(vectors))
        change = adjoint(change) if left else change
        value = _apply_spectral(f, vectors, phi - 1)
        add, add_dot = carry
        add = add + symbol_adjoint(weigh(weights, value), phase)
        add_dot = add_dot + symbol_adjoint(weigh(weights, change), phase)
        at = jnp.argmax(values.reshape(values.shape[0], -1), axis=1)
        slopes = jnp.sum((mul(h, vectors).conj() * mul(h_dot, vectors)).real, -2) / safe
        pick = lambda z: jnp.take_along_axis(z.reshape(z.shape[0], -1), at[:, None], 1)[:, 0]
        return (add, add_dot), (pick(values), pick(slopes))

    carry = (jnp.zeros_like(taps), jnp.zeros_like(taps))
    (add, add_dot), (norms, slopes) = scan_frequencies(step, carry, taps, plan, execution)
    back = lambda z: kernel_from_block_taps(z, plan, kernel.shape[-2:])
    at = jnp.argmax(norms)
    return (back(add), norms[at]), (back(add_dot), slopes[at])


def _diagonal(values):
    size = values.shape[-1]
    return jnp.where(np.eye(size, dtype=bool), jnp.broadcast_to(values[..., None], (*values.shape, size)), 0)
