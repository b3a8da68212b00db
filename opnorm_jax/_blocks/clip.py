"""Functions of the singular values of blocks: what a clip takes off, and its derivative."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from opnorm_jax._blocks import factor, products
from opnorm_jax._blocks.linalg import adjoint, diagonal
from opnorm_jax._rounding import inside_tolerance

_HIGHEST = lax.Precision.HIGHEST


def excess(
    blocks: Complex[Array, "c g m n"], bound: Float[Array, ""], factorization: str, norm_wanted: bool = True
) -> tuple[Complex[Array, "c g m n"], Float[Array, " c"], Float[Array, " c"]]:
    """Computes what a clip at ``bound`` takes off the blocks.

    Also returns, for each frequency, the sum of the singular values of that, and the largest value of its blocks: 0 if
    none is above the bound, and if the norm is not wanted perhaps a rough upper bound.
    """
    c, g, m, n = blocks.shape
    if factorization == "products":
        squarings = None if norm_wanted else products.ROUGH
        part, nuclear, largest = products.excess(blocks.reshape(c * g, m, n), bound, squarings)
    else:
        stack = factor.gram(blocks).reshape(c * g, min(m, n), min(m, n))
        values, vectors = factor.eigh_above(stack, bound**2)
        values = jnp.sqrt(jnp.maximum(values, 0))
        over = jnp.maximum(values - bound, 0)
        part = apply_spectral(blocks.reshape(c * g, m, n), vectors, over / jnp.where(values > 0, values, 1))
        nuclear, largest = jnp.sum(over, axis=1), jnp.max(values, axis=1)
    return part.reshape(blocks.shape), jnp.sum(nuclear.reshape(c, g), 1), jnp.max(largest.reshape(c, g), 1)


def apply_spectral(blocks, vectors, weights):
    """Computes F V diag(weights) Vᴴ, or V diag(weights) Vᴴ F where the vectors are the left ones."""
    weighted = vectors * weights[..., None, :].astype(vectors.dtype)
    scaled = jnp.matmul(weighted, adjoint(vectors), precision=_HIGHEST)
    pair = (blocks, scaled) if blocks.shape[-1] <= blocks.shape[-2] else (scaled, blocks)
    return jnp.matmul(*pair, precision=_HIGHEST)


def clip_with_derivative(f, f_dot, bound, bound_dot):
    r"""Computes what a clip adds to blocks, its derivative, and the singular values with their derivatives.

    The clip is F phi(FᴴF) with phi(l) = min(1, c / sqrt l); its derivative is by divided differences of phi (Daleckii
    and Krein). They are written without cancellation, and 0 / 0 at the kink (two values equal to c) is taken from
    inside.
    """
    r = min(f.shape[-2:])
    values, vectors = factor.eigh(factor.gram(f).reshape(-1, r, r))
    values = jnp.sqrt(jnp.maximum(values, 0)).reshape(*f.shape[:2], r)
    vectors = vectors.reshape(*f.shape[:2], r, r)
    outside = values > bound * (1 + inside_tolerance(values.dtype))
    safe = jnp.where(values > 0, values, 1)
    phi = jnp.where(outside, bound / safe, 1)
    a, b = values[..., :, None], values[..., None, :]
    out_a, out_b = outside[..., :, None], outside[..., None, :]
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    distance = jnp.where(high > low, high - low, 1)
    mixed = -((high - bound) / distance) / jnp.where(high > 0, high * (low + high), 1)
    both_out = -bound / jnp.where(out_a & out_b, a * b * (a + b), 1)
    divided = jnp.where(out_a & out_b, both_out, jnp.where(out_a | out_b, mixed, 0))
    mul = lambda *zs: functools.reduce(lambda p, q: jnp.matmul(p, q, precision=_HIGHEST), zs)
    left = f.shape[-1] > f.shape[-2]  # the Gram matrix is on the left side: transpose the problem
    h, h_dot = (adjoint(f), adjoint(f_dot)) if left else (f, f_dot)
    gram_dot = mul(adjoint(h_dot), h) + mul(adjoint(h), h_dot)
    phi_dot = divided.astype(f.dtype) * mul(adjoint(vectors), gram_dot, vectors)
    phi_dot = phi_dot + diagonal(jnp.where(outside, bound_dot / safe, 0).astype(f.dtype))
    change = mul(h_dot, vectors * (phi - 1)[..., None, :].astype(f.dtype), adjoint(vectors))
    change = change + mul(h, vectors, phi_dot, adjoint(vectors))
    change = adjoint(change) if left else change
    slopes = jnp.sum((mul(h, vectors).conj() * mul(h_dot, vectors)).real, -2) / safe
    return (apply_spectral(f, vectors, phi - 1), values), (change, slopes)
