"""Ranges: the numbers between which a signal lies, whatever the input is.

A product of two signals changes by a bounded multiple of their changes only where both are bounded themselves, as the
two halves of a gated unit are: tanh of one map times the logistic function of another. So ranges are followed through
the elementwise operations, through sums, and through operations that only move numbers. Convolutions and products with
matrices have no range here. Ranges are of real arithmetic; each operation widens them by more than its own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._program.jaxpr import is_real

Range = tuple[float, float]
"""The lowest and the highest number."""

EVERYTHING: Range = (-math.inf, math.inf)

ACTIVATION_RANGES: dict[str, Range] = {"hard_tanh": (-1.0, 1.0), "soft_sign": (-1.0, 1.0)}
"""Ranges of the functions that ``slopes.py`` recognises, where the rules here would not find them."""

_FUNCTIONS: dict[str, Range] = {
    "atan": (-1.5707964, 1.5707964),
    "cos": (-1.0, 1.0),
    "erf": (-1.0, 1.0),
    "erfc": (0.0, 2.0),
    "logistic": (0.0, 1.0),
    "sin": (-1.0, 1.0),
    "tanh": (-1.0, 1.0),
}
_UNCHANGED = """broadcast_in_dim copy cummax cummin dynamic_slice reduce_max reduce_min reshape rev slice split squeeze
tile transpose unstack""".split()
"""Operations whose results are among the numbers of their first operand."""


def range_of(signal: Any) -> Range:
    """Returns the range of a signal's numbers, from the operation that made it; everything where that is not known."""
    eqn, ins = signal.eqn, signal.ins
    if eqn is None:
        return EVERYTHING
    name = eqn.primitive.name
    if not is_real(eqn):
        return EVERYTHING
    if name == "mul" and ins[0] is ins[1]:
        name, ins = "square", ins[:1]
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if (rule := _RULES.get(name)) is None:
        return EVERYTHING
    ranges: list[Range] = [EVERYTHING] * len(ins)
    # The shortest history first: if one operand of a sum has no range, the other's long chain need not be walked.
    for n in sorted(range(len(ranges)), key=lambda n: getattr(ins[n], "depth", 0)):
        ranges[n] = range_of_operand(ins[n])
        if ranges[n] == EVERYTHING and name in ("add", "add_any", "sub"):
            return EVERYTHING
    low, high = rule(eqn, *ranges)
    if math.isnan(low) or math.isnan(high):
        return EVERYTHING
    widened = lambda value, sign: value + sign * 2**-50 * abs(value) if math.isfinite(value) else value
    return widened(low, -1), widened(high, 1)


def range_of_operand(value: Any) -> Range:
    """Returns the range of a signal, or of the elements of an array."""
    found = getattr(value, "range", None)
    return _constant(value) if found is None else found


def largest_modulus(range_: Range) -> float:
    """Returns the largest modulus of the numbers in a range."""
    return max(-range_[0], range_[1])


def smallest_modulus(range_: Range) -> float:
    """Returns the smallest modulus of the numbers in a range."""
    return max(range_[0], -range_[1], 0.0)


def slope_between(name: str, y: Any, range_: Range) -> float:
    """Returns the largest modulus of the slope of an elementwise function of one number in a range; it may be infinite.

    ``y`` is the exponent of ``integer_pow``.
    """
    (low, high), most, least = range_, largest_modulus(range_), smallest_modulus(range_)
    if name in ("exp", "expm1"):
        return _exp(high)
    if name == "exp2":
        return _exp(high * math.log(2)) * math.log(2) * (1 + 2**-40)
    if name == "square":
        return 2 * most
    if name == "integer_pow":
        return abs(y) * (_power(most, y - 1) if y > 0 else _power(least, y - 1)) if y else 0.0
    beyond = 1 + low if name == "log1p" else low
    exponent, factor = {"log": (-1.0, 1.0), "log1p": (-1.0, 1.0), "sqrt": (-0.5, 0.5), "rsqrt": (-1.5, 0.5)}[name]
    return factor * _power(beyond, exponent) if beyond > 0 else math.inf


def _exp(value: float) -> float:
    return math.exp(value) * (1 + 2**-50) if value < 700 else math.inf


def _power(base: float, exponent: float) -> float:
    if base == 0 and exponent < 0:
        return math.inf
    try:
        return base**exponent * (1 + 2**-50)
    except OverflowError:
        return math.inf


def _constant(value: Any) -> Range:
    if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(np.asarray(value).dtype, jnp.number):
        return EVERYTHING
    array = np.asarray(value)
    if not array.size or np.iscomplexobj(array) or np.isnan(array.astype(np.float64)).any():
        return EVERYTHING
    return float(array.min()), float(array.max())


def _hull(eqn: Any, *ranges: Range) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _sum(eqn: Any, a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1]


def _product(eqn: Any, a: Range, b: Range) -> Range:
    ends = [x * y if x and y else 0.0 for x in a for y in b]  # numbers are finite, so that 0 times one is 0
    return min(ends), max(ends)


def _quotient(eqn: Any, a: Range, b: Range) -> Range:
    return _product(eqn, a, (1 / b[1], 1 / b[0])) if smallest_modulus(b) else EVERYTHING


def _negative(eqn: Any, a: Range) -> Range:
    return -a[1], -a[0]


def _maximum(eqn: Any, a: Range, b: Range) -> Range:
    return max(a[0], b[0]), max(a[1], b[1])


def _minimum(eqn: Any, a: Range, b: Range) -> Range:
    return min(a[0], b[0]), min(a[1], b[1])


def _clamped(eqn: Any, low: Range, a: Range, high: Range) -> Range:
    return _minimum(eqn, _maximum(eqn, a, low), high)


def _power_of(eqn: Any, a: Range) -> Range:
    y = eqn.params.get("y", 2)
    if y < 0:
        return EVERYTHING
    most = _power(largest_modulus(a), y)
    return (0.0, most) if y % 2 == 0 else (-most, most)


def _exponential(eqn: Any, a: Range) -> Range:
    return 0.0, _exp(a[1])


def _root(eqn: Any, a: Range) -> Range:
    return math.sqrt(max(a[0], 0.0)), math.sqrt(max(a[1], 0.0))


def _inverse_root(eqn: Any, a: Range) -> Range:
    return _quotient(eqn, (1.0, 1.0), _root(eqn, a)) if a[0] > 0 else EVERYTHING


def _reduced_sum(eqn: Any, a: Range) -> Range:
    size = lambda v: math.prod(v.aval.shape)
    count = size(eqn.invars[0]) / max(1, size(eqn.outvars[0]))
    return _product(eqn, a, (count, count))


def _window_sum(eqn: Any, a: Range) -> Range:
    return _product(eqn, _hull(eqn, a, (0.0, 0.0)), (0.0, float(math.prod(eqn.params["window_dimensions"]))))


_RULES: dict[str, Callable[..., Range]] = {
    "abs": lambda eqn, a: (smallest_modulus(a), largest_modulus(a)),
    "add": _sum,
    "add_any": _sum,
    "clamp": _clamped,
    "concatenate": _hull,
    "div": _quotient,
    "exp": _exponential,
    "integer_pow": _power_of,
    "max": _maximum,
    "min": _minimum,
    "mul": _product,
    "neg": _negative,
    "pad": _hull,
    "reduce_sum": _reduced_sum,
    "reduce_window_sum": _window_sum,
    "rsqrt": _inverse_root,
    "select_n": lambda eqn, choice, *cases: _hull(eqn, *cases),
    "sqrt": _root,
    "square": _power_of,
    "sub": lambda eqn, a, b: _sum(eqn, a, _negative(eqn, b)),
    **dict.fromkeys(_UNCHANGED, lambda eqn, first, *_: first),
}
