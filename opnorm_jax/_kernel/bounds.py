"""Certificates: bounds on the norm of the layer really used, whatever its padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opnorm_jax._conv import SPATIAL_LETTERS, Conv, as_conv, canonical_kernel, canonical_shape, layout
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._geometry import Geometry, plans_for_every_size, resolve
from opnorm_jax._kernel import dense, lobpcg
from opnorm_jax._kernel.compiled import compiled, exportable
from opnorm_jax._kernel.norm import circular_extremes, circular_norm
from opnorm_jax._kernel.prepare import normalise, prepare
from opnorm_jax._rounding import rounding, through_gram


@exportable
class Bounds(NamedTuple):
    """lower <= the operator norm <= upper; both scalars of the computing dtype."""

    lower: jax.Array
    upper: jax.Array


def operator_norm_bounds(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    tight: bool = False,
    execution: Execution = Execution(),
) -> Bounds:
    r"""Computes bounds on the operator norm, for every padding: lower <= true <= upper.

    The lower bound is |Ax| / |x| at the best x found. The upper bound depends on the padding, which may differ from
    axis to axis:

    * Circular, with strides that divide the grid, and wherever else :func:`operator_norm` is exact: both bounds are the
      norm, apart by its rounding (about 4e-6 in float32 at 16 channels).
    * Zeros (SAME, VALID, explicit): the layer is a compression of a circular convolution on a circle of
      :math:`m \ge n + \max(lo, hi)` pixels, its *circulant embedding*, whose exact norm is the upper bound. *The
      circular norm at the layer's own size is no bound.*
    * Circular, with a stride that does not divide the grid: the outputs are some of those of the layer of stride 1,
      whose exact norm is the upper bound.
    * Edge pixels or reflections: the layer is one without padding after a map that copies pixels. The norm of that map
      is the square root of the largest number of copies (:math:`\sqrt 2` for 3 taps along one axis).

    Taps that never meet a pixel do not count. The smaller the map is compared with the kernel, the further the
    circulant embedding is above the truth: 31 % for a 3x3 kernel of ones on 4x4 pixels, 9 % on 8x8, 0.6 % on 32x32.
    ``tight=True`` certifies the upper bound to about 1e-4 instead, by a Cholesky factorisation of the layer's own
    matrix.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      tight: whether to use the layer's own matrix. It has no effect where both bounds are the norm anyway.
      execution: how to compute; see :class:`Execution`.

    Returns:
      ``Bounds(lower, upper)``, widened by the rounding errors of their own computation.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or is not an array of a real floating dtype.
      ValueError: ``tight``, and the layer has more than 8192 inputs and outputs (pixels times channels, per group).

    Cost: upper, as a circular :func:`operator_norm`; lower, some 50 to 500 applications of the layer. With ``tight``
    also the Gram matrix of the layer's own matrix, of N rows, and a few Cholesky factorisations of it; 3 N² numbers of
    memory.

    Differentiable: each bound as the norm it comes from; see :func:`operator_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> lower, upper = oj.operator_norm_bounds(jnp.ones((3, 3, 1, 1)), oj.Conv((8, 8), padding="SAME"))
      >>> bool(8 < lower <= upper <= 9.001)
      True
    """
    conv = as_conv(conv)
    check_execution(execution)
    if not isinstance(tight, bool):
        raise TypeError(f"expected tight to be True or False (static under jit), got {tight!r}.")
    geometry = resolve(conv, canonical_shape(kernel, conv))
    if tight:
        dense.check_size(geometry)
    return _operator_norm_bounds(jnp.asarray(kernel), geometry, tight and not geometry.attained, execution)


@compiled(1)
def _operator_norm_bounds(kernel, geometry: Geometry, tight, execution):
    kernel, scale = prepare(kernel, geometry)
    bounds, norm = _certify(kernel, circular_norm(kernel, geometry.plan, execution), scale, geometry)
    if tight:
        upper = scale * dense.tight_bound(kernel, norm / scale, bounds.upper / scale, geometry, execution)
        bounds = Bounds(jnp.minimum(bounds.lower, upper), upper)
    return bounds


def _certify(kernel, above, scale, geometry: Geometry) -> tuple[Bounds, jax.Array]:
    """Returns bounds, and the norm, from the norm ``above`` of the circulant embedding."""
    norm = above if geometry.attained else lobpcg.norm(kernel, geometry)
    slack = rounding(kernel.shape, kernel.dtype)
    upper = above * (geometry.gain * (1 + slack))
    return Bounds(scale * jnp.minimum(norm * (1 - slack), upper), scale * upper), scale * norm


class NormStatistics(NamedTuple):
    """What a report says of one layer; scalars of the computing dtype."""

    bounds: Bounds
    norm: jax.Array  # as operator_norm
    largest: jax.Array  # singular value of the circulant embedding
    smallest: jax.Array  # singular value of the circulant embedding
    resolution: jax.Array  # absolute error of the smallest


@compiled(1)
def norm_statistics(kernel: Float[Array, ...], geometry: Geometry, execution: Execution) -> NormStatistics:
    """Computes bounds, norm and the extreme values of the circulant embedding in one pass over its frequencies."""
    kernel, scale = prepare(kernel, geometry)
    largest, smallest = circular_extremes(kernel, geometry.plan, execution)
    bounds, norm = _certify(kernel, largest, scale, geometry)
    slack = rounding(kernel.shape, kernel.dtype)
    constant = lambda value: jnp.full((), value, kernel.dtype)
    relative = jax.lax.platform_dependent(cpu=lambda: constant(slack), default=lambda: constant(through_gram(slack)))
    return NormStatistics(bounds, norm, scale * largest, scale * smallest, scale * largest * relative)


def operator_norm_upper_bound(
    kernel: Float[Array, ...],
    *,
    strides: int | Sequence[int] = 1,
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    kernel_layout: str | None = None,
    slack: float = 0.01,
    execution: Execution = Execution(),
) -> Float[Array, ""]:
    r"""Computes a bound on the operator norm for *every* input size and every padding with zeros at once.

    This includes circular padding wherever its strides divide the circle (if they do not, its seam breaks the pattern).
    It does not include padding by edge pixels or reflections. All of those norms are at most
    :math:`S = \sup_\omega \|F(\omega)\|`, and come arbitrarily near to it on large inputs. Along each axis the symbol
    is a trigonometric polynomial of some span k - 1, so by M. Riesz's lemma

    .. math:: S \le \max_{grid} \|F\| \prod_{axes} \frac{1}{\cos(\pi (k - 1) / 2N)} ,

    on a grid of N points an axis, chosen so that the product is at most ``1 + slack``.

    Args:
      kernel: any real floating dtype, in ``kernel_layout``; its rank fixes the dimension. Computed in float32, or
        float64 if it is float64.
      strides, input_dilation, kernel_dilation, feature_group_count, kernel_layout: as in :class:`Conv`. Spacing
        taps apart leaves S as it is; strides and input dilation change it.
      slack: the bound is at most S (1 + slack), besides rounding. 0.01 takes N = 32 for 3 x 3, 0.001 takes N = 100.
      execution: how to compute; see :class:`Execution`.

    Returns:
      A scalar of the computing dtype.

    Raises:
      ValueError, TypeError: the kernel does not fit the description, or ``slack`` is not a positive number.

    Cost: that of a circular :func:`operator_norm` on the N-point grid, whatever the image's size.

    Differentiable: as the norm on the grid; see :func:`operator_norm`.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> 9 <= oj.operator_norm_upper_bound(jnp.ones((3, 3, 1, 1))) < 9.1
      Array(True, dtype=bool)

    References:
      M. Riesz, Eine trigonometrische Interpolationsformel, 1914.
    """
    check_execution(execution)
    if isinstance(slack, bool) or not isinstance(slack, (int, float)):
        raise TypeError(f"expected slack to be a number (static under jit), got {slack!r}.")
    if not 0 < slack < math.inf:
        raise ValueError(f"expected slack to be positive, got {slack}.")
    rank = getattr(kernel, "ndim", 4) - 2
    if rank not in range(len(SPATIAL_LETTERS)):
        raise ValueError(f"expected a kernel of 2 to 5 axes (0 to 3 of them spatial), got {kernel.shape=}.")
    conv = Conv(
        (1,) * rank,
        strides=strides,
        padding="CIRCULAR",
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        kernel_layout=layout(kernel_layout, rank),
    )
    geometry = resolve(conv, canonical_shape(kernel, conv))
    return _operator_norm_upper_bound(jnp.asarray(kernel), geometry, float(slack), execution)


@compiled(1)
def _operator_norm_upper_bound(kernel, geometry: Geometry, slack, execution):
    kernel, scale = normalise(canonical_kernel(kernel, geometry.conv))  # at some size every tap meets a pixel
    margin = 1 + rounding(kernel.shape, kernel.dtype)
    plans = plans_for_every_size(geometry.conv, geometry.taps, slack)
    norms = [circular_norm(kernel, plan, execution) * (factor * margin) for plan, factor in plans]
    return scale * jnp.max(jnp.stack(norms))
