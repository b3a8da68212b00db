"""One rule per operation: how much its results change at most, given how much its operands do.

A rule takes an equation and its operands. At least one of these is a signal, with a ``bound``; the others are arrays.
It returns the bound of the result, or a list with one for each result, None where a result has no bound. Its docstring
is its theorem. What has no rule is refused. Operations that only move numbers need no rule where it is known how
(see ``movement.py``); those here are for places that are not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import Conv
from opnorm_jax._kernel.bounds import operator_norm_bounds
from opnorm_jax._program import ranges
from opnorm_jax._program.jaxpr import gives_floats, is_real, open_jaxpr, programs_inside, takes_real_part
from opnorm_jax._program.movement import is_plain
from opnorm_jax._program.numbers import Number, hypot, largest, plus, times

Rule = Callable[[Any, Sequence[Any]], Any]


class Refused(ValueError):
    """Names an operation that has no Lipschitz constant, or none known here."""


RULES: dict[str, Rule] = {}

_ON_COMPLEX_NUMBERS = frozenset(
    """abs add add_any broadcast_in_dim complex concatenate conj convert_element_type copy cumsum div dynamic_slice
    dynamic_update_slice fft gather imag mul neg pad real reduce_sum reduce_window_sum reshape rev scatter scatter-add
    scatter-sub select_n slice split squeeze stack sub tile transpose unstack""".split()
)
"""Operations whose rules hold of complex numbers too, which are pairs of real ones. Others may have no constant."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of its primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def is_signal(value: Any) -> bool:
    """Tells whether a value depends on the input."""
    return getattr(value, "is_signal", False)


def rule_of(eqn: Any, index: int) -> Rule:
    """Returns the rule for an operation. Raises ``Refused`` if it has none, or none for its dtypes."""
    name = eqn.primitive.name
    if name not in RULES:
        raise refused(eqn)
    if not gives_floats(eqn, index):
        raise refused(eqn, "gives whole numbers, which jump")
    if not is_real(eqn) and name not in _ON_COMPLEX_NUMBERS:
        raise refused(eqn, "has none known here for complex numbers")
    return RULES[name]


def refused(eqn: Any, why: str = "has none known here") -> Refused:
    """Returns the error that names an operation and why it has no bound."""
    shapes = ", ".join(str(getattr(v.aval, "shape", "")) for v in eqn.invars)
    return Refused(f"{eqn.primitive.name} on {shapes}, which depends on the input, {why}.")


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _spread(eqn: Any, ins: Sequence[Any]) -> list[Number]:
    """The bounds of the signals among an elementwise operation's operands, each copied to the result's shape."""
    size = _size(eqn.outvars[0])
    return [
        times(value.bound, math.sqrt(size / max(1, _size(v)))) for value, v in zip(ins, eqn.invars) if is_signal(value)
    ]


# Functions of each element by itself.

ELEMENTWISE = {
    "abs": (-1.0, 1.0),
    "asinh": (0.0, 1.0),
    "atan": (0.0, 1.0),
    "cos": (-1.0, 1.0),
    "erf": (0.0, 1.1283792),
    "erfc": (-1.1283792, 0.0),
    "logistic": (0.0, 0.25),
    "sin": (-1.0, 1.0),
    "tanh": (0.0, 1.0),
}
"""The lowest and the highest slope of operations on one array, rounded outwards."""

_LINEAR = dict.fromkeys(("conj", "imag", "neg", "real"), 1.0)
_SLOPES = _LINEAR | {name: max(-lowest, highest) for name, (lowest, highest) in ELEMENTWISE.items()}
"""The largest modulus of the slope, over all real numbers."""


@rule(*_SLOPES)
def _elementwise(eqn, ins):
    """A function applied to each element changes by at most its largest slope times the change."""
    return times(ins[0].bound, _SLOPES[eqn.primitive.name])


@rule("convert_element_type")
def _real_part(eqn, ins):
    """A cast of complex numbers to real ones takes the real part. Others that come here are to coarser numbers."""
    if not takes_real_part(eqn):
        raise refused(eqn)
    return ins[0].bound


@rule("exp", "exp2", "expm1", "integer_pow", "log", "log1p", "rsqrt", "sqrt", "square")
def _between_limits(eqn, ins):
    """A function without a largest slope has one between the numbers that its operand lies between."""
    slope = ranges.slope_between(eqn.primitive.name, eqn.params.get("y"), ins[0].range)
    if not math.isfinite(slope):
        raise refused(eqn, "has no largest slope, unless its operand is held between limits before (jnp.clip, tanh)")
    return times(ins[0].bound, slope)


@rule("add", "add_any", "sub")
def _sum(eqn, ins):
    """The triangle inequality."""
    return plus(_spread(eqn, ins))


_UNLIMITED = "times another such, has none unless both lie between limits (attention, a linear gate?)"
_NORMALISED = (
    "divided by something that depends on the input, has none: layer, group or instance normalisation, or a batch's "
    "own statistics? Normalise by fixed numbers, as batch normalisation does when it is not training"
)


def _is_inverse(value: Any) -> bool:
    """Tells whether a signal was divided by a signal, or is a root's inverse, and perhaps scaled or repeated since."""
    while is_signal(value) and value.eqn is not None:
        name = value.eqn.primitive.name
        signals = [other for other in value.ins if is_signal(other)]
        if name == "rsqrt" or (name == "div" and is_signal(value.ins[1])):
            return True
        if name not in ("broadcast_in_dim", "mul", "reshape", "squeeze", "transpose") or len(signals) != 1:
            return False
        (value,) = signals
    return False


@rule("mul")
def _multiple(eqn, ins):
    """A constant factor counts by its largest modulus. Two signals count by the largest modulus of each other.

    Two that are not both bounded have no constant.
    """
    if all(map(is_signal, ins)):
        most = [ranges.largest_modulus(value.range) for value in ins]
        if not all(map(math.isfinite, most)):
            raise refused(eqn, _NORMALISED if any(map(_is_inverse, ins)) else _UNLIMITED)
        return plus([times(bound, factor) for bound, factor in zip(_spread(eqn, ins), reversed(most))])
    (factor,) = (value for value in ins if not is_signal(value))
    return times(*_spread(eqn, ins), largest(factor))


@rule("div")
def _quotient(eqn, ins):
    """Division by a constant counts by its smallest modulus.

    Division by a signal v, kept away from 0, changes u / v by as much as u over the smallest modulus of v, and as v
    times the largest modulus of u over the square of that. Without limits it has no constant.
    """
    if is_signal(ins[1]):
        most, least = ranges.largest_modulus(ranges.range_of_operand(ins[0])), ranges.smallest_modulus(ins[1].range)
        if not least or not math.isfinite(most):
            raise refused(eqn, _NORMALISED)
        factors = [1 / least] * is_signal(ins[0]) + [most / least**2]
        return plus([times(bound, factor, 1 + 2**-50) for bound, factor in zip(_spread(eqn, ins), factors)])
    smallest = 1 / jnp.asarray(ins[1]) if isinstance(ins[1], jax.core.Tracer) else _inverse(ins[1])
    return times(*_spread(eqn, ins), largest(smallest))


def _inverse(array):
    with np.errstate(divide="ignore"):
        return 1 / np.asarray(array, np.result_type(np.asarray(array), np.float64))


@rule("max", "min", "clamp")
def _choice(eqn, ins):
    """Each element of the result is that of one operand at its place, so the squares of all operands' changes do."""
    return hypot(_spread(eqn, ins))


@rule("select_n")
def _selection(eqn, ins):
    """With a choice that does not depend on the input each element is one operand's, so the squares of all changes do.

    A choice that depends on the input jumps where it changes, unless the whole is a known activation.
    """
    if is_signal(ins[0]):
        raise refused(eqn, "chooses by something that depends on the input, and is no activation that is known")
    return hypot([value.bound for value in ins[1:] if is_signal(value)])


# Sums and extremes over axes.


@rule("reduce_sum")
def _reduced_sum(eqn, ins):
    """A sum of n numbers changes by at most the root of n times the length of their change; sums share no element."""
    return times(ins[0].bound, math.sqrt(_size(eqn.invars[0]) / max(1, _size(eqn.outvars[0]))))


@rule("reduce_max", "reduce_min")
def _reduced_extreme(eqn, ins):
    """The largest of some numbers changes by at most the largest of their changes.

    Each input belongs to one extreme only, so the bounds do not add up.
    """
    return ins[0].bound


@rule("reduce")
def _reduction(eqn, ins):
    """A reduction by addition is a sum, one by maximum or minimum an extreme. Its program is read, not called."""
    operation = _binary(eqn)
    if operation is None or len(ins) != 2:
        raise refused(eqn, "combines elements by a function that is neither add, max nor min")
    if is_signal(ins[1]):
        raise refused(eqn, "starts from something that depends on the input")
    return (_reduced_sum if operation == "add" else _reduced_extreme)(eqn, ins)


def _binary(eqn: Any) -> str | None:
    """``add``, ``max`` or ``min`` if that is all that an equation's program does with its two operands."""
    programs = programs_inside(eqn)
    while len(programs) == 1:
        jaxpr = open_jaxpr(programs[0])
        if len(jaxpr.eqns) != 1 or len(jaxpr.invars) != 2 or list(jaxpr.outvars) != list(jaxpr.eqns[0].outvars):
            return None
        (inner,) = jaxpr.eqns
        if set(map(id, inner.invars)) != set(map(id, jaxpr.invars)):
            return None
        if inner.primitive.name in ("add", "max", "min"):
            return inner.primitive.name
        programs = programs_inside(inner) if inner.primitive.name in ("jit", "pjit") else []
    return None


@rule("cumsum")
def _cumulative_sum(eqn, ins):
    r"""The triangular matrix of ones of side n has the norm :math:`1 / (2 \sin(\pi / (4 n + 2)))`."""
    n = eqn.invars[0].aval.shape[eqn.params["axis"]]
    return times(ins[0].bound, (1 + 1e-14) / (2 * math.sin(math.pi / (4 * n + 2))))


@rule("cummax", "cummin", "cumlogsumexp")
def _cumulative_extreme(eqn, ins):
    """Each result is a weighted mean of the elements so far: rows sum to 1, and n of them share an element at most."""
    return times(ins[0].bound, math.sqrt(eqn.invars[0].aval.shape[eqn.params["axis"]]))


@rule("sort")
def _sorted(eqn, ins):
    """Sorting brings no two arrays further apart. Constant keys rearrange.

    Keys that depend on the input make the other operands jump.
    """
    keys = ins[: eqn.params["num_keys"]]
    if not any(map(is_signal, keys)):
        return [value.bound if is_signal(value) else None for value in ins]
    return [ins[0].bound if is_signal(ins[0]) else None, *[None] * (len(ins) - 1)]


@rule("top_k")
def _largest_few(eqn, ins):
    """The largest k numbers in order are a part of the sorted ones. Their positions jump."""
    return [ins[0].bound, None]


# Windows.


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _pool(eqn, ins):
    """A sum over windows is a product of one matrix of zeros and ones per axis, whose norms multiply.

    An extreme over windows changes each window by at most the change of one of its elements, and an element is in as
    many windows as a column of those matrices has ones.
    """
    operation = eqn.primitive.name.removeprefix("reduce_window").removeprefix("_") or _binary(eqn)
    if operation not in ("add", "sum", "max", "min") or len(ins) > 2:
        raise refused(eqn, "combines elements by a function that is neither add, max nor min")
    if any(map(is_signal, ins[1:])):
        raise refused(eqn, "starts from something that depends on the input")
    norm = 1.0
    for n, (length, outputs) in enumerate(zip(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)):
        size = eqn.params["window_dimensions"][n]
        if outputs * size > 2**26:  # a window holds so many elements, and an element is in so many windows, at most
            norm *= size if operation in ("add", "sum") else math.sqrt(size)
            continue
        rows, columns = _windows(eqn, n)
        most = lambda places: np.bincount(places).max(initial=0)
        if operation in ("max", "min"):
            norm *= math.sqrt(most(columns))
        elif outputs * length <= 2**20:
            matrix = np.zeros((outputs, length))
            np.add.at(matrix, (rows, columns), 1)
            norm *= float(np.linalg.norm(matrix, 2)) * (1 + 1e-12)
        else:  # the root of the largest row sum times the largest column sum is no smaller
            norm *= math.sqrt(most(rows) * most(columns))
    return times(ins[0].bound, norm)


def _windows(eqn: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists for an axis which window holds which element: the numbers of windows, and those of elements."""
    params, length, outputs = eqn.params, eqn.invars[0].aval.shape[n], eqn.outvars[0].aval.shape[n]
    (low, _), spread = params["padding"][n], params["base_dilation"][n]
    starts = params["window_strides"][n] * np.arange(outputs)[:, None] - low
    at = starts + params["window_dilation"][n] * np.arange(params["window_dimensions"][n])
    rows, _ = np.nonzero(held := (at % spread == 0) & (at >= 0) & (at < length * spread))
    return rows, at[held] // spread


# Linear maps.


@rule("conv_general_dilated")
def _convolution(eqn, ins):
    """A convolution by a constant kernel is bounded by its norm, taken elsewhere; this is what is left."""
    raise refused(eqn, "as a convolution's kernel has none known here")


@rule("dot_general")
def _product(eqn, ins):
    """A product with constant matrices, one for each batch index, changes by at most the largest of their norms."""
    contracted, batched = eqn.params["dimension_numbers"]
    if all(map(is_signal, ins)):
        raise refused(eqn, "times another such, has none (attention?)")
    me = 1 if is_signal(ins[0]) else 0
    matrix = jnp.asarray(ins[me])
    if jnp.issubdtype(matrix.dtype, jnp.complexfloating):
        raise refused(eqn, "times a complex matrix, has none known here")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        matrix = matrix.astype(jnp.float32)
    free = [n for n in range(matrix.ndim) if n not in contracted[me] and n not in batched[me]]
    size = lambda axes: math.prod(matrix.shape[n] for n in axes)
    matrices = matrix.transpose(*batched[me], *contracted[me], *free)
    matrices = matrices.reshape(size(batched[me]), size(contracted[me]), size(free))
    norms = jax.vmap(lambda m: operator_norm_bounds(m, Conv(())).upper)(matrices)
    # A signal's batch indices hold different elements each.
    return times(ins[1 - me].bound, largest(norms))


@rule("fft")
def _fourier(eqn, ins):
    """The transform of n numbers is the root of n times a unitary one, its inverse the root of 1/n times one.

    The real transform is a part of the complex one. Its inverse counts most frequencies twice: at most a root of 2.
    """
    n = math.prod(eqn.params["fft_lengths"])
    kinds = jax.lax.FftType
    norms = {kinds.FFT: n**0.5, kinds.RFFT: n**0.5, kinds.IFFT: n**-0.5, kinds.IRFFT: (2 / n) ** 0.5}
    return times(ins[0].bound, norms[eqn.params["fft_type"]] * (1 + 1e-14))


# Movement to or from places that are not known.


@rule("complex", "concatenate", "stack")
def _joined(eqn, ins):
    """The squares of the parts' changes add up. So do those of a real and an imaginary part."""
    return hypot([value.bound for value in ins if is_signal(value)])


@rule("reshape", "transpose", "squeeze", "rev", "slice", "split", "unstack", "copy")
def _rearranged(eqn, ins):
    """Each element of the result is an element of the operand, and none occurs twice."""
    return [ins[0].bound] * len(eqn.outvars)


@rule("broadcast_in_dim", "tile")
def _repeated(eqn, ins):
    """Every element is repeated equally often."""
    return times(ins[0].bound, math.sqrt(_size(eqn.outvars[0]) / max(1, _size(eqn.invars[0]))))


@rule("pad")
def _padded(eqn, ins):
    """The padding repeats one number."""
    repeated = math.sqrt(_size(eqn.outvars[0]))
    return hypot([times(v.bound, repeated if n else 1.0) for n, v in enumerate(ins) if is_signal(v)])


@rule("dynamic_slice")
def _window_of(eqn, ins):
    """A slice holds no element twice, wherever it is. A place that depends on the input jumps."""
    _check_places(eqn, ins[1:])
    return ins[0].bound


@rule("dynamic_update_slice")
def _updated(eqn, ins):
    """The result holds no element of the operand or of the update twice."""
    _check_places(eqn, ins[2:])
    return hypot([value.bound for value in ins[:2] if is_signal(value)])


@rule("gather")
def _gathered(eqn, ins):
    """Each index takes an element at most once, so n indices take it n times at most."""
    _check_places(eqn, ins[1:])
    return times(ins[0].bound, math.sqrt(_indices(eqn)))


@rule("scatter")
def _scattered(eqn, ins):
    """The result holds no element of the operand or of the updates twice, if updates are put in place as they are."""
    _check_places(eqn, ins[1:2])
    if not is_plain(eqn):
        raise refused(eqn, "changes the elements by a function of its own")
    return hypot([ins[n].bound for n in (0, 2) if is_signal(ins[n])])


@rule("scatter-add", "scatter-sub")
def _accumulated(eqn, ins):
    """Adds to each element at most as many updates as there are indices, or as meet there where that is known."""
    _check_places(eqn, ins[1:2])
    meeting = _indices(eqn)
    if not isinstance(ins[1], jax.core.Tracer):
        ones = np.ones(eqn.invars[2].aval.shape, np.int32)
        zeros = np.zeros(eqn.invars[0].aval.shape, np.int32)
        numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        with jax.ensure_compile_time_eval():
            counts = jax.lax.scatter_add(zeros, jnp.asarray(ins[1]), ones, numbers, mode=mode)
            meeting = int(np.max(np.asarray(counts), initial=0))
    return plus([times(ins[n].bound, 1.0 if n == 0 else math.sqrt(meeting)) for n in (0, 2) if is_signal(ins[n])])


def _indices(eqn: Any) -> int:
    """How many places an equation's indices name."""
    return math.prod(eqn.invars[1].aval.shape[:-1])


def _check_places(eqn: Any, places: Sequence[Any]) -> None:
    if any(map(is_signal, places)):
        raise refused(eqn, "moves numbers to or from places that depend on the input")


# Control flow.


@rule("cond")
def _branches(eqn, ins):
    """A choice that depends on the input jumps where it changes. Other choices are followed elsewhere."""
    raise refused(eqn, "branches on something that depends on the input")


@rule("while")
def _loop(eqn, ins):
    """A loop may run any number of times."""
    raise refused(eqn, "may run any number of times: use jax.lax.scan, or fori_loop with fixed limits")
