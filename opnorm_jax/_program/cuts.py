"""Finds where a network can be cut, and what the operations between the cuts are (see ``stages.py``).

Every path from the input to the output goes through certain signals, one after the other: the *cuts*. The same holds of
the product's own way: its bound on the output is computed from that on each cut. So the quotient of the bounds on two
cuts is a bound on what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opnorm_jax._geometry import fills
from opnorm_jax._program import slopes
from opnorm_jax._program.jaxpr import is_real
from opnorm_jax._program.movement import HOLE, MOVES, ElementMap, NotUnderstood, identity
from opnorm_jax._program.rules import Refused, is_signal
from opnorm_jax._program.signals import Layer, Signal, layer_alone


class NotAStage(Exception):
    """Part of a network that no stage describes."""


class Part(NamedTuple):
    """What a signal is made of.

    ``Reader`` reads each kind by a method of that name. ``input``, ``unknown`` and ``total`` (a sum) have none.
    """

    kind: str
    sources: list[Signal]
    data: Any = None  # slopes, signs, a factor, axes, an equation, a layer: see _part


def find_cuts(x: Signal, out: Signal) -> tuple[list[Signal], dict[int, Part]] | None:
    """Finds the signals through which every path from ``x`` to ``out`` goes, in order; None if a path is not known.

    Returns with them what every signal on those paths is made of, by its ``id``.
    """
    parts: dict[int, Part] = {id(x): Part("input", [])}

    def sources(signal: Signal) -> list[Signal]:
        if id(signal) not in parts:
            parts[id(signal)] = _part(signal, x)
        return parts[id(signal)].sources

    try:
        order = _sources_first(out, sources)
    except NotAStage:
        return None
    if any(signal is not x and not parts[id(signal)].sources for signal in order):
        return None
    product = {id(x)}  # the signals whose bounds depend on that of the input
    for signal in (used := _sources_first(out, lambda signal: signal.used)):
        if any(id(other) in product for other in signal.used):
            product.add(id(signal))
    if id(out) not in product:
        return None
    of_product = lambda signal: [other for other in signal.used if id(other) in product]
    used = [signal for signal in used if id(signal) in product]
    common = set(map(id, _dominators(used, of_product)))
    return [signal for signal in _dominators(order, sources) if id(signal) in common], parts


def _sources_first(out: Signal, sources: Callable[[Signal], Sequence[Signal]]) -> list[Signal]:
    """Returns all that a signal is made of, and itself, each behind its own sources."""
    order, done, stack = [], set(), [(out, False)]
    while stack:
        signal, finished = stack.pop()
        if finished:
            order.append(signal)
        elif id(signal) not in done:
            done.add(id(signal))
            stack.append((signal, True))
            stack += [(source, False) for source in sources(signal) if id(source) not in done]
    return order


def _dominators(order: Sequence[Signal], sources: Callable[[Signal], Sequence[Signal]]) -> list[Signal]:
    """Returns the signals through which all paths to the last one go, in order.

    A signal's dominators are those common to its sources, and itself. Of two sources the later one is replaced by its
    own nearest dominator, until both are the same (Cooper, Harvey and Kennedy, 2001). The input is its own.
    """
    number = {id(signal): n for n, signal in enumerate(order)}
    dominator: list[int] = []  # the nearest of each
    for n, signal in enumerate(order):
        nearest = n
        for k, source in enumerate(sources(signal)):
            other = number[id(source)]
            if k == 0:
                nearest = other
            while nearest != other:
                if nearest > other:
                    nearest = dominator[nearest]
                else:
                    other = dominator[other]
        dominator.append(nearest)
    chain = [len(order) - 1]
    while dominator[chain[-1]] != chain[-1]:
        chain.append(dominator[chain[-1]])
    return [order[n] for n in reversed(chain)]


def has_bound(signal: Signal) -> bool:
    """Tells whether the product's rules bound a signal: the exponentials inside of a softmax, say, they do not."""
    try:
        return signal.bound is not None
    except Refused:
        return False


def _part(signal: Signal, x: Signal) -> Part:
    """Reads a signal as an operation of a stage, or as one that none describes."""
    eqn = signal.eqn
    signals = [value for value in signal.ins if is_signal(value)]
    if eqn is None:
        owners = [source.owner for source in signal.elements.sources]
        if not signals and (signal.compute is not None or signal in owners):
            raise NotAStage
        return Part("unknown", signals or owners)
    name = eqn.primitive.name
    if not is_real(eqn):
        return Part("unknown", signals)
    if name == "conv_general_dilated" and signal.layer is not None:
        # If a filter does not describe how the input was moved before, that is an operation by itself.
        lows = _lows(eqn, layer := signal.layer)
        if lows is None:
            try:
                lows = _lows(eqn, layer := layer_alone(eqn, *signal.ins))
            except ValueError:
                pass
        return Part("unknown", signals) if lows is None else Part(name, [layer.before], (layer, lows))
    if name == "dot_general" and signal.layer is not None:
        return Part(name, [signal.layer.before], signal.layer)
    alike = all(value.shape == signal.shape for value in signals)
    if (found := slopes.interval(signal)) is not None:
        inner, low, high = found
        return Part("slope", [inner], (low, high))
    if name in ("add", "add_any", "sub") and alike:
        signs = (1, -1 if name == "sub" else 1)
        return Part("sum", signals, tuple(s for s, value in zip(signs, signal.ins) if is_signal(value)))
    if name == "neg":
        return Part("sum", signals, (-1,))
    scales = name == "mul" or (name == "div" and is_signal(signal.ins[0]))
    if scales and alike and len(signals) == 1:
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


def _lows(eqn: Any, layer: Layer) -> list[int] | None:
    """Returns the pixels of padding at the low end of each axis of a convolution, as it moves over ``layer.before``.

    None if its operand is anything but that signal, whole and in its order, with zeros or a circle's copies around.
    """
    assert layer.image is not None
    try:
        places = coordinates(layer.image)
    except NotAStage:
        return None
    shape, (batch, channel, *spatial) = layer.before.shape, eqn.params["dimension_numbers"].lhs_spec
    if not all(np.array_equal(places[axis], np.arange(shape[axis])) for axis in (batch, channel)):
        return None
    lows = []
    for n, (axis, fill) in enumerate(zip(spatial, fills(layer.conv), strict=True)):
        entries, length = places[axis], shape[axis]
        turns = np.arange(len(entries)) - int(np.argmax(entries == 0))
        whole = np.where((turns >= 0) & (turns < length), turns, HOLE)
        expected = turns % length if fill == "CIRCULAR" else whole
        if layer.conv.input_shape[n] != length or not np.array_equal(entries, expected):
            return None
        lows.append(eqn.params["padding"][n][0] - int(turns[0]))
    return lows


def coordinates(elements: ElementMap) -> list[np.ndarray]:
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
    """Returns the signal that all elements but constants come from, the input or an operation's result; else None."""
    if len(signal.elements.sources) != 1:
        return None
    owner = signal.elements.sources[0].owner
    return owner if owner is not signal and (owner is x or owner.eqn is not None) else None
