"""Exact spectra and norms of circular convolutions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._blocks import factorizations, largest, products
from opnorm_jax._blocks.symbol import (
    Plan,
    block_taps,
    circular_plan,
    distinct,
    half_grid,
    phases,
    positions,
    scan_frequencies,
    symbol,
)
from opnorm_jax._conv import Conv, as_conv, canonical_kernel, canonical_shape
from opnorm_jax._execution import Execution, check_decomposes


def singular_values(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    execution: Execution = Execution(),
) -> Float[Array, "*grid r"]:
    r"""All singular values of a circular convolution, exactly.

    With :math:`F_\omega` the i x o matrix :math:`\sum_j K_j e^{2\pi i\, \omega \cdot j}`, the convolution's singular
    values are :math:`\bigcup_\omega \sigma(F_\omega)` over the frequencies of the input's grid. Strides, dilation,
    groups and transposed convolutions change the grid and the blocks, not the principle (see ``_blocks/symbol.py``).

    Exact for circular padding only. Zero padding has no such formula: see :func:`operator_norm_bounds`.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels.
      execution: how to compute; see :class:`Execution`. ``"products"`` is refused. Peak memory: about four times
        ``chunk_bytes``, beyond the result.

    Returns:
      Shape ``(*grid, r)``, descending along the last axis, in the computing dtype. ``grid`` is ``input_shape`` for a
      stride of 1, ``input_shape / strides`` otherwise; r is the smaller side of the block, summed over groups.

    Raises:
      ValueError: the padding is not circular, a stride does not divide the grid, or the kernel does not fit ``conv``.
      TypeError: the kernel is not an array of a real floating dtype.

    Cost: half the grid's frequencies, each an SVD of an i x o matrix (values only); of those that repeat one another,
    as with 1x1 or dilated kernels, one. Depthwise: no factorisation.

    Accuracy: absolute error within a few eps of the *largest* value; on a CPU up to 50 eps (6e-6) for values 1e-6 to
    1e-3 apart, which is LAPACK's own (the norm functions, which certify, use another routine). On GPU and TPU the
    values come from a Gram matrix: those below sqrt(eps) of the largest are noise.

    Differentiable: once, both modes. At ties one element of the generalised gradient; zero values have zero tangents.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> oj.singular_values(jnp.ones((3, 3, 1, 1)), (8, 8)).max()
      Array(9., dtype=float32)

    References:
      Sedghi, Gupta and Long, `The Singular Values of Convolutional Layers <https://arxiv.org/abs/1805.10408>`_, 2019.
    """
    check_decomposes(execution)
    conv = as_conv(conv)
    plan = exact_plan(conv, canonical_shape(kernel, conv)[:-2])
    return _singular_values(jnp.asarray(kernel), conv, plan, execution)


# Compiled whole: called eagerly, its operations would be compiled one by one, which takes thrice as long.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _singular_values(kernel, conv, plan, execution):
    kernel, scale = normalise(canonical_kernel(kernel, conv))
    expand, plan = positions(plan), distinct(plan)
    taps = block_taps(kernel, plan)
    g, m, n = taps.shape[1:]

    def step(carry, blocks, phase, weights, x):
        values = factorizations.singular_values(blocks.reshape(-1, m, n)).reshape(-1, g * min(m, n))
        return carry, values if g == 1 else -jnp.sort(-values, axis=-1)

    _, values = scan_frequencies(step, (), taps, plan, execution)
    return scale * values[expand]


def exact_plan(conv: Conv, taps: tuple[int, ...]) -> Plan:
    """The plan on the convolution's own grid, or the error that says why there is none."""
    if conv.padding != "CIRCULAR":
        raise ValueError(
            f"expected padding 'CIRCULAR', got {conv.padding!r}: only a circular convolution's spectrum has an exact "
            "formula. Use operator_norm_bounds(kernel, conv) for certified bounds on this layer's norm, or "
            "singular_values(kernel, conv.input_shape) for the paper's circular stand-in, which bounds nothing here."
        )
    plan = circular_plan(conv, taps)
    if plan is None:
        dilated = tuple(n * e for n, e in zip(conv.input_shape, conv.input_dilation, strict=True))
        raise ValueError(
            f"expected strides that divide the grid {dilated}, got {conv.strides}: otherwise the circular convolution "
            "is not block-diagonal in frequency. Use operator_norm_bounds(kernel, conv)."
        )
    return plan


def normalise(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel over a power of two near its largest entry, and that power: squares neither overflow nor vanish.

    The division is exact. A zero kernel, or one with NaN or infinity, is left as it is.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(kernel)))
    usable = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    # One below frexp's, and short of the extremes, so that neither the power nor its inverse leaves the dtype's range.
    limit = -jnp.finfo(kernel.dtype).minexp - 1
    scale = jnp.ldexp(jnp.ones((), kernel.dtype), jnp.clip(exponent - 1, -limit, limit))
    return kernel / scale, scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def circular_norm(kernel: Float[Array, "*taps i o"], plan: Plan, execution: Execution) -> Float[Array, ""]:
    """Largest singular value over the plan's grid. At ties: the gradient of one of the tied values; 0 at zero."""
    return _largest(block_taps(kernel, plan), plan, execution)[0]


def _largest(taps: jax.Array, plan: Plan, execution: Execution) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular value, with the frequency (integers) and the group it is found at."""
    taps, frequencies = lax.stop_gradient(taps), jnp.asarray(half_grid(plan.grid).frequencies)
    everywhere = lambda taps: _everywhere(taps, plan, execution)
    if execution.factorization != "products" and largest.pays(plan, execution.mesh.size if execution.mesh else 1):
        search = functools.partial(largest.largest, plan=plan, chunk_bytes=execution.chunk_bytes)
        value, position, group = lax.platform_dependent(taps, cpu=search, default=everywhere)
    else:
        value, position, group = everywhere(taps)
    return value, frequencies[position], group


def _everywhere(taps, plan, execution):
    g, m, n = taps.shape[1:]

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, m, n)
        by_products = execution.factorization == "products"
        norms = products.norms(stack) if by_products else factorizations.largest_singular_values(stack)
        values = norms.reshape(-1, g)
        return carry, (jnp.max(values, axis=1), lax.argmax(values, 1, jnp.int32))

    _, (values, groups) = scan_frequencies(step, (), taps, plan, execution)
    at = lax.argmax(values, 0, jnp.int32)  # NaN counts as the largest, so a NaN kernel gives NaN
    return largest.Found(values[at], at, groups[at])


@circular_norm.defjvp
def _circular_norm_jvp(plan, execution, primals, tangents):
    (kernel,), (tangent,) = primals, tangents
    taps = block_taps(kernel, plan)
    value, frequency, group = _largest(taps, plan, execution)
    phase = phases(frequency[None], plan, kernel.dtype)
    block = symbol(jnp.take(taps, group[None], axis=1), phase)[:, 0]
    moved = symbol(jnp.take(block_taps(tangent, plan), group[None], axis=1), phase)[0, 0]
    left, _, right = factorizations.singular_vectors(block)
    u, v = left[0, :, 0], right[0, :, 0]
    slope = jnp.vdot(u, jnp.matmul(moved, v, precision=lax.Precision.HIGHEST)).real
    return value, jnp.where(value > 0, slope, 0)


def circular_extremes(
    kernel: Float[Array, "*taps i o"], plan: Plan, execution: Execution
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Largest and smallest singular value over the plan's grid; no array of all of them is kept. No derivative."""
    taps = block_taps(lax.stop_gradient(kernel), plan)
    m, n = taps.shape[2:]

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, m, n)
        smallest = factorizations.singular_values(stack)[:, -1]
        both = (factorizations.largest_singular_values(stack), smallest)  # see there why not the first of all values
        return carry, tuple(values.reshape(len(blocks), -1) for values in both)

    _, (largest, smallest) = scan_frequencies(step, (), taps, plan, execution)
    return jnp.max(largest), jnp.min(smallest)
