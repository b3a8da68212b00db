r"""The static geometry of a convolution: everything that follows from a ``Conv`` and its kernel's shape alone.

:func:`resolve` computes it once, in each public function; all that is below takes its result. This module holds
integers and NumPy arrays, and no jax.

The central idea: *every* convolution on a circle of ``period`` pixels, with stride s, input dilation e and kernel
dilation d,

.. math:: y_t = \sum_j K_j\, x_p \quad\text{over all taps with } s t + d j - lo \equiv e p \pmod{period},

is block-circulant once outputs are gathered in runs of L/s and inputs in runs of L/e, L = lcm(s, e). Write
t = (L/s) t' + u and p = (L/e) p' + v. Then tap j couples input phase v to output phase u at offset
tau = (s u - e v + d j - lo) / L, where that is an integer, on a coarse grid of period / L points. So it is an ordinary
convolution of stride 1 on the coarse grid, with (L/e) i inputs and (L/s) o outputs, and its singular values are those
of

.. math:: F(\omega) = \sum_\tau B_\tau \exp(2 \pi i\, \omega \cdot \tau), \qquad \omega \in \text{coarse grid}.

A real kernel has F(-omega) = conj F(omega), so half of the grid is enough.

A zero-padded layer is no such convolution. But it is a part (a compression) of one on a larger circle, its *circulant
embedding*, whose norm is therefore an upper bound on the layer's own. Padding by edge pixels or reflections is a map
that copies pixels, before a layer without padding: its norm is the root of the largest number of copies.

Each axis has its own padding, and its own circle.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from opnorm_jax._cache import cached_arrays
from opnorm_jax._conv import Conv

_FILLS = "CIRCULAR", "EDGE", "REFLECT"
"""What padding is filled with, where not with zeros."""

COARSE_POINTS = 2.5, 4.5, 9.0
"""Points of the coarse grids for each unit of the taps' span: their factors are at most 1.24, 1.07, 1.016 an axis."""


class Axis(NamedTuple):
    """One spatial axis of a convolution on a circle."""

    period: int  # pixels of the (dilated) input's circle
    taps: int
    stride: int
    input_dilation: int
    kernel_dilation: int
    low: int  # offset of the first tap; it matters only where stride and input dilation both exceed 1

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
        """The number of frequencies along each axis."""
        return tuple(axis.period // axis.run for axis in self.axes)


class Couplings(NamedTuple):
    """How the taps of one axis enter its block taps."""

    offsets: tuple[int, ...]  # of the block taps, on the coarse grid
    place: np.ndarray  # (offsets, input phases, output phases, taps), 1 where a tap enters


class Live(NamedTuple):
    """What is left of one axis of a layer without the taps, outputs and pixels that never meet.

    A tap whose pixels are padding for every output does not change the layer, only its circulant embedding. So the
    taps at the ends are cropped, together with the padding that they need, before the embedding is chosen.
    """

    start: int  # the first tap that is kept
    stop: int  # one past the last tap that is kept
    # whether each of those meets a pixel: with strides or input dilation some in between do not
    meets: tuple[bool, ...]
    pads: tuple[int, int]  # the padding of what is left; a negative one crops pixels that no tap meets
    outputs: int  # the number of outputs that meet a pixel, and those between them


class HalfGrid(NamedTuple):
    """Half of a frequency grid: one frequency of each pair (omega, -omega)."""

    frequencies: np.ndarray  # (nf, axes), integers
    weights: np.ndarray  # (nf,), 2 for a pair and 1 for a self-conjugate frequency, over the number of grid points
    expand: np.ndarray  # (grid points,), the position of each grid point's representative


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution and a kernel's shape, resolved. Frozen and hashable, so it can be static under ``jit``."""

    conv: Conv
    kernel_shape: tuple[int, ...]  # spatial axes first: (*taps, i, o)
    pads: tuple[tuple[int, int], ...]  # the (low, high) pairs in effect, whatever the pixels are filled with
    output_shape: tuple[int, ...]
    live: tuple[Live, ...]  # for each axis, what is left of the layer without what meets no pixel
    plan: Plan  # the circulant embedding, with each different block once
    own_plan: Plan | None  # that of the layer itself, on its own grid, where it has one: see ``exact``
    attained: bool  # whether the norm of the circulant embedding is the norm of the layer
    gain: float  # the norm of the layer is at most that of the circulant embedding, times this

    @property
    def taps(self) -> tuple[int, ...]:
        """The number of taps along each axis."""
        return self.kernel_shape[:-2]

    @property
    def live_shape(self) -> tuple[int, ...]:
        """The kernel's shape without the taps at its ends that meet no pixel."""
        return (*(axis.stop - axis.start for axis in self.live), *self.kernel_shape[-2:])

    @property
    def exact(self) -> bool:
        """Whether the layer is block-diagonal in frequency, so that all singular values are known.

        Along each axis it is circular, and its stride divides the grid; or its patches tile the image (1x1 kernels).
        """
        return self.own_plan is not None

    @property
    def full(self) -> bool:
        """Whether every pixel meets every tap, and a block has no more columns than rows ("full" padding).

        Then the layer is that of its circulant embedding, after a map that only inserts zeros, so its smallest singular
        value is at least that of the embedding.
        """
        conv, (i, o) = self.conv, self.kernel_shape[-2:]
        if set(conv.strides) - {1} or math.prod(conv.input_dilation) * o < i * conv.feature_group_count:
            return False
        return all(
            fill == "CIRCULAR" or fill is None and min(axis.pads) >= d * (axis.stop - axis.start - 1)
            for fill, d, axis in zip(fills(conv), conv.kernel_dilation, self.live, strict=True)
        )


def fills(conv: Conv) -> tuple[str | None, ...]:
    """Returns what fills the padding of each axis: ``"CIRCULAR"``, ``"EDGE"``, ``"REFLECT"``, or None for zeros."""
    return tuple(entry if entry in _FILLS else None for entry in padding_entries(conv))


def padding_entries(conv: Conv) -> tuple[Any, ...]:
    """Returns the padding of each axis, as it is described."""
    return (conv.padding,) * len(conv.input_shape) if isinstance(conv.padding, str) else conv.padding


@functools.lru_cache(maxsize=1024)
def resolve(conv: Conv, kernel_shape: tuple[int, ...]) -> Geometry:
    """Resolves a convolution for a kernel of the given shape (spatial axes first).

    Raises:
      ValueError: if the layer would have no output pixel.
    """
    taps = kernel_shape[:-2]
    pads = _explicit_padding(conv, taps)
    outputs = _output_shape(conv, taps, pads)
    if min(outputs, default=1) < 1:
        raise ValueError(
            f"expected a convolution with at least one output pixel, got output shape {outputs} from "
            f"input_shape={conv.input_shape}, taps {taps} and padding {conv.padding!r}. Check input_shape and padding."
        )
    sizes = map(_Size, conv.input_shape, conv.strides, conv.input_dilation, conv.kernel_dilation, taps, pads, outputs)
    axes = [_resolve_axis(size, fill) for size, fill in zip(sizes, fills(conv), strict=True)]
    groups = conv.feature_group_count
    own = [axis.own for axis in axes if axis.own is not None]
    plan = deduplicate(Plan(tuple(axis.embedding for axis in axes), groups))
    # Where no padding is met and each output has a patch of the image to itself (1x1 kernels; patches no larger than
    # the stride), the embedding has one block along an axis, and it is the layer's own.
    attained = all(
        axis.own is not None
        if axis.fill == "CIRCULAR"
        else axis.fill is None and max(axis.live.pads) <= 0 and n == e == 1
        for axis, n, e in zip(axes, plan.grid, conv.input_dilation, strict=True)
    )
    return Geometry(
        conv,
        tuple(kernel_shape),
        pads,
        outputs,
        tuple(axis.live for axis in axes),
        plan,
        Plan(tuple(own), groups) if len(own) == len(axes) else None,
        attained,
        math.prod(axis.gain for axis in axes),
    )


class _Size(NamedTuple):
    """One axis of a layer, as it is described."""

    pixels: int
    stride: int
    input_dilation: int
    kernel_dilation: int
    taps: int
    pads: tuple[int, int]
    outputs: int


class _Resolved(NamedTuple):
    """One axis of a layer, resolved."""

    fill: str | None
    live: Live
    embedding: Axis
    own: Axis | None  # on its own circle, where it has one
    gain: float


def _resolve_axis(size: _Size, fill: str | None) -> _Resolved:
    n, s, e, d, k, pads, m = size
    whole = Live(0, k, (True,) * k, pads, m)
    if fill == "CIRCULAR":
        divides = n * e % s == 0
        # A stride that does not divide the circle keeps some of the outputs of stride 1.
        axis = Axis(n * e, k, s if divides else 1, e, d, d * (k - 1) // 2)
        return _Resolved(fill, whole, axis, axis if divides else None, 1.0)
    if fill is not None:
        whole = whole._replace(pads=(0, 0))
        used = padded_pixels(fill, n, e, pads)[np.unique(s * np.arange(m)[:, None] + d * np.arange(k))]
        embedding = _embedding(size._replace(pixels=n + sum(pads)), whole)
        return _Resolved(fill, whole, embedding, None, math.sqrt(np.bincount(used).max()))
    live = _live(size)
    # Outputs whose patches tile the image: nothing is padded, and nothing would wrap around.
    tiles = pads == (0, 0) and e == 1 and d * (k - 1) < s and n % s == 0
    return _Resolved(None, live, _embedding(size, live), Axis(n, k, s, 1, d, 0) if tiles else None, 1.0)


def padded_pixels(fill: str, n: int, input_dilation: int, pads: tuple[int, int]) -> np.ndarray:
    """Returns which pixel each place of a padded axis holds, by number; -1 for a zero that the input dilation makes."""
    if fill == "CIRCULAR":
        places = np.arange(-pads[0], n * input_dilation + pads[1]) % (n * input_dilation)
        return np.where(places % input_dilation == 0, places // input_dilation, -1)
    modes: dict[str, Literal["edge", "reflect"]] = {"EDGE": "edge", "REFLECT": "reflect"}
    return np.pad(np.arange(n), pads, mode=modes[fill])


def met_pixels(geometry: Geometry) -> list[np.ndarray]:
    """Returns for each axis which pixel each tap meets at each output, (taps, outputs); -1 where it meets none."""
    conv, found = geometry.conv, []
    sizes = zip(conv.input_shape, geometry.output_shape, geometry.taps, geometry.pads, fills(conv), strict=True)
    steps = zip(conv.strides, conv.input_dilation, conv.kernel_dilation, strict=True)
    for (n, m, k, pads, fill), (s, e, d) in zip(sizes, steps, strict=True):
        places = s * np.arange(m) + d * np.arange(k)[:, None]
        if fill is not None:
            found.append(padded_pixels(fill, n, e, pads)[places])
            continue
        places -= pads[0]
        meets = (places >= 0) & (places <= (n - 1) * e) & (places % e == 0)
        found.append(np.where(meets, places // e, -1))
    return found


def _live(size: _Size) -> Live:
    n, stride, input_dilation, dilation, k, (low, _), outputs = size
    last = (n - 1) * input_dilation
    starts = stride * np.arange(outputs) - low
    taps, seen = np.zeros(k, bool), np.zeros(outputs, bool)
    for j in range(k):
        places = starts + dilation * j
        meets = (places >= 0) & (places <= last) & (places % input_dilation == 0)
        taps[j], seen = meets.any(), seen | meets
    if not taps.any():  # a layer that sees nothing but padding is that of one tap, which is zero
        return Live(0, 1, (False,), (0, -last), 1)
    (first_tap, last_tap), (first, end) = (np.flatnonzero(mask)[[0, -1]].tolist() for mask in (taps, seen))
    low = low - dilation * first_tap - stride * first
    high = stride * (end - first) + dilation * (last_tap - first_tap) - low - last
    meets = tuple(taps[first_tap : last_tap + 1].tolist())
    return Live(first_tap, last_tap + 1, meets, (low, high), end - first + 1)


def _explicit_padding(conv: Conv, taps: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    pairs = []
    for entry, n, k, s, d in zip(
        padding_entries(conv), conv.input_shape, taps, conv.strides, conv.kernel_dilation, strict=True
    ):
        reach = d * (k - 1)
        total = max((math.ceil(n / s) - 1) * s + reach + 1 - n, 0)
        named = {
            "CAUSAL": (reach, 0),
            **dict.fromkeys(_FILLS, (reach // 2, reach - reach // 2)),
            "SAME": (total // 2, total - total // 2),
            "VALID": (0, 0),
        }
        pairs.append(named[entry] if isinstance(entry, str) else entry)
    return tuple(pairs)


def _output_shape(conv: Conv, taps: tuple[int, ...], pads: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    sizes = zip(conv.input_shape, conv.input_dilation, conv.strides, conv.kernel_dilation, taps, pads, fills(conv))
    return tuple(
        math.ceil(n * e / s) if fill == "CIRCULAR" else ((n - 1) * e + low + high - d * (k - 1)) // s + 1
        for n, e, s, d, k, (low, high), fill in sizes
    )


def _embedding(size: _Size, live: Live) -> Axis:
    """Returns the circulant embedding of a zero-padded axis: the smallest circle that is large enough.

    No output may reach an input pixel by wrapping around, and the outputs must be distinct pixels of the circle, which
    must hold a whole number of strides (and of input dilations).
    """
    (low, high), s, e = live.pads, size.stride, size.input_dilation
    held = (size.pixels - 1) * e + 1 + min(low, 0) + min(high, 0)  # negative padding crops
    circle = max(held + max(low, high, 0), s * (live.outputs - 1) + 1)
    run = math.lcm(s, e)
    return Axis(-(-circle // run) * run, live.stop - live.start, s, e, size.kernel_dilation, low)


def deduplicate(plan: Plan) -> Plan:
    """Shrinks the grid so that each block occurs once, up to phases. Norms, clips and projections need no more.

    A single tap has the same block at every frequency. Taps that are d pixels apart, on a circle of N pixels, have the
    blocks of adjacent taps on N / gcd(d, N) pixels, in another order.
    """
    axes = []
    for axis in plan.axes:
        if len(couplings(axis).offsets) == 1:
            axis = axis._replace(period=axis.run)
        elif axis.run == 1:
            axis = axis._replace(period=axis.period // math.gcd(axis.kernel_dilation, axis.period), kernel_dilation=1)
        axes.append(axis)
    return Plan(tuple(axes), plan.groups)


@cached_arrays
def positions(plan: Plan) -> np.ndarray:
    """Returns where the block of each of the plan's grid points stands in the half grid of :func:`deduplicate`."""
    once = deduplicate(plan).grid
    flat = np.zeros((), np.int32)
    for axis, own, size in zip(plan.axes, plan.grid, once, strict=True):
        step = axis.kernel_dilation // (own // size) if axis.run == 1 else 1
        flat = flat[..., None] * size + np.arange(own) * step % size
    return half_grid(once).expand[flat]


@cached_arrays
def couplings(axis: Axis) -> Couplings:
    """Returns the offsets on the coarse grid, and the 0/1 array that places each tap there."""
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
    return Couplings(offsets, place)


@cached_arrays
def half_grid(grid: tuple[int, ...]) -> HalfGrid:
    """Returns representatives of the pairs (omega, -omega) of a frequency grid."""
    points = np.moveaxis(np.indices(grid), 0, -1).reshape(math.prod(grid), len(grid))
    flat = np.arange(len(points))
    mirrored = flat.reshape(grid)[tuple((-points % np.asarray(grid, int)).T)]
    kept = flat <= mirrored
    position = np.cumsum(kept) - 1
    weights = np.where(flat == mirrored, 1.0, 2.0)[kept] / len(points)
    return HalfGrid(points[kept].astype(np.int32), weights, position[np.minimum(flat, mirrored)].astype(np.int32))


def span(axis: Axis) -> int:
    """Returns the largest less the smallest offset of the block taps."""
    large = axis._replace(period=axis.run * 10**6)  # too large for any of them to fold
    signed = [tau - 10**6 if tau > 10**6 // 2 else tau for tau in couplings(large).offsets]
    return max(signed) - min(signed)


def overshoot(span: int, grid: int) -> float:
    """Returns the factor by which the supremum over all frequencies can exceed the largest norm on a grid (M. Riesz).

    Along one axis the symbol is a trigonometric polynomial; its exponents differ by ``span`` at most.
    """
    return 1 / math.cos(math.pi * span / (2 * grid))


@functools.lru_cache(maxsize=512)
def coarse_plan(plan: Plan, points: float = COARSE_POINTS[0]) -> tuple[Plan, float]:
    """Returns the same convolution on a small grid, and the factor by which its norm elsewhere can be larger.

    The grid has so many ``points`` for each unit of the taps' span: by default, for three taps, five an axis.
    """
    axes, factor = [], 1.0
    for axis, own in zip(plan.axes, plan.grid, strict=True):
        width = span(axis)
        grid = max(1, math.ceil(points * width))
        if grid < own:
            axis, factor = axis._replace(period=axis.run * grid), factor * overshoot(width, grid)
        axes.append(axis)
    return Plan(tuple(axes), plan.groups), factor


@functools.lru_cache(maxsize=512)
def finer_and_finer(plan: Plan) -> tuple[tuple[Plan, float], ...]:
    """Returns coarse plans, each with its factor, and the plan itself: each with at least half as many points again."""
    levels = [(plan, 1.0)]
    for points in reversed(COARSE_POINTS):
        coarse, factor = coarse_plan(plan, points)
        if 1.5 * len(half_grid(coarse.grid).weights) < len(half_grid(levels[0][0].grid).weights):
            levels.insert(0, (coarse, factor))
    return tuple(levels)


def plans_for_every_size(conv: Conv, taps: tuple[int, ...], slack: float) -> list[tuple[Plan, float]]:
    """Returns plans, each with a factor: the largest product of a plan's norm and its factor bounds every input size.

    That bound is at most ``1 + slack`` times the supremum of the symbol's norm over all frequencies. There are several
    plans where stride and input dilation share a divisor: then the padding's parity matters, and each is tried.
    """
    choices = [
        _axes_for_every_size(*axis, (1 + slack) ** (1 / len(taps)))
        for axis in zip(taps, conv.strides, conv.input_dilation, conv.kernel_dilation, strict=True)
    ]
    return [
        (Plan(tuple(axis for axis, _ in picked), conv.feature_group_count), math.prod(factor for _, factor in picked))
        for picked in itertools.product(*choices)
    ]


def _axes_for_every_size(
    k: int, stride: int, input_dilation: int, dilation: int, factor: float
) -> list[tuple[Axis, float]]:
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
