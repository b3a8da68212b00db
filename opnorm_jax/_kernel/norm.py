"""The operator norm of one convolution."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._blocks import factor, largest, products
from opnorm_jax._blocks.symbol import block_taps, phases, scan_frequencies, symbol
from opnorm_jax._conv import Conv, as_conv, canonical_shape
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._geometry import Geometry, Plan, half_grid, resolve
from opnorm_jax._kernel import lobpcg
from opnorm_jax._kernel.compiled import compiled
from opnorm_jax._kernel.prepare import prepare


def operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    execution: Execution = Execution(),
) -> Float[Array, ""]:
    """Computes the operator norm (largest singular value, 2-norm to 2-norm) of a convolution.

    Circular padding whose strides divide the grid: exact, from the spectrum. Layers without padding whose outputs each
    see a patch of their own (1x1 kernels, patch embeddings): exact as well. Otherwise: converged matrix-free, through
    the layer and its transpose. It then approaches the norm from below and stops once fifty steps in a row have gained
    less than two units of rounding each, or after 500 steps. In the tests its relative error is below 1e-5 in float32;
    where a guarantee is wanted, use :func:`operator_norm_bounds`, whose upper bound it never exceeds.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      execution: how to compute; see :class:`Execution`.

    Returns:
      A scalar of the computing dtype. NaN if the kernel holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or is not an array of a real floating dtype.

    Cost: circular, about a third of :func:`singular_values` on a CPU, an eighth or more elsewhere, because Cholesky
    factorisations show which blocks cannot hold the largest value. On large grids a CPU leaves out most frequencies,
    because nearby ones show that they cannot hold it (see ``_blocks/largest.py``). Zero padding: some 50 to 500
    applications of the layer and its transpose.

    Differentiable: twice, in any order of modes. At ties the gradient is that of one of the tied values; it is zero at
    the zero kernel. The second derivative is right where the top value is simple (a frequency and its mirror image
    count once). It is NaN where a block's top values are tied, or, for zero padding, where the layer's are too near
    to tell apart; float64 separates values that float32 does not. A third derivative raises ``NotImplementedError``.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> oj.operator_norm(jnp.ones((3, 3, 2, 2)), (8, 8))
      Array(18., dtype=float32)
      >>> conv = oj.Conv((8, 8), padding="SAME")
      >>> penalty = lambda kernel: jax.nn.relu(oj.operator_norm(kernel, conv) - 1) ** 2
      >>> jax.grad(penalty)(jnp.ones((3, 3, 2, 2))).shape
      (3, 3, 2, 2)
    """
    conv = as_conv(conv)
    check_execution(execution)
    geometry = resolve(conv, canonical_shape(kernel, conv))
    return _operator_norm(jnp.asarray(kernel), geometry, execution)


@compiled(1)
def _operator_norm(kernel, geometry: Geometry, execution):
    kernel, scale = prepare(kernel, geometry)
    return scale * (
        circular_norm(kernel, geometry.plan, execution) if geometry.attained else lobpcg.norm(kernel, geometry)
    )


def circular_norm(kernel: Float[Array, "*taps i o"], plan: Plan, execution: Execution) -> Float[Array, ""]:
    """Computes the largest singular value over the plan's grid.

    At ties between frequencies its derivatives are those of one of the tied values. Within a frequency the gradient is
    that of one of the tied values, and the second derivative is NaN. The gradient is 0 at the zero kernel.
    """
    taps = block_taps(kernel, plan)
    value, frequency, group = _locate(lax.stop_gradient(taps), plan, execution)
    phase = phases(frequency[None], plan, kernel.dtype)
    return _value_at(symbol(jnp.take(taps, group[None], axis=1), phase)[:, 0], value)


@jax.custom_jvp
def _value_at(block, value):
    """Returns ``value``, the largest singular value of the block, with the derivatives of a function of the block."""
    return value


@_value_at.defjvp
def _value_at_jvp(primals, tangents):
    block, value = primals
    value = _value_at(block, value)
    left, _, right = factor.singular_vectors(block, 1)
    u, v = left[0, :, 0], right[0, :, 0]
    slope = jnp.vdot(u, jnp.matmul(tangents[0][0], v, precision=lax.Precision.HIGHEST)).real
    return value, jnp.where(value > 0, slope, 0)


def _locate(taps: jax.Array, plan: Plan, execution: Execution) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest singular value, and the frequency (integers) and the group where it is found."""
    frequencies = jnp.asarray(half_grid(plan.grid).frequencies)
    everywhere = lambda taps: _everywhere(taps, plan, execution)
    if execution.factorization != "products" and largest.pays(plan, execution.mesh.size if execution.mesh else 1):
        search = functools.partial(largest.search, plan=plan, chunk_bytes=execution.chunk_bytes)
        value, position, group = lax.platform_dependent(taps, cpu=search, default=everywhere)
    else:
        value, position, group = everywhere(taps)
    return value, frequencies[position], group


def _everywhere(taps, plan, execution):
    g, m, n = taps.shape[1:]

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, m, n)
        by_products = execution.factorization == "products"
        norms = products.norms(stack) if by_products else largest.largest_singular_values(stack)
        values = norms.reshape(-1, g)
        return carry, (jnp.max(values, axis=1), lax.argmax(values, 1, jnp.int32))

    _, (values, groups) = scan_frequencies(step, (), taps, plan, execution)
    at = lax.argmax(values, 0, jnp.int32)  # NaN counts as the largest, so a NaN kernel gives NaN
    return largest.Found(values[at], at, groups[at])


def circular_extremes(
    kernel: Float[Array, "*taps i o"], plan: Plan, execution: Execution
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the largest and the smallest singular value over the plan's grid, without derivative.

    No array of all values is kept.
    """
    taps = block_taps(lax.stop_gradient(kernel), plan)
    m, n = taps.shape[2:]

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, m, n)
        smallest = factor.singular_values(stack)[:, -1]
        both = (largest.largest_singular_values(stack), smallest)  # see there why not the first of all values
        return carry, tuple(values.reshape(len(blocks), -1) for values in both)

    _, (above, below) = scan_frequencies(step, (), taps, plan, execution)
    return jnp.max(above), jnp.min(below)
