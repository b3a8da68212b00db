"""The largest slopes of activation functions, and how a program's own activations are recognised.

An activation is recognised by its expression, never by its name: the expression that a program applies to a signal is
compared with that of each function of a table, traced by the same jax for the same dtype. So it does not matter whether
a function is called from ``jax.nn``, written by hand, under ``jit`` or under ``vmap``; and a function that only bears a
known name is not taken for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._program.jaxpr import Literal, called_program, is_identity, open_jaxpr
from opnorm_jax._program.rules import ELEMENTWISE, is_signal

Expression = tuple
"""``("x",)``, ``("parameter", n)``, ``("number", value)``, or ``(operation, what is static of it, operands)``."""

_COMMUTATIVE = {"add", "max", "min", "mul"}


class Activation(NamedTuple):
    """A function of one number, and perhaps of constant parameters."""

    name: str
    function: Callable[..., Any]
    slope: Callable[..., Any]  # of the parameters: the largest modulus of a slope; infinite where out of its domain
    parameters: int = 0
    lowest: Callable[..., Any] | float = 0.0  # of the parameters: the lowest slope, or that itself
    rounded: float = 0.0  # by how much both are further out where the function's constants are rounded to 16 bits


def _constant(slope: float) -> Callable[..., Any]:
    return lambda: slope


_at_least_one = lambda a: jnp.maximum(1, jnp.abs(a))
_at_most_zero = lambda a: jnp.minimum(0, a)
_at_most_one = lambda a: jnp.minimum(1, a)
_if = lambda holds, slope: jnp.where(holds, slope, jnp.inf)


def _by_sign(name: str, below: Callable[..., Any], *slopes: Any, **options: Any) -> list[Activation]:
    """Returns x above zero and ``below`` of it under zero, chosen by each comparison."""
    functions = {
        ">": lambda x, *a: jnp.where(x > 0, x, below(x, *a)),
        ">=": lambda x, *a: jnp.where(x >= 0, x, below(x, *a)),
        "<": lambda x, *a: jnp.where(x < 0, below(x, *a), x),
        "<=": lambda x, *a: jnp.where(x <= 0, below(x, *a), x),
    }
    return [Activation(f"{name} by {sign}", function, *slopes, **options) for sign, function in functions.items()]


ACTIVATIONS = [
    Activation("celu", jax.nn.celu, lambda a: _if(a > 0, 1.0), 1),
    Activation("elu", jax.nn.elu, _at_least_one, 1, lowest=_at_most_zero),
    Activation(
        "elu by exp", lambda x, a: jnp.where(x > 0, x, a * (jnp.exp(x) - 1)), _at_least_one, 1, lowest=_at_most_zero
    ),
    Activation(
        "elu by expm1", lambda x, a: jnp.where(x > 0, x, a * jnp.expm1(x)), _at_least_one, 1, lowest=_at_most_zero
    ),
    Activation(
        "gelu", lambda x: jax.nn.gelu(x, approximate=True), _constant(1.1289931), lowest=-0.1289931, rounded=4e-5
    ),
    Activation("gelu, exact", lambda x: jax.nn.gelu(x, approximate=False), _constant(1.1289042), lowest=-0.1289042),
    Activation(
        "gelu by erf", lambda x: 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2))), _constant(1.1289042), lowest=-0.1289042
    ),
    Activation(
        "gelu by tanh",
        lambda x: 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        _constant(1.1289931),
        lowest=-0.1289931,
        rounded=4e-5,
    ),
    Activation("hard_sigmoid", jax.nn.hard_sigmoid, _constant(1 / 6)),
    Activation("hard_swish", jax.nn.hard_swish, _constant(1.5), lowest=-0.5),
    Activation("hard_swish by hand", lambda x: x * jax.nn.relu6(x + 3) / 6, _constant(1.5), lowest=-0.5),
    Activation("hard_tanh", jax.nn.hard_tanh, _constant(1.0)),
    Activation("leaky_relu", jax.nn.leaky_relu, _at_least_one, 1, lowest=_at_most_one),
    *_by_sign("leaky_relu", lambda x, a: a * x, _at_least_one, 1, lowest=_at_most_one),
    Activation("log_sigmoid", jax.nn.log_sigmoid, _constant(1.0)),
    Activation("mish", jax.nn.mish, _constant(1.0884982), lowest=-0.1131),
    Activation("mish by hand", lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))), _constant(1.0884982), lowest=-0.1131),
    *_by_sign("relu", lambda x: 0.0, _constant(1.0)),
    *_by_sign("abs", lambda x: -x, _constant(1.0), lowest=-1.0),
    Activation("relu6", jax.nn.relu6, _constant(1.0)),
    Activation("selu", jax.nn.selu, _constant(1.7580994), rounded=2e-4),
    Activation("sigmoid by exp", lambda x: 1 / (1 + jnp.exp(-x)), _constant(0.25)),
    Activation("silu", jax.nn.silu, _constant(1.0998394), lowest=-0.0998394),
    Activation("silu by exp", lambda x: x / (1 + jnp.exp(-x)), _constant(1.0998394), lowest=-0.0998394),
    Activation(
        "silu, scaled",
        lambda x, a: x * jax.nn.sigmoid(a * x),
        lambda a: 1.0998394 + 0 * jnp.abs(a),
        1,
        lowest=-0.0998394,
    ),
    Activation("soft_sign", jax.nn.soft_sign, _constant(1.0)),
    Activation("softplus", jax.nn.softplus, _constant(1.0)),
    Activation("softplus by log", lambda x: jnp.log(1 + jnp.exp(x)), _constant(1.0)),
    Activation("softplus by log1p", lambda x: jnp.log1p(jnp.exp(x)), _constant(1.0)),
    Activation("sparse_plus", jax.nn.sparse_plus, _constant(1.0)),
    Activation("sparse_sigmoid", jax.nn.sparse_sigmoid, _constant(0.5)),
    Activation("squareplus", jax.nn.squareplus, lambda b: _if(b >= 0, 1.0), 1),
]
"""Slopes rounded outwards; a test compares each with a fine grid in float64."""

INTERVALS = ELEMENTWISE | dict.fromkeys(("clamp", "max", "min"), (0.0, 1.0))
"""The lowest and the highest slope of operations on one signal and constants."""


def interval(signal: Any) -> tuple[Any, Any, Any] | None:
    """Returns the signal that a known elementwise function is applied to, its lowest and its highest slope; or None."""
    if (found := find(signal)) is not None:
        _, inner, highest, lowest = found
        return inner, lowest, highest
    if signal.eqn.primitive.name in INTERVALS:
        signals = [value for value in signal.ins if is_signal(value)]
        if len(signals) == 1 and signals[0].shape == signal.shape:
            return signals[0], *INTERVALS[signal.eqn.primitive.name]
    return None


def find(signal: Any) -> tuple[str, Any, Any, Any] | None:
    """Returns the name of a known activation, the signal that it is applied to, and two slopes; or None.

    The first is the largest modulus of a slope, which is the highest slope too; the second is the lowest.
    """
    name, dtype = signal.eqn.primitive.name, np.dtype(signal.eqn.outvars[0].aval.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        return None
    for activation, expression in _expressions(dtype).get(name, ()):
        for bound in _matches(expression, signal, {}):
            parameters = [jnp.asarray(bound[n]) for n in range(activation.parameters)]
            lowest = activation.lowest(*parameters) if callable(activation.lowest) else activation.lowest
            rounded = activation.rounded if jnp.finfo(dtype).bits == 16 else 0.0
            largest = jnp.max(jnp.asarray(activation.slope(*parameters))) + rounded
            return activation.name, bound["x"], largest, jnp.min(jnp.asarray(lowest)) - rounded
    return None


@functools.lru_cache(maxsize=16)
def _expressions(dtype: Any) -> dict[str, list[tuple[Activation, Expression]]]:
    """Returns the table's expressions for one dtype, by their last operation."""
    found: dict[str, list[tuple[Activation, Expression]]] = {}
    for activation in ACTIVATIONS:
        scalars = [jax.ShapeDtypeStruct((), dtype)] * (1 + activation.parameters)
        inputs = [("x",), *(("parameter", n) for n in range(activation.parameters))]
        with jax.numpy_dtype_promotion("standard"):
            program = jax.make_jaxpr(activation.function)(*scalars)
        (expression,) = _expression(program, inputs)
        found.setdefault(expression[0], []).append((activation, expression))
    return found


def _expression(program: Any, inputs: list[Expression]) -> list[Expression]:
    jaxpr = open_jaxpr(program)
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: ("number", float(value)) for v, value in zip(jaxpr.constvars, getattr(program, "consts", ()))}
    read = lambda v: ("number", float(v.val)) if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        if is_identity(eqn):
            outs = ins
        elif inner := called_program(eqn):
            outs = _expression(inner, ins)
        elif all(operand[0] == "number" for operand in ins):
            value = eqn.primitive.bind(
                *(jnp.asarray(n, v.aval.dtype) for (_, n), v in zip(ins, eqn.invars)), **eqn.params
            )
            outs = [("number", float(value))]
        else:
            outs = [(eqn.primitive.name, static(eqn), tuple(ins))]
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def static(eqn: Any) -> tuple:
    """Returns the parameters that change what an elementwise operation means: the exponent ``y`` alone."""
    return (eqn.params.get("y"),)


def _matches(expression: Expression, value: Any, bound: dict) -> Iterator[dict]:
    """Returns every way to read ``value`` as the expression: what ``x`` and the parameters are in it."""
    kind = expression[0]
    if kind in ("x", "parameter"):
        key = "x" if kind == "x" else expression[1]
        if is_signal(value) == (kind == "x") and (key not in bound or _same(bound[key], value)):
            yield bound | {key: value}
    elif kind == "number":
        if (
            not is_signal(value)
            and not isinstance(value, jax.core.Tracer)
            and np.all(np.asarray(value) == expression[1])
        ):
            yield bound
    elif is_signal(value) and value.eqn is not None and value.eqn.primitive.name == kind:
        operands = value.ins
        alike = all(v.shape == value.shape for v in operands if is_signal(v))
        if alike and static(value.eqn) == expression[1] and len(operands) == len(expression[2]):
            orders = itertools.permutations(operands) if kind in _COMMUTATIVE else [operands]
            for order in orders:
                yield from _all_match(list(zip(expression[2], order)), bound)


def _all_match(pairs: list[tuple[Expression, Any]], bound: dict) -> Iterator[dict]:
    if not pairs:
        yield bound
        return
    (expression, value), *rest = pairs
    for found in _matches(expression, value, bound):
        yield from _all_match(rest, found)


def _same(one: Any, other: Any) -> bool:
    if one is other or is_signal(one):
        return one is other
    concrete = not isinstance(one, jax.core.Tracer) and not isinstance(other, jax.core.Tracer)
    return concrete and np.shape(one) == np.shape(other) and bool(np.all(np.asarray(one) == np.asarray(other)))
