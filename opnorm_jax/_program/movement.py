"""Operations that only move numbers: for every element of a result, which element of its sources it is.

Slices, pads, concatenations, gathers, reshapes and the like change no number. So instead of one theorem per operation
there is one account for all of them: the operation is run on integers, and the result says for each element where it
comes from, or that it is a constant. Two things follow exactly. The norm of a chain of such operations is the root of
the largest number of copies of one element. And what padding an image has can be read off, whatever wrote it.

The common operations act along one axis at a time. For them an :class:`ElementMap` stores one short vector per axis:
the flat index of an element is the sum of its entries. Other operations are run by jax on an array of integers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from opnorm_jax._program.jaxpr import open_jaxpr

HOLE = -(2**48)
"""The entry of a constant element. Sums with it stay far below zero."""

_LARGEST_TABLE = 2**26
"""Elements of the largest array of integers that is worked on; larger ones are not understood."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """An array whose elements are followed; two sources are never the same array.

    A concatenation is a new source, unless an element occurs in it twice. Sources are compared by identity.
    """

    shape: tuple[int, ...]
    joined: frozenset[Source] = frozenset()  # from these
    seam: int | None = None  # along this axis
    owner: Any = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ElementMap:
    """Which source element each element of an array is.

    The sources' elements are numbered one source after the other, each in row-major order. An element's number is the
    sum of its entries in ``axes``; it is a constant where the sum is negative. If no such sum exists, ``axes`` is None
    and ``table`` holds the numbers themselves.
    """

    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    axes: tuple[np.ndarray, ...] | None
    table: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """Returns the number of every element, negative for constants."""
        if self.axes is None:
            assert self.table is not None
            return self.table
        if math.prod(self.shape) > _LARGEST_TABLE:
            raise NotUnderstood(f"moves an array of shape {self.shape} in a way that is too large to follow")
        out = np.zeros((), np.int64)
        for entries in self.axes:
            out = out[..., None] + entries
        return out

    @functools.cached_property
    def copies(self) -> tuple[int, ...]:
        """For each source, the largest number of times that one of its elements occurs."""
        if len(self.sources) == 1 and self.axes is not None and self.is_independent:
            counts = [np.unique(entries[entries > HOLE // 2], return_counts=True)[1] for entries in self.axes]
            return (math.prod(int(count.max(initial=0)) for count in counts),)
        numbers = self.numbers()
        counts = np.bincount(numbers[numbers >= 0].ravel(), minlength=sum(source.size for source in self.sources))
        ends = np.cumsum([source.size for source in self.sources])
        return tuple(int(part.max(initial=0)) for part in np.split(counts, ends[:-1]))

    @functools.cached_property
    def is_independent(self) -> bool:
        """Whether different entries always give different numbers: True only if that is sure."""
        assert self.axes is not None
        reach = 0
        for step, span in sorted(digit for entries in self.axes for digit in _digits(entries)):
            if step <= reach:
                return False
            reach += span
        return True

    @property
    def is_injective(self) -> bool:
        """Whether every element is one of the sources', and none of them twice."""
        return max(self.copies) <= 1 and not self.has_holes

    @property
    def has_holes(self) -> bool:
        """Whether an element is a constant."""
        lines = self.numbers().ravel() if self.axes is None else np.concatenate(self.axes)
        return bool((lines <= HOLE // 2).any())


def _digits(entries: np.ndarray) -> list[tuple[int, int]]:
    """Writes different entries as all sums of multiples, like a number's digits; returns each digit's step and span."""
    left, digits = np.unique(entries[entries > HOLE // 2]), []
    while len(left) > 1:
        gaps = np.diff(left)
        run = int(np.argmax(gaps != gaps[0])) + 1 if (gaps != gaps[0]).any() else len(left)
        if len(left) % run or (left.reshape(-1, run) != left[::run, None] + gaps[0] * np.arange(run)).any():
            return [*digits, (int(gaps.min()), int(np.ptp(left)))]
        digits.append((int(gaps[0]), int(gaps[0]) * (run - 1)))
        left = left[::run]
    return digits


class NotUnderstood(ValueError):
    """Says how numbers were moved that cannot be followed."""


def identity(source: Source) -> ElementMap:
    """Returns the map of a source onto itself."""
    steps = np.cumprod([1, *source.shape[:0:-1]])[::-1] if source.shape else []
    axes = tuple(np.arange(length) * step for length, step in zip(source.shape, steps))
    return ElementMap((source,), source.shape, axes or None, None if axes else np.zeros((), np.int64))


def row(elements: ElementMap, n: int) -> ElementMap:
    """Returns the map of one row along the leading axis."""
    if elements.axes is None or len(elements.axes) == 1:
        table = np.asarray(elements.numbers()[n])
        return ElementMap(elements.sources, table.shape, None, table)
    first, second, *rest = elements.axes
    return of_axes(elements, [_added(second, int(first[n])), *rest])


def of_table(sources: tuple[Source, ...], table: np.ndarray) -> ElementMap:
    """Returns the map of an array of elements' numbers, axis by axis if it is a sum of one vector for each."""
    return ElementMap(sources, table.shape, split_by_axis(table) or None, table)


def stack(rows: Sequence[ElementMap | None], shape: tuple[int, ...]) -> ElementMap:
    """Returns the map of rows stacked along a new leading axis; None is a row of constants."""
    parts = with_common_sources(rows)
    table = np.stack([np.full(shape, HOLE) if part is None else part.numbers() for part in parts])
    given = next(part for part in parts if part is not None)
    return of_table(given.sources, table)


def moved(
    eqn: Any,
    parts: Sequence[ElementMap | None],
    value: Callable[[int], np.ndarray | None],
    *,
    shifted: bool = False,
):
    """Returns the maps of an equation's results, or None if the equation does more than move numbers.

    Args:
      eqn: the equation.
      parts: the map of each operand, None for one that is a constant.
      value: gives the value of a constant operand by its position, None if it is not known.
      shifted: whether numbers may be added to constants on the way, so that their changes alone are moved.
    """
    name = eqn.primitive.name
    if name not in MOVES or not is_plain(eqn) or all(math.prod(v.aval.shape) == 0 for v in eqn.outvars):
        return None
    parts = with_common_sources([part if math.prod(v.aval.shape) else None for part, v in zip(parts, eqn.invars)])
    data = [part for n, part in enumerate(parts) if n not in control_operands(name, len(parts))]
    controls = [parts[n] for n in control_operands(name, len(parts))]
    if any(part is not None for part in controls) or all(part is None for part in data):
        return None  # where the numbers go depends on the input
    if name == "scatter-add" and not shifted:
        is_zero = lambda n: (known := value(n)) is not None and not known.any()
        adds = [is_zero(n) if part is None else not part.has_holes for n, part in zip((0, 2), data, strict=True)]
        if not all(adds):
            return None
    if name == "reduce_sum" and any(eqn.invars[0].aval.shape[n] != 1 for n in eqn.params["axes"]):
        return None
    if name in _BY_AXIS and all(part is None or part.axes is not None for part in parts):
        found = _BY_AXIS[name](eqn, parts, value)
        if found is not None:
            return found
    return _by_integers(eqn, parts, value)


def is_plain(eqn: Any) -> bool:
    """Tells whether a ``scatter`` puts its updates in place as they are; True of every other operation."""
    program = open_jaxpr(eqn.params.get("update_jaxpr"))
    return eqn.primitive.name != "scatter" or program is None or list(program.outvars) == [program.invars[1]]


def control_operands(name: str, count: int) -> range:
    """Returns the positions of the operands that say where numbers go."""
    if name == "select_n":
        return range(1)
    first = {"dynamic_slice": 1, "dynamic_update_slice": 2, "gather": 1, "scatter": 1, "scatter-add": 1}
    stop = 2 if name.startswith("scatter") else count
    return range(first.get(name, count), stop)


def with_common_sources(parts: Sequence[ElementMap | None]) -> list[ElementMap | None]:
    """Renumbers the maps so that all have the same sources."""
    given = [part for part in parts if part is not None]
    sources = tuple(dict.fromkeys(source for part in given for source in part.sources))
    if all(part.sources == sources for part in given):
        return list(parts)
    starts = dict(zip(sources, np.cumsum([0, *(source.size for source in sources)]).tolist()))
    out: list[ElementMap | None] = []
    for part in parts:
        if part is None or part.sources == sources:
            out.append(part)
        elif len(part.sources) == 1 and part.axes:
            first, *rest = part.axes
            shifted = np.where(first > HOLE // 2, first + starts[part.sources[0]], HOLE)
            out.append(dataclasses.replace(part, sources=sources, axes=(shifted, *rest)))
        else:
            ends = np.cumsum([source.size for source in part.sources])
            shifts = np.array([starts[s] for s in part.sources]) - np.array([0, *ends[:-1]])
            numbers = part.numbers()
            owner = np.minimum(np.searchsorted(ends, numbers, side="right"), len(ends) - 1)
            table = np.where(numbers >= 0, numbers + shifts[owner], HOLE)
            out.append(ElementMap(sources, part.shape, None, table))
    return out


# Axis by axis. Each function returns the list of the results' maps, or None where only integers can tell.


def of_axes(like: ElementMap, axes: Sequence[np.ndarray]) -> ElementMap:
    """Returns a map of the same sources with these axes."""
    return ElementMap(like.sources, tuple(len(entries) for entries in axes), tuple(axes))


def _reshape(eqn: Any, parts: Any, value: Any) -> list[ElementMap] | None:
    (part, *_), new = parts, eqn.outvars[0].aval.shape
    axes = [part.axes[n] for n in eqn.params["dimensions"]] if eqn.params.get("dimensions") else list(part.axes)
    return _regrouped(part, axes, new)


def _regrouped(part: ElementMap, axes: list[np.ndarray], new: tuple[int, ...]) -> list[ElementMap] | None:
    """Returns the map of a row-major reshape: neighbouring axes are merged and split until their lengths agree."""
    if not new:
        return None
    out, start = [], 0
    old, wanted = list(axes), list(new)
    while old or wanted[start:]:
        group, lengths = [], []
        while True:
            have, want = math.prod(map(len, group)), math.prod(lengths)
            if (group and lengths and have == want) or not (old or wanted[start:]):
                break
            if old and (have <= want or not wanted[start:]):
                group.append(old.pop(0))
            else:
                lengths.append(wanted[start])
                start += 1
        if [len(entries) for entries in group] == lengths:
            out += group
            continue
        merged = np.zeros(1, np.int64)
        for entries in group:
            merged = (merged[:, None] + entries).ravel()
        if not lengths:  # axes of length 1 went at the end: their entries join the last axis that stays
            out[-1] = _added(out[-1], int(merged[0]))
            continue
        split = split_by_axis(np.where(merged > HOLE // 2, merged, HOLE).reshape(lengths))
        if split is None:
            return None
        out += split
    return [of_axes(part, out)]


def _added(entries: np.ndarray, amount: int) -> np.ndarray:
    return np.where(entries > HOLE // 2, entries + amount, HOLE) if amount > HOLE // 2 else np.full_like(entries, HOLE)


def split_by_axis(numbers: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Writes an array of numbers as a sum of one vector per axis, or returns None if it is no such sum."""
    if numbers.ndim == 0:
        return ()
    valid = numbers > HOLE // 2
    if not valid.any():
        return tuple(np.full(n, HOLE) if a == 0 else np.zeros(n, np.int64) for a, n in enumerate(numbers.shape))
    others = lambda a: tuple(b for b in range(numbers.ndim) if b != a)
    present = [valid.any(axis=others(a)) for a in range(numbers.ndim)]
    at = tuple(int(np.argmax(kept)) for kept in present)
    if not np.array_equal(valid, functools.reduce(np.multiply.outer, present)):
        return None
    vectors = []
    for a, kept in enumerate(present):
        line = numbers[(*at[:a], slice(None), *at[a + 1 :])]
        vectors.append(np.where(kept, line - (numbers[at] if a else 0), HOLE))
    total = functools.reduce(np.add.outer, vectors)
    return tuple(vectors) if np.array_equal(total[valid], numbers[valid]) else None


def _broadcast(eqn: Any, parts: Any, value: Any) -> list[ElementMap] | None:
    (part, *_), shape = parts, eqn.outvars[0].aval.shape
    axes = [np.zeros(length, np.int64) for length in shape]
    for axis, entries in zip(eqn.params["broadcast_dimensions"], part.axes, strict=True):
        axes[axis] = np.broadcast_to(entries, shape[axis])
    return [of_axes(part, axes)]


def _transpose(eqn: Any, parts: Any, value: Any) -> list[ElementMap]:
    return [of_axes(parts[0], [parts[0].axes[n] for n in eqn.params["permutation"]])]


def _squeeze(eqn: Any, parts: Any, value: Any) -> list[ElementMap] | None:
    return _regrouped(parts[0], list(parts[0].axes), eqn.outvars[0].aval.shape)


def _picked(part: ElementMap, slices: Sequence[slice]) -> ElementMap:
    return of_axes(part, [entries[chosen] for entries, chosen in zip(part.axes, slices, strict=True)])  # type: ignore[arg-type]


def _slice(eqn: Any, parts: Any, value: Any) -> list[ElementMap]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(starts)
    return [_picked(parts[0], [slice(*ends) for ends in zip(starts, limits, steps, strict=True)])]


def _split(eqn: Any, parts: Any, value: Any) -> list[ElementMap]:
    (part, *_), axis = parts, eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    pieces = zip(ends - eqn.params["sizes"], ends)
    every = [slice(None)] * len(part.shape)
    return [_picked(part, [*every[:axis], slice(*ends), *every[axis + 1 :]]) for ends in pieces]


def _reversed(eqn: Any, parts: Any, value: Any) -> list[ElementMap]:
    turned = eqn.params["dimensions"]
    return [_picked(parts[0], [slice(None, None, -1 if n in turned else 1) for n in range(len(parts[0].shape))])]


def _dynamic_slice(eqn: Any, parts: Any, value: Any) -> list[ElementMap] | None:
    starts = [value(n) for n in range(1, len(eqn.invars))]
    if any(start is None for start in starts):
        return None
    sizes, shape = eqn.params["slice_sizes"], parts[0].shape
    starts = [min(max(int(s), 0), n - size) for s, n, size in zip(starts, shape, sizes, strict=True)]  # type: ignore[arg-type]
    return [_picked(parts[0], [slice(s, s + size) for s, size in zip(starts, sizes, strict=True)])]


def _pad(eqn: Any, parts: Any, value: Any) -> list[ElementMap] | None:
    part, fill = parts
    if part is None or fill is not None:
        return None
    axes = []
    for entries, (low, high, interior) in zip(part.axes, eqn.params["padding_config"], strict=True):
        spread = np.full(len(entries) + interior * (len(entries) - 1), HOLE)
        spread[:: interior + 1] = entries
        spread = np.pad(spread, (max(low, 0), max(high, 0)), constant_values=HOLE)
        axes.append(spread[max(-low, 0) : len(spread) - max(-high, 0)])
    return [of_axes(part, axes)]


def _concatenate(eqn: Any, parts: Any, value: Any) -> list[ElementMap] | None:
    """Joins parts of the same map, and constants, along one axis; what differs between parts must lie on that axis."""
    along = eqn.params["dimension"]
    first = next(part for part in parts if part is not None)
    rank = range(len(first.shape))
    pieces, common = [], None
    for part, operand in zip(parts, eqn.invars, strict=True):
        if part is None:
            pieces.append(np.full(operand.aval.shape[along], HOLE))
            continue
        bases = [int(entries[entries > HOLE // 2][0]) if (entries > HOLE // 2).any() else None for entries in part.axes]
        if None in bases:
            return None
        others = [_added(part.axes[n], -bases[n]) for n in rank if n != along]  # type: ignore[operator]
        if common is not None and not all(map(np.array_equal, common, others)):
            return None
        common = others
        pieces.append(_added(part.axes[along], sum(bases) - bases[along]))  # type: ignore[arg-type, operator]
    axes = list(common)  # type: ignore[arg-type]
    axes.insert(along, np.concatenate(pieces))
    return [of_axes(first, axes)]


def _tile(eqn: Any, parts: Any, value: Any) -> list[ElementMap]:
    return [of_axes(parts[0], [np.tile(entries, reps) for entries, reps in zip(parts[0].axes, eqn.params["reps"])])]


_BY_AXIS: dict[str, Callable[..., list[ElementMap] | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "reduce_sum": _squeeze,
    "reshape": _reshape,
    "rev": _reversed,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "tile": _tile,
    "transpose": _transpose,
}

MOVES = frozenset(_BY_AXIS) | {
    "dynamic_update_slice",
    "gather",
    "scatter",
    "scatter-add",
    "select_n",
    "stack",
    "unstack",
}
"""Names of the operations that may be nothing but movement."""


def _by_integers(eqn: Any, parts: Sequence[ElementMap | None], value: Callable[[int], Any]) -> list[ElementMap] | None:
    """Runs the equation on the numbers of its operands' elements, plus one; a constant is zero."""
    given = next(part for part in parts if part is not None)
    sizes = [math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars)]
    if max(sizes) > _LARGEST_TABLE or sum(source.size for source in given.sources) >= 2**31 - 1:
        raise NotUnderstood(f"{eqn.primitive.name} on {eqn.invars[0].aval.shape} is too large to follow")
    operands = []
    for n, (part, v) in enumerate(zip(parts, eqn.invars, strict=True)):
        if n in control_operands(eqn.primitive.name, len(parts)):
            if (known := value(n)) is None:
                return None
            operands.append(known)
        elif part is None:
            operands.append(np.zeros(v.aval.shape, np.int32))
        else:
            operands.append(_from_one(part))
    with jax.ensure_compile_time_eval():
        if eqn.primitive.name == "scatter-add":
            counts = [np.int32(operand > 0) if n != 1 else operand for n, operand in enumerate(operands)]
            if np.max(run_on(eqn, counts)[0], initial=0) > 1:
                return None  # it adds numbers
        outs = run_on(eqn, operands)
    return [_to_map(given.sources, out) for out in outs]


def _from_one(part: ElementMap) -> np.ndarray:
    """Returns the numbers of all elements, counted from one; a constant is zero."""
    return (np.maximum(part.numbers(), -1) + 1).astype(np.int32)


def _to_map(sources: tuple[Source, ...], counted: Any) -> ElementMap:
    """Returns the map of an array of such numbers."""
    numbers = np.asarray(counted, np.int64) - 1
    return of_table(sources, np.where(numbers >= 0, numbers, HOLE))


def cut_out(eqn: Any, part: ElementMap, kernel: np.ndarray) -> ElementMap | None:
    """Returns the map of a convolution that copies pixels, as one that cuts out patches does; None of any other."""
    axis = eqn.params["dimension_numbers"].rhs_spec[0]
    of_outputs = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    if not np.isin(kernel, (0, 1)).all() or (np.count_nonzero(of_outputs, axis=1) > 1).any():
        return None
    if max(math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars)) > _LARGEST_TABLE:
        raise NotUnderstood("its input was cut out of an array that is too large to follow")
    params = {**eqn.params, "preferred_element_type": None}
    with jax.ensure_compile_time_eval():
        out = eqn.primitive.bind(jnp.asarray(_from_one(part)), jnp.asarray(kernel.astype(np.int32)), **params)
    return _to_map(part.sources, out)


def run_on(eqn: Any, operands: list[Any]) -> list[Any]:
    """Evaluates an equation that moves numbers on operands of any dtype, whichever it was traced for."""
    name, params = eqn.primitive.name, eqn.params
    operands = [jnp.asarray(operand) for operand in operands]
    if name == "gather":
        numbers, sizes, mode = params["dimension_numbers"], params["slice_sizes"], params["mode"]
        return [lax.gather(operands[0], operands[1], numbers, sizes, mode=mode, fill_value=0)]
    if name.startswith("scatter"):
        function = lax.scatter_add if name == "scatter-add" else lax.scatter
        array, indices, updates = operands
        return [function(array, indices, updates, params["dimension_numbers"], mode=params["mode"])]
    outs = eqn.primitive.bind(*operands, **params)
    return outs if eqn.primitive.multiple_results else [outs]
