"""Values that depend on the input of a program, and the bounds on how much they change."""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import Conv, along_outputs, canonical_shape
from opnorm_jax._geometry import fills
from opnorm_jax._kernel.bounds import operator_norm_bounds
from opnorm_jax._program import slopes
from opnorm_jax._program.convolution import kernel_letters, read_convolution
from opnorm_jax._program.jaxpr import gives_floats, is_real, p
from opnorm_jax._program.movement import (
    HOLE,
    MOVES,
    ElementMap,
    NotUnderstood,
    Source,
    identity,
    moved,
    of_table,
    with_common_sources,
)
from opnorm_jax._program.numbers import Number, hypot, largest, plus, times
from opnorm_jax._program.ranges import ACTIVATION_RANGES, Range, range_of
from opnorm_jax._program.rules import Refused, is_signal, refused, rule_of

_SETTLE = 40
"""Operations after which a bound is computed at once, so that no chain of them is longer than Python's stack."""

_computing: contextvars.ContextVar[Signal | None] = contextvars.ContextVar("computing", default=None)
"""The signal whose bound is being computed."""


class Layer(NamedTuple):
    """A convolution or a matrix product whose norm is not taken yet: a factor per channel can still join its kernel."""

    kernel: Any
    conv: Conv
    before: Signal  # its input
    scale: Number  # what all of it is multiplied by
    axis: int  # of the output's channels
    image: ElementMap | None = None  # which of its elements each of a convolution's operand is
    roundings: int = 0  # of the kernel's entries
    lost: Number = 0.0  # the norm of what underflow took from the kernel is at most this

    def bound(self) -> Number:
        norm = _upper(self.kernel, self.conv)
        if not isinstance(norm, jax.core.Tracer):
            norm = float(norm)
        # Each rounding changes every entry by half an eps at most, hence the norm by at most so much of itself: no tap
        # is larger than the whole, and its Frobenius norm is at most the root of its rank times that.
        *taps, i, o = canonical_shape(self.kernel, self.conv)
        slack = 1 + self.roundings * float(jnp.finfo(self.kernel.dtype).eps) * math.prod(taps) * math.sqrt(min(i, o))
        subnormal = _largest_lost(self.kernel, self.conv) if _has_subnormal(self.kernel) else 0.0
        return times(self.before.bound, plus([times(norm, slack), self.lost, subnormal]), self.scale)


def _largest_lost(kernel: jax.Array, conv: Conv) -> float:
    """Bounds the norm of a kernel of this shape whose entries are no larger than the smallest normal number."""
    *taps, i, o = canonical_shape(kernel, conv)
    return float(jnp.finfo(kernel.dtype).tiny) * math.prod(taps) * math.sqrt(i * o)


def _has_subnormal(kernel: jax.Array) -> bool:
    """Tells whether a known array holds numbers that count as zero because they are too small."""
    if isinstance(kernel, jax.core.Tracer):
        return False
    array = np.asarray(kernel)
    return bool(((array != 0) & (abs(array) < float(jnp.finfo(kernel.dtype).tiny))).any())


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
        run: Any = None,
    ):
        self.shape, self.eqn, self.ins, self.index, self.run = shape, eqn, list(ins), index, run
        self.compute, self._bound = compute, bound
        self.used: list[Signal] = []  # the signals whose bounds its own was computed from
        if elements is not None:
            self.elements = elements
        self.depth = 1 + max((value.depth for value in ins if is_signal(value)), default=0)
        if self.depth > _SETTLE or (eqn is not None and eqn.primitive in (p.conv_general_dilated_p, p.dot_general_p)):
            for value in self.ins if self.depth <= _SETTLE else [self]:
                if is_signal(value):
                    value.settle()
            self.depth = 1

    def settle(self) -> None:
        """Computes the bound and the range now. If there is none, whoever needs it hears of that."""
        try:
            self.range  # noqa: B018
            self.bound  # noqa: B018
        except Refused:
            pass

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bound(self) -> Number:
        """Raises ``Refused`` with the operation that has no bound."""
        if (asking := _computing.get()) is not None:
            asking.used.append(self)
        if self._bound is None:
            token = _computing.set(self)
            try:
                self._bound = self._computed_bound()
            finally:
                _computing.reset(token)
        return self._bound

    def _computed_bound(self) -> Number:
        if self.compute is not None:
            return self.compute()
        if self.layer is not None:
            return self.layer.bound()
        if not self._is_own_source:
            return bound_of(self.elements)
        if (found := slopes.find(self)) is not None:
            name, inner, slope, _ = found
            if not isinstance(slope, jax.core.Tracer) and not np.isfinite(slope):
                raise Refused(f"{name} on {self.shape} has a parameter out of its domain.")
            return times(inner.bound, slope)
        if (inner := _softmax_of(self)) is not None:
            return times(inner.bound, 0.5)
        found = rule_of(self.eqn, self.index)(self.eqn, self.ins)
        found = found[self.index] if isinstance(found, list) else found
        if found is None:
            raise refused(self.eqn)
        return found

    @functools.cached_property
    def range(self) -> Range:
        """The numbers between which all elements lie, for every input."""
        if self.eqn is not None:
            if (found := slopes.find(self)) is not None and found[0] in ACTIVATION_RANGES:
                return ACTIVATION_RANGES[found[0]]
            if _softmax_of(self) is not None:
                return 0.0, 1.0
        return range_of(self)

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
            known = lambda n: None if is_unknown(self.ins[n]) else np.asarray(self.ins[n])
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
        if self.eqn is None or not is_real(self.eqn) or not gives_floats(self.eqn):
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
        """Returns a layer whose output is only laid out anew, as by ``vmap``, its channels still along one axis."""
        (signal, *_), elements = self.ins, self.elements
        if not is_signal(signal) or signal.layer is None or signal.size != self.size:
            return None
        if elements.axes is None or len(elements.sources) != 1:
            return None
        source = elements.sources[0]
        layer = source.owner.layer
        if layer is None or source.size != self.size:
            return None
        step, count = math.prod(source.shape[layer.axis + 1 :]), source.shape[layer.axis]
        for axis, entries in enumerate(elements.axes):
            channels = entries - entries[0]
            if len(entries) == count and np.array_equal(channels, step * np.arange(count)):
                return layer._replace(axis=axis)
        return None


def _softmax_of(signal: Signal) -> Signal | None:
    r"""Returns the signal that this is the softmax of, over some axes: :math:`diag(p) - p p^T` has norm 1/2 at most.

    It is exp(x - m) over its own sum, where m is the same along those axes. What m is makes no difference.
    """
    made_by = lambda value, name: is_signal(value) and value.eqn is not None and _name(value) == name
    if not is_real(signal.eqn) or not made_by(signal, "div"):
        return None
    if not made_by(signal.ins[0], "exp") or not is_signal(signal.ins[1]):
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


def is_unknown(value: Any) -> bool:
    return is_signal(value) or isinstance(value, jax.core.Tracer)


def bound_of(elements: ElementMap) -> Number:
    """Returns the bound of an array whose elements are other signals' elements."""
    copies = zip(elements.copies, elements.sources)
    return hypot([times(source.owner.bound, math.sqrt(count)) for count, source in copies if count])


def _convolution(eqn: Any, image: Any, kernel: Any) -> Layer | None:
    if is_signal(kernel):
        return None  # refused by the operation's rule
    for elements in (image.elements, _assembled(image)):
        if elements is None:
            continue
        try:
            layer = _layer(eqn, kernel, elements)
        except ValueError:  # padded in a way of its own, say: then the padding is a layer by itself
            continue
        if not {"EDGE", "REFLECT"} & set(fills(layer.conv)):
            return layer
    try:
        return layer_alone(eqn, image, kernel)
    except ValueError as error:
        raise Refused(f"conv_general_dilated on {image.shape} has none known here: {error}.") from None


def layer_alone(eqn: Any, image: Signal, kernel: Any) -> Layer:
    """Returns a convolution as a layer of its own operand, whatever that was made of; a ValueError says why not."""
    return _layer(eqn, kernel, identity(Source(image.shape, owner=image)))


def _layer(eqn: Any, kernel: Any, elements: ElementMap) -> Layer:
    """Returns a convolution as a layer of the one signal that its operand's elements come from."""
    numbers = eqn.params["dimension_numbers"]
    letters = dict(zip(numbers.rhs_spec, kernel_letters(eqn)))
    layout = "".join(letters[n] for n in range(kernel.ndim))
    conv = read_convolution(eqn, elements, layout, [False] * (kernel.ndim - 2))
    return Layer(jnp.asarray(kernel), conv, elements.sources[0].owner, 1.0, numbers.out_spec[1], elements)


def _assembled(image: Signal) -> ElementMap | None:
    """Returns where an image's elements lie in a concatenation that all of them come from, if there is one."""
    if len(image.elements.sources) < 2:
        return None
    stack, seen = [image], set()
    while stack:
        signal = stack.pop()
        sources = signal.elements.sources
        all_of_them = set(sources) == set(image.elements.sources) and signal.size == sum(s.size for s in sources)
        if signal is not image and all_of_them and signal.elements.is_injective:
            return _over(signal, image)
        moves = [v for v in signal.ins if is_signal(v) and v.eqn is not None and _name(v) in MOVES]
        stack += [value for value in moves if id(value) not in seen]
        seen |= set(map(id, moves))
    return None


def _over(whole: Signal, image: Signal) -> ElementMap:
    """Returns which element of one signal each element of another is. They have the same sources, all of them there."""
    places, parts = (each.numbers() for each in with_common_sources([whole.elements, image.elements]))  # type: ignore[union-attr]
    inverse = np.empty(whole.size, np.int64)
    inverse[places.ravel()] = np.arange(whole.size)
    table = np.where(parts < 0, HOLE, inverse[np.maximum(parts, 0)])
    return of_table((Source(whole.shape, owner=whole),), table)


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
    """Returns a layer times a constant for each of its channels."""
    traced = isinstance(factor, jax.core.Tracer)
    dtype = jnp.promote_types(layer.kernel.dtype, jnp.asarray(factor).dtype)
    shape = (1,) * (rank - np.ndim(factor)) + np.shape(factor)
    if any(length > 1 and n != layer.axis for n, length in enumerate(shape)):
        return None
    factor = factor.astype(dtype) if traced else np.asarray(factor, np.float64)
    if name == "div":
        with np.errstate(divide="ignore"):
            factor = 1 / factor
        if traced:  # an inverse may underflow
            factor = jnp.where(factor == 0, float(jnp.finfo(dtype).tiny), factor)
    top = largest(factor)
    scale = times(layer.scale, top)
    if factor.size == 1:
        return layer._replace(scale=scale, roundings=layer.roundings + 1)
    xp, kernel = (jnp if traced else np), layer.kernel.astype(dtype)
    relative = along_outputs(jnp.asarray(factor / xp.where(top > 0, top, 1), dtype).ravel(), layer.conv)
    # Underflow of the quotient, or of the product, changes an entry by the smallest normal number at most.
    lost = times(_largest_lost(kernel, layer.conv), plus([1.0, largest(kernel)]))
    lost = plus([layer.lost, lost])
    return layer._replace(kernel=kernel * relative, scale=scale, roundings=layer.roundings + 5, lost=lost)
