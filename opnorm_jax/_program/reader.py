"""Reads what lies between two cuts of a network as a stage of the semidefinite bound (see ``stages.py``)."""

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
from opnorm_jax._program.cuts import NotAStage, Part, coordinates, has_bound
from opnorm_jax._program.movement import HOLE
from opnorm_jax._program.numbers import Number
from opnorm_jax._program.rules import is_signal
from opnorm_jax._program.sdp import Stage, Step
from opnorm_jax._program.signals import Signal


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


class State(NamedTuple):
    """What is known of a value besides its step."""

    image: tuple[int, ...]
    uncropped: bool  # whether something may lie outside of the image, on the circle
    coarse: bool  # whether it lies on the strided grid


DENSE = Layout(-1, ())
"""Of a signal without pixels."""


class Reader:
    """Reads the part of a network between two cuts as a stage."""

    def __init__(self, start: Signal, layout: Layout, parts: dict[int, Part], dtype: Any):
        self.start, self.layout, self.parts, self.dtype = start, layout, parts, dtype
        self.steps: list[Step] = []
        self.arrays: list[jax.Array] = []
        self.gains: list[Number] = []  # of the linear form before each diagonal, by the product's rules
        self.index = {id(start): 0}
        self.states = [State(self._image(start), False, False)]
        self.cropped: dict[int, int] = {}
        self.strides: tuple[int, ...] | None = None
        # On the coarse grid?; the pixels that a circle must have.
        self.needs: list[tuple[bool, tuple[int, ...]]] = [(False, self._image(start))]
        self.exact: list[tuple[bool, tuple[int | None, ...]]] = []  # None where any is right
        self.channels = start.shape[layout.channel]

    @property
    def diagonals(self) -> int:
        """How many diagonals of slopes have been read."""
        return len(self._so_far.diagonals)

    @property
    def side(self) -> int:
        """The side of the matrices that would be factorised."""
        return sum(self._so_far.sides)

    @property
    def _so_far(self) -> Stage:
        """What has been read, as a stage whose circle is not known yet."""
        return self.stage((), len(self.steps))

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
        state = self.states[n]
        if not state.uncropped:
            return n
        if n not in self.cropped:
            step = Step("mask", (n,), signal.shape[self.layout.channel], state.coarse)
            self.gains.append(self._gain(signal))
            self.cropped[n] = self._add(step, state._replace(uncropped=False))
        return self.cropped[n]

    def _gain(self, signal: Signal) -> Number:
        if not has_bound(signal):
            raise NotAStage
        return signal.bound / self.start.bound

    def _common(self, values: Sequence[int]) -> State:
        """Returns the state of a sum or a concatenation."""
        states = [self.states[n] for n in values]
        if len({(state.image, state.coarse) for state in states}) != 1:
            raise NotAStage
        return states[0]._replace(uncropped=any(state.uncropped for state in states))

    def _add(self, step: Step, state: State) -> int:
        self.steps.append(step)
        self.states.append(state)
        return len(self.steps)

    def _numbers(self, value: Any) -> Any:
        """Returns an array in double precision, or in ``self.dtype`` if it is traced."""
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
        places, spatial = coordinates(part.data), self.layout.spatial
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
        state = self._common(sources)
        step = Step("sum", sources, signal.shape[self.layout.channel], state.coarse, signs=part.data)
        return self._add(step, state)

    def _scale(self, signal: Signal, part: Part) -> int:
        source, rank = self.read(part.sources[0]), len(signal.shape)
        factor, divides = part.data
        shape = (1,) * (rank - np.ndim(factor)) + np.shape(factor)
        if any(length > 1 and axis != self.layout.channel % rank for axis, length in enumerate(shape)):
            raise NotAStage
        channels = signal.shape[self.layout.channel]
        factor = self._numbers(factor).reshape(-1)
        factor = (1 / factor if divides else factor) * np.ones(channels, self.dtype)
        step = Step("scale", (source,), channels, self.states[source].coarse, self._array(factor))
        return self._add(step, self.states[source])

    def _concatenate(self, signal: Signal, part: Part) -> int:
        if part.data != self.layout.channel:
            raise NotAStage
        sources = tuple(map(self.read, part.sources))
        state = self._common(sources)
        step = Step("concatenate", sources, signal.shape[self.layout.channel], state.coarse)
        return self._add(step, state)

    def _slope(self, signal: Signal, part: Part) -> int:
        (inner,), (low, high) = part.sources, part.data
        source = self.read(inner)
        image, uncropped, coarse = self.states[source]
        low, high = self._numbers(low), self._numbers(high)
        xp = jnp if isinstance(low + high, jax.core.Tracer) else np
        # What is no whole number may have been rounded to single precision.
        widened = lambda value, sign: xp.where(value % 1 == 0, value, value + sign * 2**-22 * abs(value))
        low, high = widened(low, -1), widened(high, 1)
        if uncropped:  # the crop is a slope of 0
            low, high = xp.minimum(low, 0), xp.maximum(high, 0)
        channels = signal.shape[self.layout.channel]
        self.gains.append(self._gain(inner) * xp.maximum(abs(low), abs(high)))
        interval = xp.stack([low, high])
        step = Step("slope", (source,), channels, coarse, self._array(interval))
        return self._add(step, State(image, False, coarse))

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
        return self._add(step, State(image, False, coarse))

    def _conv_general_dilated(self, signal: Signal, part: Part) -> int:
        (before,), (layer, lows), eqn = part.sources, part.data, signal.eqn
        numbers, conv = eqn.params["dimension_numbers"], layer.conv
        layout = Layout(numbers.lhs_spec[1], tuple(numbers.lhs_spec[2:]))
        if layout != self.layout or numbers.lhs_spec != numbers.out_spec or set(conv.input_dilation) - {1}:
            raise NotAStage
        if set(eqn.params["lhs_dilation"]) - {1}:
            raise NotAStage
        circles = [fill == "CIRCULAR" for fill in fills(conv)]
        kernel = self._numbers(canonical_kernel(layer.kernel, conv))
        groups, (*taps, i, o) = conv.feature_group_count, kernel.shape
        if groups > 1:
            own = np.eye(groups, dtype=kernel.dtype).reshape(*[1] * len(taps), groups, 1, groups, 1)
            kernel = (own * kernel.reshape(*taps, 1, i, groups, o // groups)).reshape(*taps, groups * i, o)
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
            # The image, the padding before it, what the last output reads, and all outputs.
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
        return self._add(step, State(out, masked, coarse or strided))

    @property
    def stage_strides(self) -> tuple[int, ...]:
        return self.strides or (1,) * len(self.layout.spatial)

    def stage(self, grid: tuple[int, ...], end: int) -> Stage:
        """Returns the stage on a circle, whose output is the value of a number."""
        steps = self.steps
        if end != len(steps):  # the output must be the last
            step = Step(
                "sum", (end,), steps[end - 1].channels if end else self.channels, self.states[end].coarse, signs=(1,)
            )
            steps = [*steps, step]
        return Stage(self.channels, tuple(steps), grid, self.stage_strides)


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
