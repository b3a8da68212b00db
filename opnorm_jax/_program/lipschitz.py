"""A bound on a whole network's Lipschitz constant, from the bounds on its layers.

The traced program is run once more: on real values wherever they do not depend on the input, and on :class:`Signal`
objects wherever they do. A signal bounds its own change when something asks: from where its elements come if they were
only moved, from its convolution's norm, from a known activation, or by the rule of the operation that made it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import Conv
from opnorm_jax._kernel.bounds import operator_norm_bounds
from opnorm_jax._program import slopes
from opnorm_jax._program.convolution import kernel_letters, read_convolution
from opnorm_jax._program.jaxpr import (
    Literal,
    called_program,
    computes_narrowly,
    evaluate,
    is_identity,
    open_jaxpr,
    p,
    programs_inside,
    scan_split,
    touches_reference,
    trace,
    widened,
)
from opnorm_jax._program.movement import MOVES, ElementMap, NotUnderstood, Source, identity, moved, row, stack
from opnorm_jax._program.numbers import Number, hypot, largest, maximum, rounded_up, times, widest
from opnorm_jax._program.rules import RULES, Refused, is_signal

_SETTLE = 40
"""Operations after which a bound is computed at once, so that no chain of them is longer than Python's stack."""


def lipschitz_bound(fn: Callable[..., Any], params: Any, x: Any) -> jax.Array:
    r"""Computes an upper bound on the Lipschitz constant of ``x -> fn(params, x)``, in the Euclidean norm of all of x.

    In a sequential network it is the product of the layers' certified norms (:func:`operator_norm_bounds`, for the
    padding and strides really used) with the largest slopes of what stands between them. Where paths are summed it is
    the sum of theirs; where they are concatenated, the root of the sum of squares. A factor per output channel that
    follows a layer, such as that of batch normalisation on running statistics, is folded into its kernel before the
    norm is taken. Operations that only move numbers count exactly: the root of the largest number of copies of one
    element.

    It is an upper bound, often far above the truth: the norm of a product can be far below the product of the norms.

    Args:
      fn: a function of the parameters and of one array. Pass other arguments by closure, as in
        ``lambda params, x: model.apply({"params": params, "batch_stats": stats}, x, train=False)``.
      params: a tree of arrays. Leaves of other types are passed on as they are, so that modules of Equinox and states
        of Flax NNX will do.
      x: an example input, for its shape and dtype: an array or a ``jax.ShapeDtypeStruct``. The bound holds for every
        input of this shape. As no example of a batch influences another, the bound for one is that for a batch.

    Returns:
      A scalar, float32, or float64 if ``x`` is float64. It is for the function in exact arithmetic, casts included: the
      rounding of evaluating ``fn`` itself is not in it. It is computed in at least float32 whatever dtype the network
      computes in, and rounded upwards.

    Raises:
      ValueError: ``fn`` applies to the input an operation that has no Lipschitz constant, or none known here (products
        of two paths as in attention, division by a norm or by a batch's own statistics, exp, branches on the input).
        The message names it. Activations are recognised by their expression: those of ``jax.nn`` except ``glu`` and
        ``standardize``, and common ones written by hand.
      TypeError: ``x`` is no array of a real floating dtype, or ``fn`` is no function.

    Cost: one norm per layer. Differentiable with respect to ``params``, and may itself be inside ``jit``.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> kernels = [jnp.full((3, 3, 1, 1), 1 / 9), jnp.full((3, 3, 1, 1), 2 / 9)]
      >>> def net(kernels, x):
      ...     for kernel in kernels:
      ...         x = jax.nn.relu(jax.lax.conv_general_dilated(
      ...             x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")))
      ...     return x
      >>> bool(1.5 < oj.lipschitz_bound(net, kernels, jnp.ones((1, 32, 32, 1))) <= 2.0001)
      True
    """
    if not callable(fn):
        raise TypeError(f"expected fn to be a function of the parameters and of one array, got {fn!r}.")
    if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected x to be an array of a real floating dtype, or its ShapeDtypeStruct, got {x!r}.")
    traced = trace(fn, params, (x,), {})
    *values, _ = traced.values
    try:
        outs = _Run().run(traced.program, [*map(widest, values), Signal(tuple(x.shape), bound=1.0)])
        bound = hypot([out.bound for out in outs if is_signal(out)])
    except Refused as error:
        raise ValueError(f"expected fn to be made of operations with a known Lipschitz constant; {error}") from None
    return rounded_up(bound, jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


class Layer(NamedTuple):
    """A convolution or a matrix product whose norm is not taken yet: a factor per channel can still join its kernel."""

    kernel: Any
    conv: Conv
    before: Signal  # its input
    scale: Number  # what all of it is multiplied by
    axis: int  # of the output's channels
    factors: int = 0  # how many have joined the kernel

    def bound(self) -> Number:
        norm = _upper(self.kernel, self.conv)
        if not isinstance(norm, jax.core.Tracer):
            norm = float(norm)
        # Each factor was rounded to the kernel's dtype once: at most by this much of the norm of the rounding errors.
        slack = 1 + self.factors * float(jnp.finfo(self.kernel.dtype).eps) * math.sqrt(self.kernel.size)
        return times(self.before.bound, norm, slack, self.scale)


@functools.partial(jax.jit, static_argnums=1)  # which leaves the lower bound uncomputed
def _upper(kernel: jax.Array, conv: Conv) -> jax.Array:
    return operator_norm_bounds(kernel, conv).upper


class Signal:
    """A value that depends on the input: by how much it changes at most, over the input's own change."""

    is_signal = True

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        bound: Number | None = None,
        compute: Callable[[], Number] | None = None,
        elements: ElementMap | None = None,
        eqn: Any = None,
        ins: Sequence[Any] = (),
        index: int = 0,
        run: _Run | None = None,
    ):
        self.shape, self.eqn, self.ins, self.index, self.run = shape, eqn, list(ins), index, run
        self.compute = compute
        if bound is not None:
            self.bound = bound
        if elements is not None:
            self.elements = elements
        self.depth = 1 + max((value.depth for value in ins if is_signal(value)), default=0)
        if self.depth > _SETTLE or (eqn is not None and eqn.primitive in (p.conv_general_dilated_p, p.dot_general_p)):
            for value in self.ins if self.depth <= _SETTLE else [self]:
                if is_signal(value):
                    value.settle()
            self.depth = 1

    def settle(self) -> None:
        """Computes the bound now. If there is none, whoever needs it hears of that."""
        try:
            self.bound  # noqa: B018
        except Refused:
            pass

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def bound(self) -> Number:
        """Raises ``Refused`` with the operation that has no bound."""
        if self.compute is not None:
            return self.compute()
        if self.layer is not None:
            return self.layer.bound()
        if not self._is_own_source:
            return bound_of(self.elements)
        if (found := slopes.find(self)) is not None:
            name, inner, slope = found
            if not isinstance(slope, jax.core.Tracer) and not np.isfinite(slope):
                raise Refused(f"{name} on {self.shape} has a parameter out of its domain.")
            return times(inner.bound, slope)
        if (inner := _softmax_of(self)) is not None:
            return times(inner.bound, 0.5)
        rule = RULES.get(self.eqn.primitive.name)
        if rule is None:
            raise _no_rule(self.eqn)
        found = rule(self.eqn, self.ins)
        found = found[self.index] if isinstance(found, list) else found
        if found is None:
            raise _no_rule(self.eqn)
        return found

    @functools.cached_property
    def elements(self) -> ElementMap:
        """Which element of earlier signals each element is; of itself, if it was not only moved."""
        own = identity(Source(self.shape, owner=self))
        if self.eqn is None or self.eqn.primitive.name not in MOVES | {"max", "min"}:
            return own
        assert self.run is not None
        try:
            if self.eqn.primitive.name in ("max", "min"):
                return self.run.sorted_pair(self) or own
            parts = [value.elements if is_signal(value) else None for value in self.ins]
            known = lambda n: None if _unknown(self.ins[n]) else np.asarray(self.ins[n])
            found = moved(self.eqn, parts, known)
        except NotUnderstood:
            return own
        return own if found is None else found[self.index]

    @property
    def _is_own_source(self) -> bool:
        sources = self.elements.sources
        return len(sources) == 1 and sources[0].owner is self

    @functools.cached_property
    def layer(self) -> Layer | None:
        """The layer that this is the output of, shifted or scaled since."""
        if self.eqn is None:
            return None
        name, constants = self.eqn.primitive.name, [v for v in self.ins if not is_signal(v)]
        if name == "conv_general_dilated":
            return _convolution(self.eqn, *self.ins)
        if name == "dot_general":
            return _dense(self.eqn, *self.ins)
        signals = [value for value in self.ins if is_signal(value)]
        if len(signals) != 1 or signals[0].shape != self.shape:
            return self._moved_layer() if name in ("reshape", "transpose", "squeeze", "broadcast_in_dim") else None
        layer = signals[0].layer
        if layer is None or name in ("add", "add_any", "sub", "neg"):
            return layer
        if name == "mul" or (name == "div" and signals[0] is self.ins[0]):
            return _scaled(layer, constants[0], name, len(self.shape))
        return None

    def _moved_layer(self) -> Layer | None:
        """A layer whose output is only laid out anew, as ``vmap`` does, with its channels along one axis still."""
        (signal, *_), elements = self.ins, self.elements
        layer = signal.layer if is_signal(signal) else None
        if layer is None or signal.size != self.size or elements.axes is None or len(elements.sources) != 1:
            return None
        source = elements.sources[0]
        if source.owner.layer is None or math.prod(self.shape) != source.size:
            return None
        layer = source.owner.layer
        step, count = math.prod(source.shape[layer.axis + 1 :]), source.shape[layer.axis]
        for axis, entries in enumerate(elements.axes):
            channels = entries - entries[0]
            if len(entries) == count and np.array_equal(channels, step * np.arange(count)):
                return layer._replace(axis=axis)
        return None


def _softmax_of(signal: Signal) -> Signal | None:
    r"""The signal that this is the softmax of, over some axes: :math:`diag(p) - p p^T` has norm 1/2 at most.

    It is exp(x - m) over its own sum, where m is the same along those axes. What m is makes no difference.
    """
    made_by = lambda value, name: is_signal(value) and value.eqn is not None and _name(value) == name
    if not made_by(signal, "div") or not made_by(signal.ins[0], "exp") or not is_signal(signal.ins[1]):
        return None
    power, total = signal.ins
    if power.shape != signal.shape or len(total.elements.sources) != 1:
        return None
    reduced = total.elements.sources[0].owner
    if not made_by(reduced, "reduce_sum") or reduced.ins[0] is not power:
        return None
    axes = tuple(reduced.eqn.params["axes"])
    places = np.expand_dims(np.arange(reduced.size).reshape(reduced.shape), axes)
    try:
        where = np.broadcast_to(total.elements.numbers(), signal.shape)
        if not np.array_equal(where, np.broadcast_to(places, signal.shape)):
            return None
        exponent = power.ins[0]
        if made_by(exponent, "sub") and is_signal(exponent.ins[0]) and exponent.ins[0].shape == signal.shape:
            shift = exponent.ins[1]
            if is_signal(shift) and len(shift.shape) == len(signal.shape):
                numbers = np.broadcast_to(shift.elements.numbers(), signal.shape)
                if np.array_equal(numbers, np.broadcast_to(numbers.min(axis=axes, keepdims=True), signal.shape)):
                    return exponent.ins[0]
    except NotUnderstood:
        return None
    return exponent


def _name(signal: Signal) -> str:
    return signal.eqn.primitive.name


def _no_rule(eqn: Any) -> Refused:
    shapes = ", ".join(str(getattr(v.aval, "shape", "")) for v in eqn.invars)
    return Refused(f"{eqn.primitive.name} on {shapes}, which depends on the input, has none known here.")


def _unknown(value: Any) -> bool:
    return is_signal(value) or isinstance(value, jax.core.Tracer)


def _identity(value: Any) -> Any:
    """The same for two operands that are equal for sure."""
    if _unknown(value) or np.size(value) != 1 or not jnp.issubdtype(value.dtype, np.number):
        return id(value)
    return np.asarray(value).item()


def bound_of(elements: ElementMap) -> Number:
    """The bound of an array whose elements are other signals' elements."""
    copies = zip(elements.copies, elements.sources)
    return hypot([times(source.owner.bound, math.sqrt(count)) for count, source in copies if count])


def _convolution(eqn: Any, image: Any, kernel: Any) -> Layer | None:
    if is_signal(kernel):
        return None  # refused by the operation's rule
    numbers = eqn.params["dimension_numbers"]
    letters = dict(zip(numbers.rhs_spec, kernel_letters(eqn)))
    layout = "".join(letters[n] for n in range(kernel.ndim))
    flipped = [False] * (kernel.ndim - 2)
    elements = image.elements
    try:
        conv = read_convolution(eqn, elements, layout, flipped)
        before = elements.sources[0].owner
    except ValueError:  # padded by reflection, say: then the padding is a layer of its own
        try:
            conv, before = read_convolution(eqn, None, layout, flipped), image
        except ValueError as error:
            raise Refused(f"conv_general_dilated on {image.shape} has none known here: {error}.") from None
    return Layer(jnp.asarray(kernel), conv, before, 1.0, numbers.out_spec[1])


def _dense(eqn: Any, left: Any, right: Any) -> Layer | None:
    """One matrix along one axis; other products are left to the operation's rule."""
    contracted, batched = eqn.params["dimension_numbers"]
    me = 1 if is_signal(left) else 0
    matrix, signal = (right, left) if me else (left, right)
    if is_signal(matrix) or matrix.ndim != 2 or batched[me] or len(contracted[me]) != 1:
        return None
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        return None
    axis = len(signal.shape) - 1 if me else 0  # of the product's free axes, the left operand's come first
    layout = "IO" if contracted[me][0] == 0 else "OI"
    return Layer(jnp.asarray(matrix), Conv((), kernel_layout=layout), signal, 1.0, axis)


def _scaled(layer: Layer, factor: Any, name: str, rank: int) -> Layer | None:
    """A layer times a constant for each of its channels."""
    factor = jnp.asarray(factor, layer.kernel.dtype)
    factor = factor if name == "mul" else 1 / factor
    shape = (1,) * (rank - factor.ndim) + factor.shape
    if any(length > 1 and n != layer.axis for n, length in enumerate(shape)):
        return None
    if factor.size == 1:
        return layer._replace(scale=times(layer.scale, largest(factor)), factors=layer.factors + (name == "div"))
    top = jnp.max(jnp.abs(factor))
    channels = [-1 if letter == "O" else 1 for letter in layer.conv.kernel_layout]
    relative = (factor / jnp.where(top > 0, top, 1)).reshape(channels)
    scale = times(layer.scale, largest(factor))
    return layer._replace(kernel=layer.kernel * relative, scale=scale, factors=layer.factors + 3)


class _Run:
    """One run of a program on arrays and signals."""

    def __init__(self):
        self.pairs: dict[Any, Signal] = {}
        self.made: dict[Any, Signal] = {}

    def run(self, program: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of a program: arrays, or signals where they depend on the input."""
        jaxpr = open_jaxpr(program)
        consts = [widest(value) for value in getattr(program, "consts", ())]
        known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, values, strict=True))
        read = lambda v: widest(v.val) if isinstance(v, Literal) else known[v]
        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            known.update(zip(eqn.outvars, self._results(program, eqn, ins)))
        return [read(v) for v in jaxpr.outvars]

    def _results(self, program: Any, eqn: Any, ins: list[Any]) -> list[Any]:
        if touches_reference(eqn):
            raise Refused(f"{eqn.primitive.name} on a mutable reference has none known here.")
        if not any(is_signal(value) for value in ins):
            return self._constants(program, eqn, ins)
        if is_identity(eqn):
            kept = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)
            return ins if kept else [self._signal(eqn, ins, n) for n in range(len(eqn.outvars))]
        if inner := called_program(eqn):
            return self.run(inner, ins)
        if eqn.primitive is p.scan_p:
            return self._scan(eqn, ins)
        if eqn.primitive is p.cond_p and not is_signal(ins[0]):
            return self._cond(eqn, ins)
        return [self._signal(eqn, ins, n) for n in range(len(eqn.outvars))]

    def _signal(self, eqn: Any, ins: list[Any], index: int) -> Any:
        shape = tuple(getattr(eqn.outvars[index].aval, "shape", ()))
        if math.prod(shape) == 0:
            return np.zeros(shape, np.float32)  # holds no number that could change
        # The same operation on the same operands is the same signal: x times sigmoid(x), whoever computed x twice.
        key = (eqn.primitive, index, repr(eqn.params), *map(_identity, ins)) if not programs_inside(eqn) else object()
        if key not in self.made:
            self.made[key] = Signal(shape, eqn=eqn, ins=ins, index=index, run=self)
        return self.made[key]

    def _constants(self, program: Any, eqn: Any, ins: list[Any]) -> list[Any]:
        if is_identity(eqn) and all(getattr(a, "dtype", None) == v.aval.dtype for a, v in zip(ins, eqn.outvars)):
            return ins
        if any(isinstance(value, jax.core.Tracer) for value in ins):
            return self._evaluated(program, eqn, ins)
        with jax.ensure_compile_time_eval():
            return self._evaluated(program, eqn, ins)

    def _evaluated(self, program: Any, eqn: Any, ins: list[Any]) -> list[Any]:
        """The results of an equation on arrays, in at least single precision where that can be had."""
        if not computes_narrowly(eqn):
            return evaluate(program, eqn, ins)
        if inner := called_program(eqn):
            return self.run(inner, ins)
        if eqn.primitive is p.reduce_precision_p:
            return ins
        if programs_inside(eqn):  # its own dtypes are part of it
            narrow = [jnp.asarray(value).astype(v.aval.dtype) for value, v in zip(ins, eqn.invars)]
            return [widest(out) for out in evaluate(program, eqn, narrow)]
        wide = widened(eqn)
        outs = wide.primitive.bind(*map(jnp.asarray, ins), **wide.params)
        return [widest(out) for out in (outs if wide.primitive.multiple_results else [outs])]

    def _scan(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """A scan, one step after the other."""
        (consts, carries), length = scan_split(eqn), eqn.params["length"]
        scanned = [value for value in ins[consts + carries :] if is_signal(value)]
        if len(scanned) == 1 and not any(map(is_signal, ins[: consts + carries])):
            if (outs := self._mapped(eqn, ins, scanned[0])) is not None:
                return outs
        body, carry = eqn.params["jaxpr"], ins[consts : consts + carries]
        steps = range(length)
        rows: list[Any] = [None] * length
        for n in reversed(steps) if eqn.params["reverse"] else steps:
            part = [_row(value, n) for value in ins[consts + carries :]]
            outs = self.run(body, [*ins[:consts], *carry, *part])
            carry, rows[n] = outs[:carries], outs[carries:]
        stacked = [_stacked([line[k] for line in rows], v.aval) for k, v in enumerate(eqn.outvars[carries:])]
        return [*carry, *stacked]

    def _mapped(self, eqn: Any, ins: list[Any], scanned: Signal) -> list[Any] | None:
        """The results of a scan whose rows do not depend on one another, or None if they do."""
        consts, carries = scan_split(eqn)
        carry, rows = ins[consts : consts + carries], []
        for n in range(eqn.params["length"]):
            n = eqn.params["length"] - 1 - n if eqn.params["reverse"] else n
            alone = Signal(scanned.shape[1:], bound=1.0)
            part = [alone if value is scanned else value[n] for value in ins[consts + carries :]]
            outs = self.run(eqn.params["jaxpr"], [*ins[:consts], *carry, *part])
            carry = outs[:carries]
            if any(map(is_signal, carry)):
                return None
            rows.append(outs[carries:])
        stacked = []
        for k, v in enumerate(eqn.outvars[carries:]):
            column = [row[k] for row in rows]
            if not any(map(is_signal, column)):
                stacked.append(_stacked(column[::-1] if eqn.params["reverse"] else column, v.aval))
                continue
            # Every row changes by at most its own multiple of the change of its own part.
            signals = [value for value in column if is_signal(value)]
            worst = lambda signals=signals: times(scanned.bound, maximum([signal.bound for signal in signals]))
            stacked.append(Signal(v.aval.shape, compute=worst))
        return [*carry, *stacked]

    def _cond(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """A choice that does not depend on the input: of the branch taken if that is known, otherwise of any."""
        index, *rest = ins
        branches = eqn.params["branches"]
        if not isinstance(index, jax.core.Tracer):
            return self.run(branches[min(max(int(index), 0), len(branches) - 1)], rest)
        outs = []
        for several, v in zip(zip(*(self.run(branch, rest) for branch in branches)), eqn.outvars):
            if not any(is_signal(value) for value in several):
                outs.append(jax.lax.select_n(jnp.clip(index, 0, len(branches) - 1), *map(jnp.asarray, several)))
                continue
            signals = [value for value in several if is_signal(value)]
            worst = lambda signals=signals: maximum([signal.bound for signal in signals])
            outs.append(Signal(v.aval.shape, compute=worst))
        return outs

    def sorted_pair(self, signal: Signal) -> ElementMap | None:
        """The elements of ``max(a, b)`` or ``min(a, b)`` as elements of the sorted pair, of which both are a part.

        Sorting is nonexpansive, so the pair's bound is that of a and b together: MaxMin counts once, not twice.
        """
        if not all(is_signal(value) and value.shape == signal.shape for value in signal.ins):
            return None
        both = [value.elements for value in signal.ins]
        key = frozenset((elements.sources, elements.numbers().tobytes()) for elements in both)
        if key not in self.pairs:
            self.pairs[key] = Signal((2, *signal.shape), bound=bound_of(stack(both, signal.shape)))
        return row(self.pairs[key].elements, int(signal.eqn.primitive.name == "max"))


def _row(value: Any, n: int) -> Any:
    if not is_signal(value):
        return value[n]
    elements = row(value.elements, n)
    return Signal(elements.shape, elements=elements)


def _stacked(rows: list[Any], aval: Any) -> Any:
    if not rows or math.prod(aval.shape) == 0:
        return np.zeros(aval.shape, np.float32)
    if not any(is_signal(value) for value in rows):
        return jnp.stack([jnp.asarray(value) for value in rows])
    signals = [value for value in rows if is_signal(value)]
    try:
        elements = stack([v.elements if is_signal(v) else None for v in rows], aval.shape[1:])
        return Signal(aval.shape, elements=elements)
    except NotUnderstood:
        return Signal(aval.shape, bound=hypot([signal.bound for signal in signals]))
