"""Circular convolutions that are square: their determinant and their inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._blocks.inverse import inverse, log_abs_determinant, separable_from_singular
from opnorm_jax._blocks.symbol import block_taps, scan_frequencies
from opnorm_jax._conv import Conv, as_conv, canonical_shape, check_floating, compute_dtype
from opnorm_jax._execution import Execution, check_decomposes
from opnorm_jax._geometry import Axis, Geometry, Plan, couplings, half_grid, resolve
from opnorm_jax._kernel.compiled import compiled
from opnorm_jax._kernel.prepare import prepare
from opnorm_jax._rounding import rounding

_HIGHEST = lax.Precision.HIGHEST


def log_abs_det(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    *,
    execution: Execution = Execution(),
) -> Float[Array, ""]:
    r"""Computes log |det| of a square circular convolution, exactly: what a normalising flow adds to its log-density.

    .. math:: \log|\det| = \sum_\omega \log|\det F(\omega)|

    over the frequencies of the input's grid (see :func:`singular_values`). Strides and groups are allowed where the
    layer has as many outputs as inputs: with stride 2 in two dimensions, four times the channels. Layers without
    padding whose patches tile the image (1x1 kernels with any padding; dense layers) count as circular.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels.
      execution: how to compute; see :class:`Execution`. ``"products"`` is refused.

    Returns:
      A scalar in the computing dtype. It is ``-inf`` where a block cannot be told from a singular one: where changes of
      the size of rounding (:math:`20 \ldots 50` eps times the sum of the absolute values of the taps) could make it
      one. NaN if the kernel holds a NaN or an infinity.

    Raises:
      ValueError: the layer is not circular, a stride does not divide the grid, or it is not square.
      TypeError: the kernel is not an array of a real floating dtype.

    Cost: two LU factorisations for each of half the grid's frequencies. A derivative costs as much again.

    Differentiable: any number of times, in any order of modes; not finite where the value is not.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.array([[2.0, 0.0], [0.0, 1.0]]))
      >>> jnp.exp(oj.log_abs_det(kernel, (8, 8)) / 64).round(4)  # one factor of 2 for each pixel
      Array(2., dtype=float32)

    References:
      Hoogeboom, van den Berg and Welling, `Emerging Convolutions for Generative Normalizing Flows
      <https://arxiv.org/abs/1901.11137>`_, 2019.
    """
    conv = as_conv(conv)
    geometry = _square_geometry("log_abs_det", kernel, conv, execution)
    return _log_abs_det(jnp.asarray(kernel), geometry, execution)


def solve(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    y: Float[Array, ...],
    *,
    execution: Execution = Execution(),
) -> Float[Array, ...]:
    r"""Computes the x with conv(x) = y, for a square circular convolution: its exact inverse.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``.
      conv: the convolution, or the input's spatial shape in pixels. It wraps around as Flax's does: the first tap
        meets the pixel ``kernel_dilation * (k - 1) // 2`` before.
      y: any real floating dtype, shape ``(*batch, *output_shape, outputs)``: channels last, whatever
        ``conv.kernel_layout`` is.
      execution: how to compute; see :class:`Execution`. ``"products"`` is refused.

    Returns:
      x, shape ``(*batch, *input_shape, inputs)``, in the dtype of ``y``. It is computed in the wider of the two dtypes,
      at least in float32. NaN throughout where a block cannot be told from a singular one (see :func:`log_abs_det`), or
      if ``kernel`` or ``y`` hold a NaN or an infinity.

    Raises:
      ValueError: the layer is not circular, a stride does not divide the grid, it is not square, or ``y`` does not have
        the layer's output shape.
      TypeError: ``kernel`` or ``y`` is not an array of a real floating dtype.

    Cost: for each of half the grid's frequencies an LU factorisation and an inverse; and the discrete Fourier transform
    of ``y`` and back, by matrix products along each axis.

    Accuracy: the relative error is a few eps times the layer's condition number
    (``singular_values(kernel, conv).max() / .min()``).

    Differentiable: any number of times, in any order of modes, in ``kernel`` and ``y``.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = 0.1 * jax.random.normal(jax.random.key(0), (3, 3, 2, 2)).at[1, 1].add(10 * jnp.eye(2))
      >>> x = jax.random.normal(jax.random.key(1), (1, 8, 8, 2))
      >>> wrapped = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
      >>> y = jax.lax.conv_general_dilated(wrapped, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      >>> bool(jnp.allclose(oj.solve(kernel, (8, 8), y), x, atol=1e-5))
      True
    """
    conv = as_conv(conv)
    geometry = _square_geometry("solve", kernel, conv, execution)
    check_floating(y, "y")
    expected = (*geometry.output_shape, geometry.kernel_shape[-1])
    if y.shape[max(0, y.ndim - len(expected)) :] != expected:
        raise ValueError(
            f"expected y to have the shape (*batch, {', '.join(map(str, expected))}), which is the layer's output, "
            f"channels last, got {y.shape}."
        )
    return _solve(jnp.asarray(kernel), jnp.asarray(y), geometry, execution)


def _square_geometry(name: str, kernel: jax.Array, conv: Conv, execution: Execution) -> Geometry:
    """Resolves the layer, and raises an error unless it is circular and has as many outputs as inputs."""
    check_decomposes(execution, f"{name} takes factorisations.")
    geometry = resolve(conv, canonical_shape(kernel, conv))
    if not geometry.exact:
        raise ValueError(
            f"expected a circular convolution whose strides divide the grid, got {conv}: {name} has no formula for "
            "other layers. Where the network may pad in another way, use padding='CIRCULAR'."
        )
    inputs = math.prod(conv.input_shape) * geometry.kernel_shape[-2] * conv.feature_group_count
    outputs = math.prod(geometry.output_shape) * geometry.kernel_shape[-1]
    if inputs != outputs:
        raise ValueError(
            f"expected a layer with as many outputs as inputs, got {inputs} inputs (pixels x channels) and {outputs} "
            "outputs: it has no inverse and no determinant."
        )
    return geometry


def _errors(taps: jax.Array, kernel: jax.Array) -> jax.Array:
    """Bounds the rounding errors of each entry of the blocks, those of their LU factorisation included."""
    return rounding(kernel.shape, kernel.dtype) * jnp.sum(jnp.abs(lax.stop_gradient(taps)), axis=0)


def _inverses(blocks: jax.Array, errors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the inverses of blocks (c, g, m, m), and for each (c, g) whether the block is certainly not singular."""
    inverses = inverse(blocks.reshape(-1, *blocks.shape[-2:])).reshape(blocks.shape)
    return inverses, jax.vmap(separable_from_singular, (1, 0), 1)(lax.stop_gradient(inverses), errors)


@compiled(1)
def _log_abs_det(kernel, geometry: Geometry, execution):
    kernel, scale = prepare(kernel, geometry)
    plan, own = geometry.plan, geometry.own_plan
    assert own is not None  # the layer is exact
    taps = block_taps(kernel, plan)
    g, m, _ = taps.shape[1:]
    errors = _errors(taps, kernel)

    @jax.checkpoint
    def step(carry, blocks, phase, weights, x):
        values = log_abs_determinant(blocks.reshape(-1, m, m)).reshape(-1, g)
        _, certain = _inverses(lax.stop_gradient(blocks), errors)
        finite = jnp.isfinite(blocks).all((-1, -2))
        return carry, jnp.where(certain, values, jnp.where(finite, -jnp.inf, jnp.nan)).sum(1) * weights

    _, logs = scan_frequencies(step, (), taps, plan, execution)
    # The weights of the half grid sum to 1, and each block occurs equally often on the layer's own grid.
    return math.prod(own.grid) * (jnp.sum(logs) + g * m * jnp.log(scale))


@compiled(2)
def _solve(kernel, y, geometry: Geometry, execution):
    dtype = max(compute_dtype(kernel.dtype), compute_dtype(y.dtype), key=lambda dtype: jnp.finfo(dtype).bits)
    kernel, scale = prepare(kernel.astype(dtype), geometry)
    own, groups = geometry.own_plan, geometry.conv.feature_group_count
    assert own is not None  # the layer is exact
    rank = len(own.axes)
    batch = y.shape[: y.ndim - rank - 1]
    out = y.astype(dtype).reshape(-1, *y.shape[y.ndim - rank - 1 :])
    for a, axis in enumerate(own.axes):
        out = jnp.roll(out, _output_shift(axis), axis=1 + a)
    # Along an axis of which all blocks are equal there is nothing to transform: its runs join the batch.
    constant = [len(couplings(axis).offsets) == 1 for axis in own.axes]
    plan = Plan(tuple(axis._replace(period=axis.run) if c else axis for axis, c in zip(own.axes, constant)), groups)
    rows, repeats = _gather(out, own, constant)
    columns = _solve_at_frequencies(kernel, _transform(rows, plan.grid), plan, execution)
    out = _scatter(_transform_back(columns, plan.grid), own, constant, repeats)
    for a, (axis, c) in enumerate(zip(own.axes, constant)):
        fixed = couplings(axis).offsets[0] * (axis.run // axis.input_dilation) if c else 0
        out = jnp.roll(out, fixed + _input_shift(axis), axis=1 + a)
    out = jnp.where(jnp.isfinite(out).all(), out / scale, jnp.nan)
    return out.reshape(*batch, *out.shape[1:]).astype(y.dtype)


def _output_shift(axis: Axis) -> int:
    """Returns by how many pixels outputs turn before they are those of the block taps (see ``couplings``)."""
    if axis.input_dilation == 1 or min(axis.stride, axis.input_dilation) > 1:
        return 0
    return axis.kernel_dilation * (axis.taps - 1) - axis.low


def _input_shift(axis: Axis) -> int:
    """Returns by how many pixels the solution turns, likewise."""
    return -axis.low if axis.input_dilation == 1 else 0


def _gather(out: jax.Array, plan: Plan, constant: list[bool]) -> tuple[jax.Array, tuple[int, ...]]:
    """Gathers the output pixels that share a frequency's block. Returns an array (frequencies' axes, g, batch, n).

    Axes along which all blocks are equal become batch axes, behind the given one; their sizes are returned too.
    """
    rank, groups = len(plan.axes), plan.groups
    runs = [axis.run // axis.stride for axis in plan.axes]
    sizes = [part for run, grid in zip(runs, plan.grid) for part in (grid, run)]
    out = out.reshape(len(out), *sizes, groups, -1)
    grids, phases = [1 + 2 * a for a in range(rank)], [2 + 2 * a for a in range(rank)]
    kept = [axis for axis, c in zip(grids, constant) if not c]
    joined = [axis for axis, c in zip(grids, constant) if c]
    out = out.transpose(*kept, 1 + 2 * rank, 0, *joined, *phases, 2 + 2 * rank)
    repeats = out.shape[len(kept) + 1 : len(kept) + 2 + len(joined)]
    grid = [1 if c else n for n, c in zip(plan.grid, constant)]
    return out.reshape(*grid, groups, math.prod(repeats), -1), repeats


def _scatter(columns: jax.Array, plan: Plan, constant: list[bool], repeats: tuple[int, ...]) -> jax.Array:
    """Undoes :func:`_gather`, for inputs: returns an array (batch, *input_shape, channels)."""
    rank, groups = len(plan.axes), plan.groups
    runs = [axis.run // axis.input_dilation for axis in plan.axes]
    kept = [n for n, c in zip(plan.grid, constant) if not c]
    out = columns.reshape(*kept, groups, *repeats, *runs, -1)
    order, spare = [len(kept) + 1], len(kept) + 2
    free = iter(range(len(kept)))
    joined = iter(range(spare, spare + sum(constant)))
    phases = iter(range(spare + sum(constant), spare + sum(constant) + rank))
    for c in constant:
        order += [next(joined) if c else next(free), next(phases)]
    out = out.transpose(*order, len(kept), out.ndim - 1)
    return out.reshape(repeats[0], *(n * run for n, run in zip(plan.grid, runs)), -1)


def _solve_at_frequencies(kernel, rows, plan: Plan, execution: Execution):
    """Solves x F = y at each frequency of half the grid; returns zeros at the others, weights multiplied.

    ``rows`` has the shape (*grid, g, batch, n).
    """
    half, rank = half_grid(plan.grid), len(plan.grid)
    taps = block_taps(kernel, plan)
    errors = _errors(taps, kernel)
    flat = np.ravel_multi_index(tuple(half.frequencies.T), plan.grid) if rank else np.zeros(1, int)
    own = rows.reshape(-1, *rows.shape[rank:])[flat]

    @jax.checkpoint
    def step(carry, blocks, phase, weights, y):
        inverses, certain = _inverses(blocks, errors)
        x = jnp.matmul(y, inverses, precision=_HIGHEST)
        return carry, jnp.where(certain[..., None, None], x, jnp.nan) * weights[:, None, None, None].astype(x.dtype)

    _, found = scan_frequencies(step, (), taps, plan, execution, own)
    out = jnp.zeros((math.prod(plan.grid), *found.shape[1:]), found.dtype).at[flat].set(found)
    return out.reshape(*plan.grid, *found.shape[1:])


def _transform(values: jax.Array, grid: tuple[int, ...], sign: int = -1) -> jax.Array:
    """Applies the discrete Fourier transform along the leading axes, by matrix products."""
    values = values.astype(np.result_type(values.dtype, np.complex64))
    for a, n in enumerate(grid):
        if n > 1:
            turns = np.outer(np.arange(n), np.arange(n)) % n
            matrix = jnp.asarray(np.exp(sign * 2j * np.pi * turns / n), values.dtype)
            values = jnp.moveaxis(jnp.tensordot(matrix, values, axes=((1,), (a,)), precision=_HIGHEST), 0, a)
    return values


def _transform_back(values: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Applies the inverse transform to half of the frequencies, whose weights are multiplied; the result is real."""
    return _transform(values, grid, 1).real
