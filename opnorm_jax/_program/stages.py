"""Carries the semidefinite bound through a network, stage after stage (see ``sdp.py``).

Between two cuts of the network (``cuts.py``), or over several, it is read as a stage (``reader.py``). Where that cannot
be done, the bound is multiplied by what the rules of ``rules.py`` say of that part, and begins anew behind it. So it is
never above the product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._program.cuts import NotAStage, Part, find_cuts
from opnorm_jax._program.joint import Leg, improved
from opnorm_jax._program.numbers import Number, times
from opnorm_jax._program.reader import DENSE, Layout, Reader
from opnorm_jax._program.sdp import Stage, Step, certify, search, summed
from opnorm_jax._program.signals import Signal

_LARGEST_SIDE = 2048
"""A matrix that is factorised has so many rows at most; a larger stage is left to the product."""

_LARGEST_BYTES = 2**30
"""The roots that are carried from stage to stage take so many bytes at most."""

_LAYERS = ("conv_general_dilated", "dot_general")

_WORTH_CARRYING = 1.01
"""Roots that show at most so many times the product's gain are kept: later stages may make up for it."""


def semidefinite_bound(x: Signal, out: Signal, dtype: Any) -> Number | None:
    """Returns a bound on the output's change, over the input's; None where the program cannot be cut."""
    if not isinstance(out.bound, jax.core.Tracer) and not 0 < float(out.bound) < math.inf:
        return None
    found = find_cuts(x, out)
    return None if found is None else _Carrier(*found, dtype).run()


class _Read(NamedTuple):
    """A stage that was read: up to which cut, and whether its output is cropped, so that another may follow."""

    reader: Reader
    value: int
    end: int
    goes_on: bool


class _Carrier:
    """Carries the bound along the cuts."""

    def __init__(self, cuts: list[Signal], parts: dict[int, Part], dtype: Any):
        self.cuts, self.parts, self.dtype = cuts, parts, dtype
        self.layers = self._next_layers()
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
            if part.sources == [self.cuts[at]] and _is_summed(signal, part, layout):
                image = tuple(self.cuts[at].shape[axis] for axis in layout.spatial)
                root = summed(self.roots, image, self.grid, self.dtype)
                channels = root.shape[-1]
                stage = Stage(channels, (Step("sum", (0,), channels, signs=(1,)),), (), ())
                legs = [Leg(None, image=image, grid=self.grid), Leg(stage)]
                self._accept(legs, *certify(stage, (), np.zeros(0), root, self.dtype), self._ratio(at, at + 1))
                self.grid = ()
                return at + 1, DENSE
        if self.roots is not None:  # another circle may fit where this one does not
            self._close()
            return at, None
        self._close(self._ratio(at, at + 1))
        return at + 1, None

    def _ratio(self, start: int, end: int) -> Number:
        """Returns what the product's rules say from one cut to another."""
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
        rank, layer = len(self.cuts[at].shape), self.layers[at]
        if layer is None:
            return None
        if self.parts[id(layer)].kind == "dot_general":
            return DENSE if rank else None
        spec = layer.eqn.params["dimension_numbers"].lhs_spec
        return Layout(spec[1], tuple(spec[2:])) if len(spec) == rank else None

    def _next_layers(self) -> list[Signal | None]:
        """Returns the first convolution or dense layer behind each cut."""
        stop, following = set(map(id, self.cuts)), None
        found = []
        for signal in reversed(self.cuts):
            found.append(following)
            own = (one for one in self._between(signal, stop) if self.parts[id(one)].kind in _LAYERS)
            following = next(own, following)
        return found[::-1]

    def _between(self, signal: Signal, stop: set[int]) -> list[Signal]:
        """Returns a cut's own operations, back to the cut before: nearest first."""
        found, stack, seen = [], [signal], set()
        while stack:
            one = stack.pop()
            if (id(one) in stop and one is not signal) or id(one) in seen:
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
        reader = Reader(self.cuts[at], layout, self.parts, self.dtype)
        for end in range(at + 1, len(self.cuts)):
            try:
                value = reader.read(self.cuts[end])
            except NotAStage:
                break
            if reader.side > _LARGEST_SIDE:
                break
            _, uncropped, coarse = reader.states[value]
            if reader.strides and not coarse:
                break
            if diagonals is not None:
                if reader.diagonals > diagonals:
                    break
                if end == len(self.cuts) - 1:
                    best = _Read(_frozen(reader), value, end, not uncropped)
                continue
            best = _Read(_frozen(reader), value, end, not uncropped)
            if uncropped and end + 1 < len(self.cuts) and not self._simple(end + 1):
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
        """Carries the bound through a stage. Returns the grid of its output."""
        reader = read.reader
        stage = reader.stage(grid, read.value)
        product = self._ratio(at, read.end)
        numbers = 2 * math.prod(stage.coarse_grid) * max(stage.side(stage.steps[-1]), 1) ** 2  # real and imaginary
        if numbers * np.dtype(self.dtype).itemsize > _LARGEST_BYTES:
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
            if 0 < gain < _WORTH_CARRYING * float(product):
                self.gain, self.roots = times(self.gain, gain), roots / gain
                self.legs += legs
            else:
                self._close(product)
            return
        finite = jnp.isfinite(top) & (top > 0)
        gain = jnp.sqrt(jnp.where(finite, top, 1)) * (1 + 4 * jnp.finfo(self.dtype).eps)
        better = finite & (gain < _WORTH_CARRYING * product)
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


def _is_summed(signal: Signal, part: Part, layout: Layout) -> bool:
    """Tells whether a signal is the sum over all pixels, with its channels last."""
    shape = part.sources[0].shape
    if part.kind == "total":
        kept = [axis for axis in range(len(shape)) if axis not in part.data]
        return set(part.data) == set(layout.spatial) and kept[-1] == layout.channel
    if part.kind == "pool" and math.prod(signal.shape[n] for n in layout.spatial) == 1:
        params = part.data.params
        whole = tuple(n if axis in layout.spatial else 1 for axis, n in enumerate(shape))
        unpadded = not any(map(any, params["padding"]))
        spread = {*(params.get("base_dilation") or (1,)), *(params.get("window_dilation") or (1,))} != {1}
        is_whole = tuple(params["window_dimensions"]) == whole and unpadded and not spread
        return is_whole and layout.channel == len(shape) - 1
    return False


def _frozen(reader: Reader) -> Reader:
    """Returns the reader as it is now. What its dictionaries will hold besides does not matter to it."""
    frozen = copy.copy(reader)
    vars(frozen).update({name: list(value) for name, value in vars(reader).items() if isinstance(value, list)})
    return frozen


def _fit(readers: Sequence[Reader], fixed: tuple[int, ...] | None) -> tuple[int, ...] | None:
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
