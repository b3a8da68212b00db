"""All singular values of circular convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from opnorm_jax._blocks import factor
from opnorm_jax._blocks.symbol import block_taps, scan_frequencies
from opnorm_jax._conv import Conv, as_conv, canonical_shape
from opnorm_jax._execution import Execution, check_decomposes
from opnorm_jax._geometry import Geometry, positions, resolve
from opnorm_jax._kernel.compiled import compiled
from opnorm_jax._kernel.prepare import prepare


def singular_values(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    execution: Execution = Execution(),
) -> Float[Array, "*grid r"]:
    r"""Computes all singular values of a circular convolution, exactly.

    With :math:`F_\omega` the i x o matrix :math:`\sum_j K_j e^{2\pi i\, \omega \cdot j}`, the convolution's singular
    values are :math:`\bigcup_\omega \sigma(F_\omega)` over the frequencies of the input's grid. Strides, dilation,
    groups and transposed convolutions change the grid and the blocks, not the principle (see ``_geometry.py``).

    This is exact for circular padding only. Zero padding has no such formula: see :func:`operator_norm_bounds`.

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

    Cost: an SVD of an i x o matrix (values only) for each of half the grid's frequencies. Where frequencies repeat one
    another, as with 1x1 or dilated kernels, one of them is computed. Depthwise kernels need no factorisation.

    Accuracy: absolute error within a few eps of the *largest* value; on a CPU up to 50 eps (6e-6) for values 1e-6 to
    1e-3 apart, which is LAPACK's own (the norm functions, which certify, use another routine). On GPU and TPU the
    vectors come from a Gram matrix: values below sqrt(eps) of the largest are noise.

    Differentiable: twice, in any order of modes. At ties the first derivative is one element of the generalised
    gradient, and the second is NaN. Zero values have zero tangents.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> oj.singular_values(jnp.ones((3, 3, 1, 1)), (8, 8)).max()
      Array(9., dtype=float32)

    References:
      Sedghi, Gupta and Long, `The Singular Values of Convolutional Layers <https://arxiv.org/abs/1805.10408>`_, 2019.
    """
    check_decomposes(execution)
    conv = as_conv(conv)
    geometry = resolve(conv, canonical_shape(kernel, conv))
    if not geometry.exact:
        raise ValueError(_why_not_exact(conv))
    return _singular_values(jnp.asarray(kernel), geometry, execution)


@compiled(1)
def _singular_values(kernel, geometry: Geometry, execution):
    kernel, scale = prepare(kernel, geometry)
    plan = geometry.plan
    taps = block_taps(kernel, plan)
    g, m, n = taps.shape[1:]

    def step(carry, blocks, phase, weights, x):
        values = factor.singular_values(blocks.reshape(-1, m, n)).reshape(-1, g * min(m, n))
        return carry, values if g == 1 else -jnp.sort(-values, axis=-1)

    _, values = scan_frequencies(step, (), taps, plan, execution)
    assert geometry.own_plan is not None
    return scale * values[positions(geometry.own_plan)]


def _why_not_exact(conv: Conv) -> str:
    if conv.padding != "CIRCULAR":
        return (
            f"expected padding 'CIRCULAR', got {conv.padding!r}: only a circular convolution's spectrum has an exact "
            "formula. Use operator_norm_bounds(kernel, conv) for certified bounds on this layer's norm, or "
            "singular_values(kernel, conv.input_shape) for the paper's circular stand-in, which bounds nothing here."
        )
    dilated = tuple(n * e for n, e in zip(conv.input_shape, conv.input_dilation, strict=True))
    return (
        f"expected strides that divide the grid {dilated}, got {conv.strides}: otherwise the circular convolution is "
        "not block-diagonal in frequency. Use operator_norm_bounds(kernel, conv)."
    )
