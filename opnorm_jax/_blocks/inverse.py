"""Inverses and determinants of stacks of small square matrices. On a CPU a call is of one matrix (see factor.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from opnorm_jax._blocks.batching import stackwise

_HIGHEST = lax.Precision.HIGHEST


@jax.custom_jvp
def inverse(stack: Complex[Array, "c m m"]) -> Complex[Array, "c m m"]:
    """Computes inverses, by LU factorisations. Differentiable any number of times."""
    return _inverse(stack)


@inverse.defjvp
def _inverse_jvp(primals, tangents):
    out = inverse(*primals)
    return out, -jnp.matmul(out, jnp.matmul(tangents[0], out, precision=_HIGHEST), precision=_HIGHEST)


@jax.custom_jvp
def log_abs_determinant(stack: Complex[Array, "c m m"]) -> Float[Array, " c"]:
    """Computes log |det|, by LU factorisations. Differentiable any number of times, at the cost of inverses."""
    return _log_abs_determinant(stack)


@log_abs_determinant.defjvp
def _log_abs_determinant_jvp(primals, tangents):
    (stack,), (dots,) = primals, tangents
    slopes = jnp.sum(inverse(stack).swapaxes(-1, -2) * dots, axis=(-1, -2))
    return log_abs_determinant(stack), slopes.real


def separable_from_singular(inverses: Complex[Array, "c m m"], errors: Float[Array, "m m"]) -> Bool[Array, " c"]:
    """Decides which matrices are certainly not singular, though each entry is known only up to its error.

    A + E is singular only if A⁻¹E has an eigenvalue -1. That is excluded where no row of abs(A⁻¹) abs(E) sums to 1 or
    more. Scaling the rows of A and of E alike changes nothing.
    """
    return jnp.sum(jnp.matmul(jnp.abs(inverses), errors, precision=_HIGHEST), axis=-1).max(-1) < 1


@stackwise
def _inverse(stack):
    if stack.shape[-1] == 1:
        return 1 / stack
    one_by_one = lambda stack: lax.map(jnp.linalg.inv, stack)
    return lax.platform_dependent(stack, cpu=one_by_one, default=jnp.linalg.inv)


@stackwise
def _log_abs_determinant(stack):
    if stack.shape[-1] == 1:
        return jnp.log(jnp.abs(stack[..., 0, 0]))
    # jnp.linalg.slogdet has a sign too, whose phases accumulate a product that is of no use here.
    pivots = lambda matrices: jnp.diagonal(lax.linalg.lu(matrices)[0], axis1=-2, axis2=-1)
    logs = lambda matrices: jnp.sum(jnp.log(jnp.abs(pivots(matrices))), axis=-1)
    return lax.platform_dependent(stack, cpu=lambda stack: lax.map(logs, stack), default=logs)
