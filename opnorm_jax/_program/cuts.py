"""Finds where a network can be cut, and what the operations between the cuts are (see ``stages.py``).

Every path from the input to the output goes through certain signals, one after the other: the *cuts*.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from opnorm_jax._program import slopes
from opnorm_jax._program.movement import MOVES, NotUnderstood, identity
from opnorm_jax._program.rules import Refused, is_signal
from opnorm_jax._program.signals import Signal


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
    parts: dict[int, Part] = {}
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
    # Sources come before what is made of them. A signal's dominators are those common to its sources, and itself. Of
    # two sources the later one is replaced by its own nearest dominator, until both are the same (Cooper, Harvey and
    # Kennedy, 2001). The input is its own.
    number = {id(signal): n for n, signal in enumerate(order)}
    dominator: list[int] = []  # the nearest of each
    for n, signal in enumerate(order):
        nearest = n
        for k, source in enumerate(parts[id(signal)].sources):
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
    return [order[n] for n in reversed(chain) if has_bound(order[n])], parts


def has_bound(signal: Signal) -> bool:
    """Tells whether the product's rules bound a signal: the exponentials inside of a softmax, say, they do not."""
    try:
        return signal.bound is not None
    except Refused:
        return False


def _part(signal: Signal, x: Signal) -> Part:
    """Reads a signal as an operation of a stage, or as one that none describes."""
    eqn = signal.eqn
    if eqn is None:
        owners = [source.owner for source in signal.elements.sources]
        if signal.compute is not None or (signal in owners and not signal.ins):
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
