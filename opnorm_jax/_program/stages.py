"""Cuts a network into stages, and carries the semidefinite bound from one to the next (see ``sdp.py``).

Every path from the input to the output goes through certain signals, one after the other: the *cuts*. Between two cuts,
or over several, the network is read as a stage. Where that cannot be done, the bound is multiplied by what the rules of
``rules.py`` say of that part, and begins anew behind it. So it is never above the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import canonical_kernel
from opnorm_jax._geometry import fills
from opnorm_jax._program import slopes
from opnorm_jax._program.joint import Leg, improved
from opnorm_jax._program.movement import HOLE, MOVES, ElementMap, NotUnderstood, identity
from opnorm_jax._program.numbers import Number, times
from opnorm_jax._program.rules import Refused, is_signal
from opnorm_jax._program.sdp import Stage, Step, certify, search, summed
from opnorm_jax._program.signals import Signal

_LARGEST_SIDE = 2048
"""A matrix that is factorised has so many rows at most; a larger stage is left to the product."""

_LARGEST_BYTES = 2**30
"""The roots that are carried from stage to stage take so many bytes at most."""


class NotAStage(Exception):
    """Part of a network that no stage describes."""


class Layout(NamedTuple):
    """Which axes of a signal are which. The others are batch axes."""

    channel: int
    spatial: tuple[int, ...]


class Window(NamedTuple):
    """How a convolution moves over a map: of each spatial axis."""

    strides: Sequence[int]
    lows: Sequence[int]  # padding at the beginning
    dilation: Sequence[int]
    circles: Sequence[bool]  # whether the axis wraps around


class Part(NamedTuple):
    """What a signal is made of."""

    kind: str
    sources: list[Signal]
    data: Any = None


def semidefinite_bound(x: Signal, out: Signal, dtype: Any) -> Number | None:
    """Returns a bound on the output's change, over the input's; None where the program cannot be cut."""
    if not isinstance(out.bound, jax.core.Tracer) and not 0 < float(out.bound) < math.inf:
        return None
    parts: dict[int, Part] = {}
    cuts = _cuts(x, out, parts)
    if cuts is None:
        return None
    return _Carrier(cuts, parts, dtype).run()


def _part(signal: Signal, x: Signal) -> Part:
    """Reads a signal as an operation of a stage, or as one that none describes."""
    eqn = signal.eqn
    if eqn is None:
        owners = [source.owner for source in signal.elements.sources]
        if signal.compute is not None or signal in owners and not signal.ins:
            raise NotAStage
        return Part("unknown", [value for value in signal.ins if is_signal(value)] or owners)
    name = eqn.primitive.name
    if name in ("conv_general_dilated", "dot_general") and signal.layer is not None:
        return Part(name, [signal.layer.before], signal.layer)
    signals = [value for value in signal.ins if is_signal(value)]
    alike = all(value.shape == signal.shape for value in signals)
    if (found := slopes.interval(signal)) is not None:
        inner, low, high = found
        return Part("slope", [inner], (low, high))
    if name in ("add", "add_any", "sub") and alike:
        signs = (1, -1 if name == "sub" else 1)
        return Part("sum", signals, tuple(s for s, value in zip(signs, signal.ins) if is_signal(value)))
    if name == "neg":
        return Part("sum", signals, (-1,))
    if name == "mul" and alike and len(signals) == 1 or name == "div" and alike and signals == signal.ins[:1]:
        (constant,) = (value for value in signal.ins if not is_signal(value))
        return Part("scale", signals, (constant, name == "div"))
    if name == "concatenate" and len(signals) == len(signal.ins):
        return Part("concatenate", signals, eqn.params["dimension"])
    if name == "reduce_sum":
        return Part("total", signals, tuple(eqn.params["axes"]))
    if name == "reduce_window_sum":
        return Part("pool", signals[:1], eqn)
    if name in ("reshape", "squeeze", "transpose", "broadcast_in_dim", "copy") and (source := _unmoved(signal)):
        return Part("same", [source])
    if name in MOVES and (source := _only_source(signal, x)):
        return Part("moved", [source], signal.elements)
    return Part("unknown", signals)


def _unmoved(signal: Signal) -> Signal | None:
    """Returns the signal whose elements this has, all of them in the same order."""
    try:
        elements = signal.elements
        if len(elements.sources) != 1 or elements.sources[0].owner is signal or elements.sources[0].size != signal.size:
            return None
        source = elements.sources[0].owner
        whole = identity(elements.sources[0])
        if source.shape == signal.shape and elements.axes is not None and whole.axes is not None:
            same = all(np.array_equal(a, b) for a, b in zip(elements.axes, whole.axes, strict=True))
        else:
            same = signal.size <= 2**20 and np.array_equal(elements.numbers().ravel(), np.arange(signal.size))
        return source if same else None
    except NotUnderstood:
        return None


def _only_source(signal: Signal, x: Signal) -> Signal | None:
    """Returns the input, or an operation's result, that all elements but the constants are elements of."""
    if len(signal.elements.sources) != 1:
        return None
    owner = signal.elements.sources[0].owner
    return owner if owner is not signal and (owner is x or owner.eqn is not None) else None


def _cuts(x: Signal, out: Signal, parts: dict[int, Part]) -> list[Signal] | None:
    """Finds the signals through which every path from ``x`` to ``out`` goes, in order; None if a path is not known."""
    order, done, stack = [], set(), [(out, False)]
    while stack:
        signal, finished = stack.pop()
        if finished:
            order.append(signal)
            continue
        if id(signal) in done:
            continue
        done.add(id(signal))
        stack.append((signal, True))
        if signal is x:
            parts[id(x)] = Part("input", [])
            continue
        try:
            part = _part(signal, x)
        except NotAStage:
            return None
        if not part.sources:
            return None
        parts[id(signal)] = part
        stack += [(source, False) for source in part.sources if id(source) not in done]
    # Sources come before what is made of them. A signal's dominators are those common to its sources, and itself.
    number = {id(signal): n for n, signal in enumerate(order)}
    above: list[int] = []  # the nearest dominator of each
    for n, signal in enumerate(order):
        found = n
        for k, source in enumerate(parts[id(signal)].sources):
            other = number[id(source)]
            if k == 0:
                found = other
            while found != other:
                if found > other:
                    found = above[found]
                else:
                    other = above[other]
        above.append(found)
    chain = [len(order) - 1]
    while above[chain[-1]] != chain[-1]:
        chain.append(above[chain[-1]])
    found = [order[n] for n in reversed(chain)]
    return [signal for signal in found if _has_bound(signal)] if found[0] is x else None


def _has_bound(signal: Signal) -> bool:
    """Tells whether the product's rules bound a signal: the exponentials inside of a softmax, say, they do not."""
    try:
        return signal.bound is not None
    except Refused:
        return False


class _Reader:
    """Reads the part of a network between two cuts as a stage."""

    def __init__(self, start: Signal, layout: Layout, parts: dict[int, Part], dtype: Any):
        self.start, self.layout, self.parts, self.dtype = start, layout, parts, dtype
        self.steps: list[Step] = []
        self.arrays: list[jax.Array] = []
        self.gains: list[Number] = []  # of the linear form before each diagonal, by the product's rules
        self.index = {id(start): 0}
        self.states = [(self._image(start), False, False)]  # image's size, pending crop, coarse
        self.completed: dict[int, int] = {}
        self.strides: tuple[int, ...] | None = None
        self.needs: list[tuple[bool, tuple[int, ...]]] = []  # on the coarse grid?; pixels that a circle must have
        self.exact: list[tuple[bool, tuple[int | None, ...]]] = []  # None where any is right
        self.channels = start.shape[layout.channel]
        self.needs.append((False, self._image(start)))

    @property
    def diagonals(self) -> int:
        """How many diagonals of slopes have been read."""
        return sum(step.kind in ("slope", "mask") for step in self.steps)

    def _image(self, signal: Signal) -> tuple[int, ...]:
        return tuple(signal.shape[axis] for axis in self.layout.spatial)

    def read(self, signal: Signal) -> int:
        """Returns the number of a signal's value."""
        if id(signal) not in self.index:
            part = self.parts[id(signal)]
            reader = getattr(self, f"_{part.kind}", None)
            if reader is None:
                raise NotAStage
            self.index[id(signal)] = reader(signal, part)
        return self.index[id(signal)]

    def whole(self, signal: Signal) -> int:
        """Returns the number of a value that has been cropped to its image."""
        n = self.read(signal)
        image, pending, coarse = self.states[n]
        if not pending:
            return n
        if n not in self.completed:
            channels = signal.shape[self.layout.channel]
            self.gains.append(self._gain(signal))
            self.completed[n] = self._add(Step("mask", (n,), channels, coarse), (image, False, coarse))
        return self.completed[n]

    def _gain(self, signal: Signal) -> Number:
        if not _has_bound(signal):
            raise NotAStage
        return signal.bound / self.start.bound

    def _add(self, step: Step, state: Any) -> int:
        self.steps.append(step)
        self.states.append(state)
        return len(self.steps)

    def _numbers(self, value: Any) -> Any:
        """An array as it is computed with: in double precision, unless it is traced."""
        return value.astype(self.dtype) if isinstance(value, jax.core.Tracer) else np.asarray(value, np.float64)

    def _array(self, array: Any) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1

    def _same(self, signal: Signal, part: Part) -> int:
        (source,) = part.sources
        if signal.shape != source.shape and (self.layout.spatial or signal.shape[-1:] != source.shape[-1:]):
            raise NotAStage
        return self.read(source)

    def _moved(self, signal: Signal, part: Part) -> int:
        """Strided slices, channels that are picked, and constants around: a convolution with a kernel of one tap."""
        (source,) = part.sources
        places, spatial = _coordinates(part.data), self.layout.spatial
        channel = self.layout.channel % len(places)
        for axis, length in enumerate(source.shape):
            if axis not in (channel, *spatial) and not np.array_equal(places[axis], np.arange(length)):
                raise NotAStage
        steps = [_progression(places[axis], source.shape[axis]) for axis in spatial]
        strides, lows = tuple(stride for stride, _ in steps), [low for _, low in steps]
        ones, picked = (1,) * len(spatial), places[channel]
        kernel = np.where(picked >= 0, np.eye(source.shape[channel])[:, np.maximum(picked, 0)], 0)
        window = Window(strides, lows, ones, [False] * len(ones))
        return self._filter(signal, source, kernel.reshape(*ones, *kernel.shape), window)

    def _sum(self, signal: Signal, part: Part) -> int:
        sources = tuple(map(self.read, part.sources))
        states = [self.states[n] for n in sources]
        if len({(image, coarse) for image, _, coarse in states}) != 1:
            raise NotAStage
        image, _, coarse = states[0]
        pending = any(state[1] for state in states)
        step = Step("sum", sources, signal.shape[self.layout.channel], coarse, signs=part.data)
        return self._add(step, (image, pending, coarse))

    def _scale(self, signal: Signal, part: Part) -> int:
        source, rank = self.read(part.sources[0]), len(signal.shape)
        factor, divides = part.data
        shape = (1,) * (rank - np.ndim(factor)) + np.shape(factor)
        if any(length > 1 and axis != self.layout.channel % rank for axis, length in enumerate(shape)):
            raise NotAStage
        channels = signal.shape[self.layout.channel]
        factor = self._numbers(factor).reshape(-1)
        factor = (1 / factor if divides else factor) * np.ones(channels, self.dtype)
        step = Step("scale", (source,), channels, self.states[source][2], self._array(factor))
        return self._add(step, self.states[source])

    def _concatenate(self, signal: Signal, part: Part) -> int:
        if part.data != self.layout.channel:
            raise NotAStage
        sources = tuple(map(self.read, part.sources))
        states = [self.states[n] for n in sources]
        if len({(image, coarse) for image, _, coarse in states}) != 1:
            raise NotAStage
        image, _, coarse = states[0]
        step = Step("concatenate", sources, signal.shape[self.layout.channel], coarse)
        return self._add(step, (image, any(state[1] for state in states), coarse))

    def _slope(self, signal: Signal, part: Part) -> int:
        (inner,), (low, high) = part.sources, part.data
        source = self.read(inner)
        image, pending, coarse = self.states[source]
        low, high = self._numbers(low), self._numbers(high)
        xp = jnp if isinstance(low + high, jax.core.Tracer) else np
        # What is no whole number may have been rounded to single precision.
        widened = lambda value, sign: xp.where(value % 1 == 0, value, value + sign * 2**-22 * abs(value))
        low, high = widened(low, -1), widened(high, 1)
        if pending:  # the crop is a slope of 0
            low, high = xp.minimum(low, 0), xp.maximum(high, 0)
        channels = signal.shape[self.layout.channel]
        self.gains.append(self._gain(inner) * xp.maximum(abs(low), abs(high)))
        interval = xp.stack([low, high])
        step = Step("slope", (source,), channels, coarse, self._array(interval))
        return self._add(step, (image, False, coarse))

    def _dot_general(self, signal: Signal, part: Part) -> int:
        (before,), layer = part.sources, part.data
        contracted, _ = signal.eqn.params["dimension_numbers"]
        last = len(before.shape) - 1
        channels_last = self.layout.channel % len(before.shape) == layer.axis == last == len(signal.shape) - 1
        if not is_signal(signal.ins[0]) or tuple(contracted[0]) != (last,) or not channels_last:
            raise NotAStage
        source = self.whole(before)
        image, _, coarse = self.states[source]
        kernel = self._numbers(canonical_kernel(layer.kernel, layer.conv))
        ones = (1,) * len(self.layout.spatial)
        array = self._array(kernel.reshape(*ones, *kernel.shape))
        step = Step("conv", (source,), signal.shape[-1], coarse, array, (0,) * len(ones), ones)
        return self._add(step, (image, False, coarse))

    def _conv_general_dilated(self, signal: Signal, part: Part) -> int:
        (before,), layer, eqn = part.sources, part.data, signal.eqn
        numbers, conv = eqn.params["dimension_numbers"], layer.conv
        layout = Layout(numbers.lhs_spec[1], tuple(numbers.lhs_spec[2:]))
        if layout != self.layout or numbers.lhs_spec != numbers.out_spec or set(conv.input_dilation) - {1}:
            raise NotAStage
        if set(eqn.params["lhs_dilation"]) - {1}:
            raise NotAStage
        pixels = _coordinates(layer.image)
        circles = [fill == "CIRCULAR" for fill in fills(conv)]
        kernel = self._numbers(canonical_kernel(layer.kernel, conv))
        groups, (*taps, i, o) = conv.feature_group_count, kernel.shape
        lows = []
        for a, axis in enumerate(layout.spatial):
            if circles[a]:
                entries = pixels[axis]
                first = int(np.argmax(entries == 0))
                if not np.array_equal(entries, (np.arange(len(entries)) - first) % before.shape[axis]):
                    raise NotAStage
                lows.append(eqn.params["padding"][a][0] + first)
            else:
                lows.append(conv.padding[a][0])
        if groups > 1:
            kernel = kernel.reshape(*taps, i, groups, o // groups)
            kernel = kernel[..., None, :, :, :] * np.eye(groups, dtype=kernel.dtype)[:, None, :, None]
            kernel = kernel.reshape(*taps, groups * i, o)
        return self._filter(signal, before, kernel, Window(conv.strides, lows, conv.kernel_dilation, circles))

    def _pool(self, signal: Signal, part: Part) -> int:
        """Sums over windows are a convolution by ones, of each channel by itself."""
        (before,), eqn = part.sources, part.data
        params, rank = eqn.params, len(signal.shape)
        given = lambda name: params.get(name) or (1,) * rank
        window, strides, pads = params["window_dimensions"], given("window_strides"), params["padding"]
        other = [axis for axis in range(rank) if axis not in self.layout.spatial]
        if any(window[n] != 1 or strides[n] != 1 or tuple(pads[n]) != (0, 0) for n in other):
            raise NotAStage
        if set(given("base_dilation")) | set(given("window_dilation")) != {1}:
            raise NotAStage
        channels = signal.shape[self.layout.channel]
        taps = [window[n] for n in self.layout.spatial]
        kernel = np.broadcast_to(np.eye(channels), (*taps, channels, channels))
        of = lambda values: tuple(values[n] for n in self.layout.spatial)
        lows = [low for low, _ in of(pads)]
        window = Window(of(strides), lows, (1,) * len(taps), [False] * len(taps))
        return self._filter(signal, before, kernel, window)

    def _filter(self, signal: Signal, before: Signal, kernel: Any, window: Window) -> int:
        """Adds a convolution."""
        strides, lows, dilation, circles = window
        source = self.whole(before)
        image, _, coarse = self.states[source]
        out, strided = self._image(signal), math.prod(strides) > 1
        if strided:
            if coarse or self.strides is not None and self.strides != tuple(strides):
                raise NotAStage
            self.strides = tuple(strides)
        *taps, _, channels = kernel.shape
        masked, need = False, []
        for n, m, k, s, d, low, circle in zip(image, out, taps, strides, dilation, lows, circles, strict=True):
            if circle and n % s:
                raise NotAStage
            masked = masked or not circle and (k > 1 or low != 0 or n != s * m)
            need.append(n if circle else max(n, n + low, s * (m - 1) + (k - 1) * d - low + 1, s * m))
        self.needs.append((coarse, tuple(need)))
        self.exact.append((coarse, tuple(n if circle else None for n, circle in zip(image, circles, strict=True))))
        step = Step(
            "conv",
            (source,),
            channels,
            coarse or strided,
            self._array(kernel),
            tuple(int(low) for low in lows),
            tuple(dilation),
            strided,
            masked,
        )
        return self._add(step, (out, masked, coarse or strided))

    @property
    def stage_strides(self) -> tuple[int, ...]:
        return self.strides or (1,) * len(self.layout.spatial)

    def stage(self, grid: tuple[int, ...], end: int) -> Stage:
        """Returns the stage on a circle, whose output is the value of a number."""
        steps = self.steps
        if end != len(steps):  # the output must be the last
            step = Step(
                "sum", (end,), steps[end - 1].channels if end else self.channels, self.states[end][2], signs=(1,)
            )
            steps = [*steps, step]
        return Stage(self.channels, tuple(steps), grid, self.stage_strides)

    @property
    def side(self) -> int:
        copies = math.prod(self.stage_strides)
        sides = [
            step.channels * (1 if step.coarse else copies) for step in self.steps if step.kind in ("slope", "mask")
        ]
        return self.channels * copies + sum(sides)


def _coordinates(elements: ElementMap) -> list[np.ndarray]:
    """Returns, for each axis of an array, its elements' coordinates along that axis of the source; HOLE if constant."""
    (source,), axes = elements.sources, elements.axes
    if axes is None or len(axes) != len(source.shape):
        raise NotAStage
    held = [entries > HOLE // 2 for entries in axes]
    if not all(at.any() for at in held):
        raise NotAStage
    lowest = [int(entries[at].min()) for entries, at in zip(axes, held)]
    corner = sum(lowest)  # the number of the element that has the lowest coordinate along every axis
    found, steps = [], np.cumprod([1, *source.shape[:0:-1]])[::-1]
    for entries, at, low, step, length in zip(axes, held, lowest, steps, source.shape, strict=True):
        place = corner // int(step) % length + (entries - low) // step
        if ((entries - low)[at] % step).any() or (place[at] >= length).any():
            raise NotAStage
        found.append(np.where(at, place, HOLE))
    return found


def _progression(places: np.ndarray, length: int) -> tuple[int, int]:
    """Returns s and l such that element t is element s t - l of an axis of that length, a constant where that is none.

    Of a single element, s is the length.
    """
    (held,) = np.nonzero(places >= 0)
    stride = int(places[held[1]] - places[held[0]]) if len(held) > 1 else length
    low = stride * int(held[0]) - int(places[held[0]])
    expected = stride * np.arange(len(places)) - low
    inside = (expected >= 0) & (expected < length)
    if stride < 1 or not np.array_equal(places, np.where(inside, expected, HOLE)):
        raise NotAStage
    return stride, low


class _Read(NamedTuple):
    """A stage that was read: up to which cut, and whether its output is cropped, so that another may follow."""

    reader: _Reader
    value: int
    end: int
    goes_on: bool


class _Carrier:
    """Carries the bound along the cuts."""

    def __init__(self, cuts: list[Signal], parts: dict[int, Part], dtype: Any):
        self.cuts, self.parts, self.dtype = cuts, parts, dtype
        self.scale: Number = 1.0
        # A run of stages through which roots are carried, and what it gains.
        self.legs: list[Leg] = []
        self.gain: Number = 1.0
        self.roots: jax.Array | None = None
        self.grid: tuple[int, ...] = ()

    def run(self) -> Number:
        at, layout = 0, None
        while at < len(self.cuts) - 1:
            run, grid, layout = self._read_run(at, layout)
            if not run:
                at, layout = self._across(at, layout)
                continue
            for read in run:
                grid = self._through(read, at, grid)
                at = read.end
            self.grid = grid
            if not run[-1].goes_on:
                self._close()
                layout = None
        self._close()
        return self.scale

    def _close(self, product: Number = 1.0) -> None:
        """Ends a run, with the best multipliers for the whole of it, and multiplies by what the product says next."""
        known = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self.legs, self.gain)))
        gain = improved(self.legs, float(self.gain)) if known else self.gain
        self.scale = times(times(self.scale, gain), product)
        self.legs, self.gain, self.roots = [], 1.0, None

    def _across(self, at: int, layout: Layout | None) -> tuple[int, Layout | None]:
        """Goes to the next cut by the product's rules; a sum over all pixels keeps a root."""
        signal = self.cuts[at + 1]
        part = self.parts[id(signal)]
        if layout and layout.spatial and self.roots is not None:
            all_summed = set(self._summed(signal, part, layout)) == set(layout.spatial)
            channels_last = signal.shape[-1:] == (self.cuts[at].shape[layout.channel],)
            if all_summed and channels_last:
                image = tuple(self.cuts[at].shape[axis] for axis in layout.spatial)
                root = summed(self.roots, image, self.grid, self.dtype)
                channels = root.shape[-1]
                stage = Stage(channels, (Step("sum", (0,), channels, signs=(1,)),), (), ())
                legs = [Leg(None, image=image, grid=self.grid), Leg(stage)]
                self._accept(legs, *certify(stage, (), np.zeros(0), root, self.dtype), self._ratio(at, at + 1))
                self.grid = ()
                return at + 1, Layout(-1, ())
        if self.roots is not None:  # another circle may fit where this one does not
            self._close()
            return at, None
        self._close(self._ratio(at, at + 1))
        return at + 1, None

    def _summed(self, signal: Signal, part: Part, layout: Layout) -> tuple[int, ...]:
        """Returns the axes over the whole of which a signal is summed."""
        if part.kind == "total":
            return part.data
        if part.kind == "pool" and math.prod(signal.shape[n] for n in layout.spatial) == 1:
            params, shape = part.data.params, part.sources[0].shape
            whole = tuple(n if axis in layout.spatial else 1 for axis, n in enumerate(shape))
            if tuple(params["window_dimensions"]) == whole and not any(map(any, params["padding"])):
                return layout.spatial
        return ()

    def _ratio(self, start: int, end: int) -> Number:
        ratio = self.cuts[end].bound / self.cuts[start].bound
        return times(ratio, 1 + 1e-6)

    def _read_run(self, at: int, layout: Layout | None) -> tuple[list[_Read], tuple[int, ...], Layout | None]:
        """Reads stages from a cut on, as many as one circle fits."""
        run: list[_Read] = []
        grid: tuple[int, ...] = ()
        layout = layout or self._layout(at)
        if layout is None:
            return run, grid, None
        fixed = self.grid if self.roots is not None else None
        while at < len(self.cuts) - 1:
            read = self._read_stage(at, layout)
            if read is None:
                break
            fitting = _fit([each.reader for each in [*run, read]], fixed)
            if fitting is None:
                break
            run.append(read)
            grid, at = fitting, read.end
            if not read.goes_on:
                break
        return run, grid, layout

    def _layout(self, at: int) -> Layout | None:
        """Returns the axes of the first convolution behind a cut; of a dense layer if that comes first."""
        rank = len(self.cuts[at].shape)
        for signal in self.cuts[at + 1 :]:
            for inner in self._between(signal):
                part = self.parts[id(inner)]
                if part.kind == "conv_general_dilated":
                    spec = inner.eqn.params["dimension_numbers"].lhs_spec
                    return Layout(spec[1], tuple(spec[2:])) if len(spec) == rank else None
                if part.kind == "dot_general":
                    return Layout(-1, ()) if rank else None
        return None

    def _between(self, signal: Signal) -> list[Signal]:
        """Returns a cut's own operations, back to the cut before: nearest first."""
        stop = {id(cut) for cut in self.cuts if cut is not signal}
        found, stack, seen = [], [signal], set()
        while stack:
            one = stack.pop()
            if id(one) in stop or id(one) in seen:
                continue
            seen.add(id(one))
            found.append(one)
            stack += self.parts[id(one)].sources
        return found

    def _read_stage(self, at: int, layout: Layout) -> _Read | None:
        """Reads from a cut to the first behind it that ends a stage.

        A linear rest of the network joins its last stage, whose multipliers are then the best for the whole.
        """
        best, diagonals = None, None
        reader = _Reader(self.cuts[at], layout, self.parts, self.dtype)
        for end in range(at + 1, len(self.cuts)):
            try:
                value = reader.read(self.cuts[end])
            except NotAStage:
                break
            if reader.side > _LARGEST_SIDE:
                break
            _, pending, coarse = reader.states[value]
            if reader.strides and not coarse:
                break
            if diagonals is not None:
                if reader.diagonals > diagonals:
                    break
                if end == len(self.cuts) - 1:
                    best = _Read(_frozen(reader), value, end, not pending)
                continue
            best = _Read(_frozen(reader), value, end, not pending)
            if pending and end + 1 < len(self.cuts) and not self._simple(end + 1):
                try:
                    value = reader.whole(self.cuts[end])
                except NotAStage:
                    break
                best = _Read(_frozen(reader), value, end, True)
            if best.goes_on and reader.diagonals:
                diagonals = reader.diagonals
        if best is None or not best.reader.steps:
            return None
        return best

    def _simple(self, n: int) -> bool:
        """Tells whether a cut is made of the one before by an elementwise operation."""
        part = self.parts[id(self.cuts[n])]
        return part.kind in ("slope", "scale", "sum", "same") and part.sources == [self.cuts[n - 1]]

    def _through(self, read: _Read, at: int, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Applies a stage. Returns the grid of its output."""
        reader = read.reader
        stage = reader.stage(grid, read.value)
        product = self._ratio(at, read.end)
        size = (
            math.prod(stage.coarse_grid) * max(stage.side(stage.steps[-1]), 1) ** 2 * 2 * np.dtype(self.dtype).itemsize
        )
        if size > _LARGEST_BYTES:
            self._close(product)
            return stage.coarse_grid
        multipliers = self._multipliers(reader.gains)
        arrays = tuple(reader.arrays)
        if reader.gains:
            last = read.end == len(self.cuts) - 1
            multipliers = search(stage, arrays, multipliers, self.roots, self.dtype, last=last)
        roots, top = certify(stage, arrays, multipliers, self.roots, self.dtype)
        if not isinstance(top, jax.core.Tracer) and not np.isfinite(top):  # smaller multipliers make Q more definite
            multipliers = multipliers / 2
            roots, top = certify(stage, arrays, multipliers, self.roots, self.dtype)
        self._accept([Leg(stage, arrays, self._absolute(stage, multipliers))], roots, top, product)
        return stage.coarse_grid

    def _absolute(self, stage: Stage, multipliers: Any) -> Any:
        """Returns a multiplier for each channel, for an input of the run of length 1."""
        channels = [stage.steps[n].channels for n in stage.diagonals]
        if isinstance(self.gain, jax.core.Tracer) or isinstance(multipliers, jax.core.Tracer):
            return multipliers
        return np.repeat(multipliers, channels) / float(self.gain) ** 2

    def _accept(self, legs: list[Leg], roots: jax.Array, top: jax.Array, product: Number) -> None:
        """Goes on from the roots of a stage's output; or, if they show much more than the product, from that."""
        if not any(isinstance(value, jax.core.Tracer) for value in (top, product)):
            gain = math.sqrt(float(top)) * (1 + 2**-50)
            if 0 < gain < 1.01 * float(product):
                self.gain, self.roots = times(self.gain, gain), roots / gain
                self.legs += legs
            else:
                self._close(product)
            return
        finite = jnp.isfinite(top) & (top > 0)
        gain = jnp.sqrt(jnp.where(finite, top, 1)) * (1 + 4 * jnp.finfo(self.dtype).eps)
        better = finite & (gain < 1.01 * product)
        self.gain = times(self.gain, jnp.where(better, gain, product).astype(self.dtype))
        self.roots = jnp.where(
            better, roots / gain.astype(roots.dtype), jnp.eye(roots.shape[-1], dtype=roots.dtype)[None]
        )

    def _multipliers(self, gains: list[Number]) -> Any:
        """Multipliers to begin with: the best ones for the first diagonal of a chain."""
        if any(isinstance(gain, jax.core.Tracer) for gain in gains):
            gains = [jnp.asarray(gain, self.dtype) for gain in gains]
            return jnp.clip(jax.lax.stop_gradient(1 / jnp.stack(gains) ** 2), 1e-30, 1e30)
        return np.clip(1 / np.maximum(np.asarray(gains, np.float64), 1e-15) ** 2, 1e-30, 1e30)


def _frozen(reader: _Reader) -> _Reader:
    """Returns the reader as it is now."""
    copy = object.__new__(_Reader)
    vars(copy).update({name: list(value) if isinstance(value, list) else value for name, value in vars(reader).items()})
    return copy


def _fit(readers: Sequence[_Reader], fixed: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Finds the first stage's circle such that every stage of a run has one of the right size; None if none is."""
    grid = []
    for axis in range(len(readers[0].layout.spatial)):
        total, least, exact = 1, 1, set()
        for reader in readers:
            strides = reader.stage_strides[axis]
            for coarse, sizes in reader.needs:
                least = max(least, sizes[axis] * total * (strides if coarse else 1))
            for coarse, sizes in reader.exact:
                if (size := sizes[axis]) is not None:
                    exact.add(size * total * (strides if coarse else 1))
            total *= strides
        if fixed is not None:
            exact.add(fixed[axis])
        if len(exact) > 1:
            return None
        m = exact.pop() if exact else -(-least // total) * total
        if m < least or m % total:
            return None
        grid.append(m)
    return tuple(grid)
