r"""Norms and clips of stacks of small matrices by matrix products alone: nothing is factorised.

For accelerators, whose products are fast and whose factorisations are not. Two iterations do everything:

* Gram iteration (Delattre et al., 2023): the Frobenius norm of (FᴴF)^(2^T), rooted, is at most r^(2^-(T+1)) times the
  norm of F, and never less. T is chosen so that this factor is 1 to the last bit.
* The matrix sign by cubics x -> x t (3 - t² x²) / 2. With t = 1 that is Newton and Schulz's. A greater t grows small
  values faster, by 3t/2 a step, and folds those near 1 back to no less than p(1). The best t for values in [l, 1],
  where p(l) = p(1), comes from l alone; it is capped, because beyond slopes of about -1 at 1 rounding errors grow from
  step to step. Composite polynomials that are optimal without this cap (of degree 5, equioscillating) lose three
  digits; with it, degree 5 needs as many products. In single precision the sign takes 23 steps, Newton and
  Schulz's 40.

With U = F (FᴴF)^(-1/2) the polar factor and H = UᴴF, the part of F above a bound c is

.. math:: F - clip(F) = \tfrac12 (F - c U) (I + sign(H - c I)),

where the polar factor is needed only for values above c: of one below, U may take any share between 0 and 1, since then
I + sign is 0. And a sign that has not converged near H = c does no harm: the other factor is as small.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from opnorm_jax._blocks.factor import gram
from opnorm_jax._blocks.linalg import adjoint, frobenius

_HIGHEST = lax.Precision.HIGHEST
_LARGEST_STRETCH = 1.4
ROUGH = 6
"""Squarings for a bound that is at most 5 % above the norm of up to 512 values."""


def norms(blocks: Complex[Array, "*c m n"], squarings: int | None = None) -> Float[Array, "*c"]:
    """Computes each block's largest singular value from above: to a rounding error, unless ``squarings`` are fewer."""
    power = gram(blocks)
    if squarings is None:
        squarings = _exact_squarings(power.shape[-1], power.real.dtype)

    def square(state, weight):
        power, log = state
        size = frobenius(power)
        power = power / jnp.where(size > 0, size, 1).astype(power.dtype)[..., None, None]
        return (_matmul(power, power), log + weight * jnp.log(size)), None

    weights = 0.5 ** jnp.arange(1, squarings + 1, dtype=power.real.dtype)
    start = power, jnp.zeros(power.shape[:-2], power.real.dtype)
    (power, log), _ = lax.scan(square, start, weights)
    return jnp.exp(log + weights[-1] / 2 * jnp.log(frobenius(power)))


def excess(
    blocks: Complex[Array, "c m n"], bound: Float[Array, ""], squarings: int | None = None
) -> tuple[Complex[Array, "c m n"], Float[Array, " c"], Float[Array, " c"]]:
    """Computes what a clip at ``bound`` takes off each block.

    Also returns the sum of the singular values of that, and each block's largest, as :func:`norms` has it.
    """
    if blocks.shape[-1] > blocks.shape[-2]:
        part, nuclear, largest = excess(blocks.swapaxes(-1, -2), bound, squarings)
        return part.swapaxes(-1, -2), nuclear, largest
    largest = norms(blocks, squarings)
    bounds = jnp.broadcast_to(bound, largest.shape)
    top = jnp.maximum(largest, bounds)
    column = lambda x: x.astype(blocks.dtype)[:, None, None]
    polar = _sign(blocks / column(top), bound / jnp.max(top), gram)
    identity = jnp.broadcast_to(np.eye(blocks.shape[-1]).astype(blocks.dtype), (len(blocks), *2 * blocks.shape[-1:]))
    # Values of H - c lie between -c and top - c.
    shifted = _hermitian(_matmul(adjoint(polar), blocks)) - column(bounds) * identity
    sign = _sign(shifted / column(jnp.maximum(bounds, top - bounds)), 0, lambda x: _hermitian(_matmul(x, x)))
    part = _matmul(blocks - column(bounds) * polar, identity + sign) / 2
    nuclear = jnp.sum((polar.conj() * part).real, axis=(-1, -2))
    # Inside, rounding errors are all there is.
    outside = ~(largest <= bounds)
    return jnp.where(outside[:, None, None], part, 0), jnp.where(outside, nuclear, 0), largest


def polar(blocks: Complex[Array, "c m n"]) -> tuple[Complex[Array, "c m n"], Float[Array, " c"]]:
    """Computes each block's polar factor U, where F = U (FᴴF)^(1/2); and a rough upper bound on its norm.

    U's singular values are 1; those that belong to values of F below sqrt(eps) of that bound come out smaller.
    """
    if blocks.shape[-1] > blocks.shape[-2]:
        factors, largest = polar(blocks.swapaxes(-1, -2))
        return factors.swapaxes(-1, -2), largest
    largest = norms(blocks, ROUGH)
    least = float(jnp.finfo(largest.dtype).eps) ** 0.5
    return _sign(blocks / jnp.where(largest > 0, largest, 1).astype(blocks.dtype)[:, None, None], least, gram), largest


def _sign(x, lowest, square):
    """Takes every singular value (or eigenvalue) of ``x`` from ``lowest`` (at least 4 eps) to 1 in modulus to 1, or -1.

    ``square`` gives xᴴx.
    """
    dtype = x.real.dtype
    eps = float(jnp.finfo(dtype).eps)

    def step(state):
        x, low = state
        stretch = jnp.minimum(jnp.sqrt(3 / (1 + low + low**2)), _LARGEST_STRETCH)
        cubic = lambda v: stretch * v * (3 - (stretch * v) ** 2) / 2
        scale = (stretch / 2).astype(x.dtype)
        x = scale * (3 * x - (stretch**2).astype(x.dtype) * _matmul(x, square(x)))
        return x, jnp.minimum(cubic(low), cubic(jnp.ones((), dtype)))

    far = lambda state: state[1] < 1 - eps**0.5 / 2  # whence one more step leaves eps / 2
    start = x, jnp.maximum(jnp.asarray(lowest, dtype), 4 * eps)
    return step(lax.while_loop(far, step, start))[0]


def _exact_squarings(side, dtype):
    return math.ceil(math.log2(math.log(max(side, 3)) / float(jnp.finfo(dtype).eps))) - 1


def _matmul(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def _hermitian(a):
    return (a + adjoint(a)) / 2
