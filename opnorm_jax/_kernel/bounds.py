"""Certificates: bounds on the norm of the layer really used, whatever its padding."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opnorm_jax._blocks.symbol import Axis, Plan, circular_plan, distinct, overshoot, rounding, span
from opnorm_jax._conv import SPATIAL_LETTERS, Conv, as_conv, canonical_kernel, canonical_shape, check_kernel, layout
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._kernel import lobpcg
from opnorm_jax._kernel.spectrum import circular_extremes, circular_norm, normalise


class Bounds(NamedTuple):
    """lower <= the operator norm <= upper; both scalars of the computing dtype."""

    lower: jax.Array
    upper: jax.Array


def operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    execution: Execution = Execution(),
) -> Float[Array, ""]:
    """The operator norm (largest singular value, 2-norm to 2-norm) of a convolution.

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

    Cost: circular, on a CPU about a third of :func:`singular_values`, elsewhere an eighth and up (blocks that cannot
    hold the largest value are found out by Cholesky factorisations); on large grids a CPU leaves most frequencies
    out, as nearby ones show that they cannot hold it (see ``_blocks/largest.py``). Otherwise some 50 to 500
    applications of the layer and its transpose.

    Differentiable: once, both modes. At ties the gradient of one of the tied values; zero at the zero kernel.

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
    check_output(conv, canonical_shape(kernel, conv))
    return _operator_norm(jnp.asarray(kernel), conv, execution)


# This and the others like it are compiled whole; see spectrum.py.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _operator_norm(kernel, conv, execution):
    kernel, scale = normalise(canonical_kernel(kernel, conv))
    if _is_attained(conv, kernel.shape[:-2]):
        return scale * circular_norm(kernel, certifying_plan(conv, kernel.shape[:-2]), execution)
    return scale * lobpcg.norm(kernel, conv)


def operator_norm_bounds(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    execution: Execution = Execution(),
) -> Bounds:
    r"""Bounds on the operator norm, for every padding: lower <= true <= upper.

    Where :func:`operator_norm` is exact: that norm, apart by its rounding (about 4e-6 in float32 at 16 channels).
    Otherwise, zero padding (SAME, VALID, explicit): the layer is a compression of a circular convolution on a circle of
    :math:`m \ge n + \max(lo, hi)` pixels, so that circle's exact norm is the upper bound; *the circular norm at the
    layer's own size is not*. The lower bound is |Ax| / |x| at the best x found. Circular with a stride that does not
    divide the grid: its outputs are some of the stride-1 layer's, whose exact norm is the upper bound.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      execution: how to compute; see :class:`Execution`.

    Returns:
      ``Bounds(lower, upper)``, widened by the rounding errors of their own computation.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or is not an array of a real floating dtype.

    Cost: upper, as a circular :func:`operator_norm`; lower, some 50 to 500 applications of the layer.

    Differentiable: once, both modes, each bound as the norm it comes from.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> lower, upper = oj.operator_norm_bounds(jnp.ones((3, 3, 1, 1)), oj.Conv((8, 8), padding="SAME"))
      >>> bool(8 < lower <= upper <= 9.001)
      True
    """
    conv = as_conv(conv)
    check_execution(execution)
    check_output(conv, canonical_shape(kernel, conv))
    return _operator_norm_bounds(jnp.asarray(kernel), conv, execution)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _operator_norm_bounds(kernel, conv, execution):
    kernel, scale = normalise(canonical_kernel(kernel, conv))
    plan = certifying_plan(conv, kernel.shape[:-2])
    above = circular_norm(kernel, plan, execution)
    below = above if _is_attained(conv, kernel.shape[:-2]) else lobpcg.norm(kernel, conv)
    return _widened(below, above, rounding(kernel.shape, kernel.dtype), scale)


class Figures(NamedTuple):
    """What a report says of one layer; scalars of the computing dtype."""

    bounds: Bounds
    norm: jax.Array  # as operator_norm
    largest: jax.Array  # singular value of the certifying circle
    smallest: jax.Array  # singular value of the certifying circle
    resolution: jax.Array  # absolute error of the smallest


@functools.partial(jax.jit, static_argnums=(1, 2))
def figures(kernel: Float[Array, ...], conv: Conv, execution: Execution = Execution()) -> Figures:
    """:func:`operator_norm_bounds`, :func:`operator_norm` and the certifying circle's extreme values in one pass."""
    kernel, scale = normalise(canonical_kernel(kernel, conv))
    plan = certifying_plan(conv, kernel.shape[:-2])
    largest, smallest = circular_extremes(kernel, plan, execution)
    below = largest if _is_attained(conv, kernel.shape[:-2]) else lobpcg.norm(kernel, conv)
    slack = rounding(kernel.shape, kernel.dtype)
    # Off the CPU the values are roots of a Gram matrix's, whose errors are relative to the largest of those.
    constant = lambda value: jnp.full((), value, kernel.dtype)
    relative = jax.lax.platform_dependent(cpu=lambda: constant(slack), default=lambda: constant(slack**0.5))
    bounds = _widened(below, largest, slack, scale)
    return Figures(bounds, scale * below, scale * largest, scale * smallest, scale * largest * relative)


def is_exact(conv: Conv, taps: tuple[int, ...]) -> bool:
    """Whether the certifying circle is the layer itself."""
    return conv.padding == "CIRCULAR" and circular_plan(conv, taps) is not None


def _is_attained(conv: Conv, taps: tuple[int, ...]) -> bool:
    """Whether the certifying circle's norm is the layer's own: on a circle; and where each output has a patch of the
    image to itself (1x1 kernels; patches no larger than the stride), all of it within the image."""
    if conv.padding == "CIRCULAR":
        return is_exact(conv, taps)
    padded = any(map(any, lobpcg.explicit_padding(conv, taps)))
    return not padded and max(*certifying_plan(conv, taps).grid, *conv.input_dilation, 1) == 1


def _widened(below: jax.Array, above: jax.Array, slack: float, scale: jax.Array) -> Bounds:
    upper = above * (1 + slack)
    return Bounds(scale * jnp.minimum(below * (1 - slack), upper), scale * upper)


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
    r"""A bound on the operator norm for *every* input size and *every* padding at once.

    (Circular padding included, wherever its strides divide the circle: else its seam breaks the pattern.) All of those
    norms are at most :math:`S = \sup_\omega \|F(\omega)\|`, and are as near to it as you like on large
    inputs. Along each axis the symbol is a trigonometric polynomial of some span k - 1, so by M. Riesz's lemma

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

    Differentiable: once, both modes, as the norm on the grid.

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
    check_kernel(kernel, conv)
    return _operator_norm_upper_bound(jnp.asarray(kernel), conv, float(slack), execution)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _operator_norm_upper_bound(kernel, conv, slack, execution):
    kernel, scale = normalise(canonical_kernel(kernel, conv))
    rank = len(conv.input_shape)
    choices = [
        _torus_axes(*axis, (1 + slack) ** (1 / rank))
        for axis in zip(kernel.shape[:rank], conv.strides, conv.input_dilation, conv.kernel_dilation, strict=True)
    ]
    norms = []
    for picked in itertools.product(*choices):
        plan = Plan(tuple(axis for axis, _ in picked), conv.feature_group_count)
        factor = math.prod(factor for _, factor in picked) * (1 + rounding(kernel.shape, kernel.dtype))
        norms.append(circular_norm(kernel, plan, execution) * factor)
    return scale * jnp.max(jnp.stack(norms))


def check_output(conv: Conv, kernel_shape: Sequence[int]) -> None:
    """A padding that leaves no output is an error here, not a zero norm."""
    taps = tuple(kernel_shape[:-2])
    if min(output_shape := lobpcg.output_shape(conv, taps), default=1) < 1:
        raise ValueError(
            f"expected a convolution with at least one output pixel, got output shape {output_shape} from "
            f"input_shape={conv.input_shape}, taps {taps} and padding {conv.padding!r}. Check input_shape and padding."
        )


def certifying_plan(conv: Conv, taps: tuple[int, ...]) -> Plan:
    """The circular convolution, on the smallest valid circle, whose norm is an upper bound on this layer's."""
    return distinct(_certifying_circle(conv, taps))


def _certifying_circle(conv: Conv, taps: tuple[int, ...]) -> Plan:
    """An input pixel must not be reached by wrapping round; outputs must be distinct pixels of the circle, which must
    hold a whole number of strides (and of input dilations)."""
    if conv.padding == "CIRCULAR":
        # A stride that does not divide the grid keeps some of the outputs of stride 1.
        return circular_plan(conv, taps) or _unstrided(conv, taps)
    axes = []
    pads, outs = lobpcg.explicit_padding(conv, taps), lobpcg.output_shape(conv, taps)
    for n, k, s, e, d, (low, high), m in zip(
        conv.input_shape, taps, conv.strides, conv.input_dilation, conv.kernel_dilation, pads, outs, strict=True
    ):
        held = (n - 1) * e + 1 + min(low, 0) + min(high, 0)  # negative padding crops
        reach = held + max(low, high, 0)
        circle = max(reach, s * (m - 1) + 1)
        run = math.lcm(s, e)
        axes.append(Axis(-(-circle // run) * run, k, s, e, d, low))
    return Plan(tuple(axes), conv.feature_group_count)


def _unstrided(conv: Conv, taps: tuple[int, ...]) -> Plan:
    whole = Conv(
        conv.input_shape,
        padding="CIRCULAR",
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=conv.feature_group_count,
    )
    plan = circular_plan(whole, taps)
    assert plan is not None  # a stride of 1 divides everything
    return plan


def _torus_axes(k: int, stride: int, input_dilation: int, dilation: int, factor: float) -> list[tuple[Axis, float]]:
    """Grids fine enough that their largest norm is within ``factor`` of the supremum, with the factor in effect.

    Several where stride and input dilation share a divisor: then the padding's parity matters, and each is tried.
    """
    if min(stride, input_dilation) == 1:
        # Only pixels that are multiples of gcd(stride, dilation) meet a tap. Beyond that the spacing of the taps
        # substitutes one frequency for another (and multiplies rows by phases): the supremum is the same.
        shared = math.gcd(max(stride, input_dilation), dilation)
        stride, input_dilation, dilation = max(1, stride // shared), max(1, input_dilation // shared), 1
    run = math.lcm(stride, input_dilation)
    axes = []
    for low in range(math.gcd(stride, input_dilation)):
        axis = Axis(run, k, stride, input_dilation, dilation, low)
        width = span(axis)
        grid = width + 1
        if width:
            grid = max(grid, math.ceil(math.pi * width / (2 * math.acos(1 / factor))))
        axes.append((axis._replace(period=run * grid), overshoot(width, grid)))
    return axes
