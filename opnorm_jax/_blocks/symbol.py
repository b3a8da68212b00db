r"""From a kernel to its symbol's blocks, one small matrix per frequency, and back.

Any convolution on a circle of ``period`` pixels, with stride s, input dilation e and kernel dilation d,

.. math:: y_t = \sum_j K_j\, x_p \quad\text{over all taps with } s t + d j - lo \equiv e p \pmod{period},

is block-circulant once outputs are gathered in runs of L/s and inputs in runs of L/e, L = lcm(s, e): write
t = (L/s) t' + u and p = (L/e) p' + v, then tap j couples input phase v to output phase u at offset
tau = (s u - e v + d j - lo) / L (where that is an integer), on a coarse grid of period / L. So *every* case is an
ordinary stride-1 convolution on the coarse grid with (L/e) i inputs and (L/s) o outputs, and its singular values are
those of the matrices

.. math:: F(\omega) = \sum_\tau B_\tau \exp(2 \pi i\, \omega \cdot \tau), \qquad \omega \in \text{coarse grid}.

A real kernel has F(-omega) = conj F(omega), so half of the grid is enough. Frequencies are evaluated by direct phases,
one real matrix product; no FFT (``jnp.fft`` crops kernels larger than the image, and can deadlock on a CPU).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from opnorm_jax._conv import Conv, prod
from opnorm_jax._execution import Execution


class Axis(NamedTuple):
    """One spatial axis of a convolution on a circle; static and hashable."""

    period: int  # pixels of the (dilated) input's circle
    taps: int
    stride: int
    input_dilation: int
    kernel_dilation: int
    low: int  # offset of the first tap; matters only where stride and input dilation both exceed 1

    @property
    def run(self) -> int:
        """L: pixels of the circle per point of the coarse grid."""
        return math.lcm(self.stride, self.input_dilation)


class Plan(NamedTuple):
    """What turns a kernel into blocks: one ``Axis`` per spatial axis, and the number of groups."""

    axes: tuple[Axis, ...]
    groups: int

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.period // axis.run for axis in self.axes)


class _Couplings(NamedTuple):
    """How one axis' taps enter its block taps: ``place[tau, v, u, j]`` is 1 where tap j does."""

    offsets: tuple[int, ...]
    place: np.ndarray


class Half(NamedTuple):
    """Half of a frequency grid: one of each pair (omega, -omega)."""

    frequencies: np.ndarray  # (nf, D) integers
    weights: np.ndarray  # (nf,) 2 for a pair, 1 for a self-conjugate frequency, over the number of grid points
    expand: np.ndarray  # (number of grid points,) where each grid point's representative stands


def circular_plan(conv: Conv, taps: tuple[int, ...]) -> Plan | None:
    """The plan of a circular convolution on its own grid; ``None`` if a stride does not divide that grid."""
    axes = []
    for n, k, s, e, d in zip(
        conv.input_shape, taps, conv.strides, conv.input_dilation, conv.kernel_dilation, strict=True
    ):
        if (n * e) % s:
            return None
        axes.append(Axis(n * e, k, s, e, d, (d * (k - 1)) // 2))
    return Plan(tuple(axes), conv.feature_group_count)


def span(axis: Axis) -> int:
    """Largest less smallest offset of the block taps (read off a circle too large for any of them to fold)."""
    large = axis._replace(period=axis.run * 10**6)
    signed = [tau - 10**6 if tau > 10**6 // 2 else tau for tau in couplings(large).offsets]
    return max(signed) - min(signed)


def overshoot(span: int, grid: int) -> float:
    """How far the supremum over all frequencies can be above the largest norm on a grid (M. Riesz): a factor."""
    return 1 / math.cos(math.pi * span / (2 * grid))


def distinct(plan: Plan) -> Plan:
    """The plan with each different block once, but for phases: norms, clips and projections need no more.

    A single tap has the same block at every frequency. Taps d pixels apart, on a circle of N pixels, have the blocks of
    adjacent taps on N / gcd(d, N) pixels, in another order.
    """
    axes = []
    for axis in plan.axes:
        if len(couplings(axis).offsets) == 1:
            axis = axis._replace(period=axis.run)
        elif axis.run == 1:
            axis = axis._replace(period=axis.period // math.gcd(axis.kernel_dilation, axis.period), kernel_dilation=1)
        axes.append(axis)
    return Plan(tuple(axes), plan.groups)


@functools.lru_cache(maxsize=128)
def positions(plan: Plan) -> np.ndarray:
    """Where the block of each of the plan's grid points stands in the half grid of :func:`distinct`."""
    once = distinct(plan).grid
    flat = np.zeros((), np.int32)
    for axis, own, size in zip(plan.axes, plan.grid, once, strict=True):
        step = axis.kernel_dilation // (own // size) if axis.run == 1 else 1
        flat = flat[..., None] * size + np.arange(own) * step % size
    return half_grid(once).expand[flat]


@functools.lru_cache(maxsize=512)
def couplings(axis: Axis) -> _Couplings:
    """Offsets on the coarse grid, and the 0/1 array that places each tap there."""
    run, grid = axis.run, axis.period // axis.run
    ins, outs = run // axis.input_dilation, run // axis.stride
    if min(axis.stride, axis.input_dilation) > 1:
        low = axis.low
    else:  # a shift, which is unitary: chosen so that the taps meet at as few offsets as they can
        low = axis.kernel_dilation * (axis.taps - 1) if axis.input_dilation > 1 else 0
    entries: list[tuple[int, int, int, int]] = []
    for j in range(axis.taps):
        for u in range(outs):
            for v in range(ins):
                tau, rest = divmod(axis.stride * u - axis.input_dilation * v + axis.kernel_dilation * j - low, run)
                if rest == 0:
                    entries.append((tau % grid, v, u, j))
    offsets = tuple(dict.fromkeys(entry[0] for entry in entries)) or (0,)
    place = np.zeros((len(offsets), ins, outs, axis.taps), np.int8)
    for tau, v, u, j in entries:
        place[offsets.index(tau), v, u, j] += 1
    return _Couplings(offsets, place)


def block_taps(kernel: Float[Array, "*taps i o"], plan: Plan) -> Float[Array, "tau g m n"]:
    """The kernel as taps of the coarse, stride-1 convolution (B above); m inputs and n outputs per group."""
    return _couple(kernel, plan, [couplings(axis).place for axis in plan.axes])


def kernel_from_block_taps(
    blocks: Float[Array, "tau g m n"], plan: Plan, channels: tuple[int, ...], *, adjoint: bool = False
) -> Float[Array, "*taps i o"]:
    """The kernel whose block taps are nearest to ``blocks`` (or, with ``adjoint``, the transpose of block_taps).

    The two agree unless taps fold onto one another, i.e. the kernel is larger than the circle.
    """
    factors = []
    for axis in plan.axes:
        place = couplings(axis).place
        matrix = place.reshape(-1, axis.taps).astype(np.float64)
        inverse = matrix.T if adjoint else np.linalg.pinv(matrix)
        factors.append(inverse.reshape(axis.taps, *place.shape[:3]))
    return _uncouple(blocks, plan, channels, factors)


def squared_norm_of_coupling(plan: Plan) -> float:
    """Squared operator norm of :func:`block_taps`: 1 unless taps fold onto one another."""
    matrices = [couplings(axis).place.reshape(-1, axis.taps).astype(np.float64) for axis in plan.axes]
    return float(np.prod([np.linalg.norm(matrix, 2) ** 2 for matrix in matrices]))


def _trivial(place: np.ndarray) -> bool:
    return place.shape[1] == place.shape[2] == 1 and np.array_equal(place[:, 0, 0, :], np.eye(place.shape[3]))


def _couple(kernel: jax.Array, plan: Plan, places: list[np.ndarray]) -> jax.Array:
    *taps, i, o = kernel.shape
    g, rank = plan.groups, len(taps)
    if all(_trivial(place) for place in places):
        blocks = kernel.reshape(prod(taps), i, g, o // g)
        return blocks.swapaxes(1, 2)
    out = kernel
    for place in reversed(places):  # each step consumes the last tap axis and puts (tau, v, u) in front
        matrix = jnp.asarray(place, kernel.dtype)
        axis = out.ndim - 3
        out = jnp.tensordot(matrix, out, axes=((3,), (axis,)), precision=lax.Precision.HIGHEST)
    # now (tau1, v1, u1, tau2, v2, u2, ..., i, o)
    taus, vs, us = (list(range(start, 3 * rank, 3)) for start in range(3))
    shape = out.shape
    out = out.reshape(*shape[:-1], g, o // g)
    out = out.transpose(*taus, 3 * rank + 1, *vs, 3 * rank, *us, 3 * rank + 2)
    m, n = prod([shape[a] for a in vs]) * i, prod([shape[a] for a in us]) * (o // g)
    return out.reshape(prod([shape[a] for a in taus]), g, m, n)


def _uncouple(blocks: jax.Array, plan: Plan, channels: tuple[int, ...], factors: list[np.ndarray]) -> jax.Array:
    i, o = channels
    g, rank = plan.groups, len(plan.axes)
    if all(factor.shape[2] == factor.shape[3] == 1 and _trivial(np.moveaxis(factor, 0, 3)) for factor in factors):
        return blocks.swapaxes(1, 2).reshape(*(axis.taps for axis in plan.axes), i, o)
    taus, vs, us = ([factor.shape[a] for factor in factors] for a in (1, 2, 3))
    out = blocks.reshape(*taus, g, *vs, i, *us, o // g)
    first_v, first_u = rank + 1, 2 * rank + 2
    order = [a for r in range(rank) for a in (r, first_v + r, first_u + r)]
    out = out.transpose(*order, 2 * rank + 1, rank, 3 * rank + 2)
    out = out.reshape(*(size for sizes in zip(taus, vs, us, strict=True) for size in sizes), i, o)
    for factor in reversed(factors):  # each step consumes the last (tau, v, u) and puts the taps in front
        matrix = jnp.asarray(factor, blocks.dtype)
        last = out.ndim - 2
        out = jnp.tensordot(
            matrix, out, axes=((1, 2, 3), (last - 3, last - 2, last - 1)), precision=lax.Precision.HIGHEST
        )
    return out


@functools.lru_cache(maxsize=128)
def half_grid(grid: tuple[int, ...]) -> Half:
    """Representatives of the pairs (omega, -omega) of a frequency grid."""
    points = np.moveaxis(np.indices(grid), 0, -1).reshape(prod(grid), len(grid))
    flat = np.arange(len(points))
    mirrored = flat.reshape(grid)[tuple((-points % np.asarray(grid, int)).T)]
    kept = flat <= mirrored
    position = np.cumsum(kept) - 1
    weights = np.where(flat == mirrored, 1.0, 2.0)[kept] / len(points)
    return Half(points[kept].astype(np.int32), weights, position[np.minimum(flat, mirrored)].astype(np.int32))


def phases(frequencies: jax.Array, plan: Plan, dtype: Any) -> Float[Array, "2c tau"]:
    """Cosines, then sines, of the angle omega . tau, for the rows of ``frequencies`` and every block tap."""
    cos, sin = jnp.ones((frequencies.shape[0], 1), dtype), jnp.zeros((frequencies.shape[0], 1), dtype)
    for a, axis in enumerate(plan.axes):
        n = plan.grid[a]
        # The angle is reduced modulo the grid in exact integers: no loss of digits at high frequencies.
        turns = np.outer(np.arange(n), couplings(axis).offsets) % n
        angles = 2 * np.pi * turns / n
        c = jnp.asarray(np.cos(angles), dtype)[frequencies[:, a]]
        s = jnp.asarray(np.sin(angles), dtype)[frequencies[:, a]]
        cos, sin = (
            (
                (cos[:, :, None] * c[:, None] - sin[:, :, None] * s[:, None]).reshape(len(frequencies), -1),
                (cos[:, :, None] * s[:, None] + sin[:, :, None] * c[:, None]).reshape(len(frequencies), -1),
            )
            if a
            else (c, s)
        )
    return jnp.concatenate([cos, sin])


def symbol(taps: Float[Array, "tau g m n"], phase: Float[Array, "2c tau"]) -> Complex[Array, "c g m n"]:
    """The blocks at the frequencies whose phases are given."""
    t, *block = taps.shape
    parts = jnp.matmul(phase, taps.reshape(t, -1), precision=lax.Precision.HIGHEST).reshape(2, -1, *block)
    return lax.complex(parts[0], parts[1])


def symbol_adjoint(blocks: Complex[Array, "c g m n"], phase: Float[Array, "2c tau"]) -> Float[Array, "tau g m n"]:
    """The transpose of :func:`symbol` over the reals."""
    c, *block = blocks.shape
    parts = jnp.concatenate([blocks.real.reshape(c, -1), blocks.imag.reshape(c, -1)])
    return jnp.matmul(phase.T, parts, precision=lax.Precision.HIGHEST).reshape(-1, *block)


def rounding(kernel_shape: Sequence[int], dtype: Any) -> float:
    r"""Relative rounding error allowed for in a computed norm, when it is to be a bound.

    The symbol is a sum of ``taps`` products and the factorisation of an r x r matrix is backward stable: the
    first-order worst cases are about taps and r units of rounding; what is seen is their square roots.
    """
    *taps, i, o = kernel_shape
    side = min(i, o)
    return float(jnp.finfo(dtype).eps) * (16 + prod(taps) ** 0.5 + 4 * side**0.5)


def scan_frequencies(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    taps: Float[Array, "tau g m n"],
    plan: Plan,
    execution: Execution,
    xs: Any = None,
) -> tuple[Any, Any]:
    """Runs ``carry, out = step(carry, blocks, phase, weights, x)`` over the half grid, in chunks of bounded size.

    ``weights`` are zero on the padding of the last chunk (which repeats the frequency 0). ``xs`` is an optional tree
    with one row per frequency. Returns the last carry and the outs, one row per frequency of the half grid. The carry
    is a sum that starts at zero: with a mesh, each device has its own share of the frequencies, and they are added.
    """
    half = half_grid(plan.grid)
    nf, devices = len(half.frequencies), execution.mesh.size if execution.mesh else 1
    fitting = execution.chunk_bytes // (2 * taps.dtype.itemsize * prod(taps.shape[1:]))
    chunk = max(1, min(-(-nf // devices), fitting))
    chunks = -(-nf // (devices * chunk))
    pad = devices * chunks * chunk - nf
    # The barrier keeps XLA from folding the phases into a constant the size of the whole grid.
    frequencies = lax.optimization_barrier(jnp.asarray(np.pad(half.frequencies, ((0, pad), (0, 0)))))
    weights = jnp.asarray(np.pad(half.weights, (0, pad)), taps.dtype)
    xs = jax.tree.map(lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)), xs) if pad else xs

    def body(carry, item):
        frequencies, weights, x = item
        phase = phases(frequencies, plan, taps.dtype)
        return step(carry, symbol(taps, phase), phase, weights, x)

    def share(carry, items):
        if chunks == 1:
            return body(carry, items)
        split = jax.tree.map(lambda a: a.reshape(chunks, chunk, *a.shape[1:]), items)
        carry, outs = lax.scan(body, carry, split)
        return carry, jax.tree.map(lambda a: a.reshape(chunks * chunk, *a.shape[2:]), outs)

    if execution.mesh is None:
        carry, outs = share(carry, (frequencies, weights, xs))
    else:
        names = execution.mesh.axis_names
        together = lambda carry, items: (lambda sums, outs: (lax.psum(sums, names), outs))(*share(carry, items))
        specs = jax.P(), jax.P(names)
        run = jax.shard_map(together, mesh=execution.mesh, in_specs=specs, out_specs=specs, check_vma=False)
        carry, outs = run(carry, (frequencies, weights, xs))
    return carry, jax.tree.map(lambda a: a[:nf], outs) if pad else outs
