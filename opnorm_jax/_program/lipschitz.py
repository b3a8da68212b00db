"""A bound on a whole network's Lipschitz constant, from the bounds on its layers.

The traced program is run once more, on real values wherever they do not depend on the input, and on bounds wherever
they do. Every rule below is a theorem about one operation; whatever has none is refused by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import Conv
from opnorm_jax._kernel.bounds import operator_norm_bounds
from opnorm_jax._program.jaxpr import (
    Literal,
    all_pixels,
    conv_of,
    is_identity,
    kernel_letters,
    moved_pixels,
    opened,
    p,
    programs_inside,
)
from opnorm_jax._program.movement import Pixels

# Elementwise, by the largest slope.
_SLOPES = {"abs": 1, "asinh": 1, "atan": 1, "cos": 1, "erf": 2 / math.sqrt(math.pi), "logistic": 0.25, "neg": 1}
_SLOPES |= {"sin": 1, "sort": 1, "tanh": 1, "reduce_max": 1, "reduce_min": 1}
# Results made of the operand's numbers, none of them twice.
_SELECTIONS = {"dynamic_slice", "expand_dims", "reshape", "rev", "slice", "split", "squeeze", "transpose"}
# jax.nn's own functions that are not made of the above, by the largest slope given their parameter.
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "celu": lambda alpha=1.0: 1.0,
    "elu": lambda alpha=1.0: jnp.maximum(1.0, jnp.abs(alpha)),
    "hard_tanh": lambda: 1.0,
    "leaky_relu": lambda slope=0.01: jnp.maximum(1.0, jnp.abs(slope)),
    "silu": lambda: 1.09983945,
    "softplus": lambda: 1.0,
}


def lipschitz_bound(fn: Callable[..., Any], params: Any, x: Any) -> jax.Array:
    r"""An upper bound on the Lipschitz constant of ``x -> fn(params, x)``, in the Euclidean norm of all of x.

    In a sequential network, the product of its layers' certified norms (:func:`operator_norm_bounds`, for the padding
    and strides really used) with the slopes of what stands between them; where paths are summed, the sum of theirs;
    where they are concatenated, the root of the sum of squares. A factor per output channel that follows a convolution,
    batch normalisation's on running statistics for one, is folded into its kernel before the norm is taken.

    It is an upper bound, often far above the truth: norms of a product are below products of norms.

    Args:
      fn: a function of the parameters and of one array. Other arguments by closure, as in
        ``lambda params, x: model.apply({"params": params, "batch_stats": stats}, x, train=False)``.
      params: a tree of arrays.
      x: an example input, for its shape and dtype: an array or a ``jax.ShapeDtypeStruct``. The bound holds for every
        input of this shape. As no example of a batch influences another, the bound for one is that for a batch.

    Returns:
      A scalar. It is for the function in exact arithmetic: the rounding of evaluating ``fn`` itself is not in it.

    Raises:
      ValueError: ``fn`` applies to the input an operation that has no Lipschitz constant, or none known here (products
        of two paths as in attention, division by a norm or by a batch's own statistics, exp, branches on the input):
        the message names it. Activations: those of ``jax.nn`` made of max, min, tanh, logistic, and ``leaky_relu``,
        ``elu``, ``celu``, ``selu``, ``silu``, ``softplus``, ``hard_tanh``.

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
    program = jax.make_jaxpr(lambda x: fn(params, x))(x)
    outs = _run(program, [_Signal(1.0)])
    return jnp.asarray(_hypot([out.bound for out in outs if isinstance(out, _Signal)]))


class _Signal:
    """A value that depends on the input: by how much at most, over the input's own change."""

    def __init__(
        self,
        bound: Any = None,
        *,
        reason: str | None = None,
        layer: tuple[jax.Array, Conv, Any, int] | None = None,
        image: tuple[_Signal, tuple[Pixels | None, ...]] | None = None,
    ):
        self.reason = reason  # why there is no bound
        self.layer = layer  # (kernel, Conv, bound of its input, its channels' axis): the norm is not taken yet
        self.image = image  # the signal whose pixels this one's are, and which
        self._bound = bound

    @property
    def bound(self) -> Any:
        if self.reason:
            raise ValueError(f"expected fn to be made of operations with a known Lipschitz constant; {self.reason}")
        if self._bound is None and self.layer:
            kernel, conv, before, _ = self.layer
            self._bound = before * _upper(kernel, conv)
        elif self._bound is None:
            origin, pixels = self.image  # type: ignore[misc]
            copies = [np.bincount(axis.index[axis.index >= 0]).max(initial=1) for axis in pixels if axis]
            self._bound = origin.bound * math.sqrt(math.prod(int(n) for n in copies))
        return self._bound


@functools.partial(jax.jit, static_argnums=1)  # which leaves the lower bound uncomputed
def _upper(kernel: jax.Array, conv: Conv) -> jax.Array:
    return operator_norm_bounds(kernel, conv).upper


def _hypot(bounds: Sequence[Any]) -> Any:
    return bounds[0] if len(bounds) == 1 else jnp.sqrt(sum(jnp.square(bound) for bound in bounds))


def _run(program: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of a program: arrays, or signals where they depend on the input."""
    jaxpr = opened(program)
    known = dict(zip(jaxpr.constvars, getattr(program, "consts", ()))) | dict(zip(jaxpr.invars, values, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _results(eqn, [read(v) for v in eqn.invars])))
    return [read(v) for v in jaxpr.outvars]


def _results(eqn: Any, ins: list[Any]) -> list[Any]:
    inner = programs_inside(eqn)
    loops = eqn.primitive in (p.scan_p, p.while_p, p.cond_p)
    if not any(isinstance(value, _Signal) for value in ins) and (loops or not inner):
        outs = eqn.primitive.bind(*ins, **eqn.params)
        return outs if eqn.primitive.multiple_results else [outs]
    if reasons := [value.reason for value in ins if isinstance(value, _Signal) and value.reason]:
        return [_Signal(reason=reasons[0]) for _ in eqn.outvars]
    if is_identity(eqn):
        return (
            ins if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating) else [_refused(eqn, "makes integers of it")]
        )
    if eqn.primitive is p.scan_p and not eqn.params["reverse"]:
        return _unrolled(eqn, inner[0], ins)
    if eqn.primitive is p.cond_p and not isinstance(ins[0], (_Signal, jax.core.Tracer)):
        return _run(inner[int(ins[0])], ins[1:])
    if inner and not loops and len(opened(inner[0]).invars) == len(ins):
        slope = _activation(eqn, inner[0], ins)
        return _run(inner[0], ins) if slope is None else [_Signal(ins[0].bound * slope)]
    return _operation(eqn, ins)


def _refused(eqn: Any, why: str = "has none known here") -> _Signal:
    shapes = ", ".join(str(getattr(v.aval, "shape", "")) for v in eqn.invars)
    return _Signal(reason=f"{eqn.primitive.name} on {shapes}, which depends on the input, {why}.")


def _unrolled(eqn: Any, body: Any, ins: list[Any]) -> list[Any]:
    """A scan, one step at a time."""
    jaxpr, carried = opened(body), len(eqn.outvars)
    scanned = [v.aval.ndim > w.aval.ndim for v, w in zip(eqn.invars, jaxpr.invars, strict=True)]
    stacked = [v.aval.ndim > w.aval.ndim for v, w in zip(eqn.outvars, jaxpr.outvars, strict=True)]
    carried = stacked.count(False)
    first = scanned.count(False) - carried  # constants come first, then carries, then what is scanned
    carry, rows = ins[first : first + carried], []
    for n in range(eqn.params["length"]):
        part = [_Signal(value.bound) if isinstance(value, _Signal) else value[n] for value in ins[first + carried :]]
        outs = _run(body, [*ins[:first], *carry, *part])
        carry, row = outs[:carried], outs[carried:]
        rows.append(row)
    return [*carry, *(_stacked(list(column)) for column in zip(*rows))]


def _stacked(values: list[Any]) -> Any:
    signals = [value for value in values if isinstance(value, _Signal)]
    return _Signal(_hypot([signal.bound for signal in signals])) if signals else jnp.stack(values)


def _activation(eqn: Any, inner: Any, ins: list[Any]) -> Any:
    """The slope of one of ``jax.nn``'s activations, told by its name and by being the same program as jax's own."""
    name, slope = eqn.params.get("name"), None
    if name in _ACTIVATIONS and isinstance(ins[0], _Signal) and not any(isinstance(v, _Signal) for v in ins[1:]):
        operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in eqn.invars]
        for genuine in jax.make_jaxpr(getattr(jax.nn, name))(*operands).jaxpr.eqns:
            if genuine.params.get("name") == name and str(opened(genuine.params["jaxpr"])) == str(opened(inner)):
                slope = _ACTIVATIONS[name](*ins[1:])
    return slope


def _operation(eqn: Any, ins: list[Any]) -> list[Any]:
    """The rule of one operation, at least one of whose operands is a signal."""
    name, signals = eqn.primitive.name, [value for value in ins if isinstance(value, _Signal)]
    one, (first, *rest) = len(signals) == 1, ins
    if eqn.primitive is p.conv_general_dilated_p:
        return [_convolved(eqn, ins)]
    if eqn.primitive is p.dot_general_p:
        return [_multiplied(eqn, ins)]
    if name in ("add", "add_any", "sub", "max", "min"):
        # A scalar is added to, or compared with, every element.
        size = math.prod(eqn.outvars[0].aval.shape)
        parts = [
            value.bound * math.sqrt(size / max(1, math.prod(v.aval.shape)))
            for value, v in zip(ins, eqn.invars)
            if isinstance(value, _Signal)
        ]
        if name in ("max", "min"):
            return [_Signal(_hypot(parts))]
        # A shifted layer is still one, whose scale may follow. An image's pixels would have to move with their shift.
        return [_Signal(layer=signals[0].layer) if one and signals[0].layer else _Signal(sum(parts))]
    if name in ("mul", "div") and one and (name == "mul" or first is signals[0]):
        factor = jnp.asarray(rest[0] if first is signals[0] else first)
        return [_scaled(eqn, 0 if first is signals[0] else 1, signals[0], factor if name == "mul" else 1 / factor)]
    if name in _SLOPES and len(ins) == 1:
        return [_Signal(signals[0].bound * _SLOPES[name])]
    if name == "clamp" and one and ins[1] is signals[0]:
        return [_Signal(signals[0].bound)]
    if name == "select_n" and not isinstance(first, _Signal):
        return [_Signal(_hypot([signal.bound for signal in signals]))]
    shape = getattr(eqn.invars[0].aval, "shape", ())
    size, out_size = math.prod(shape), math.prod(eqn.outvars[0].aval.shape)
    if name == "reduce_sum":
        return [_Signal(signals[0].bound * math.sqrt(size / max(out_size, 1)))]
    if name in ("reduce_window_max", "reduce_window_sum") and one and isinstance(first, _Signal):
        return [_Signal(first.bound * _window(eqn))]
    moved = name in _SELECTIONS | {"broadcast_in_dim", "pad"} and one and first is signals[0]
    if moved or name == "concatenate":
        return [_moved(eqn, ins, signals, math.sqrt(out_size / max(size, 1))) for _ in eqn.outvars]
    return [_refused(eqn) for _ in eqn.outvars]


def _scaled(eqn: Any, position: int, signal: _Signal, factor: jax.Array) -> _Signal:
    """A signal times a constant; one per output channel of a convolution goes into its kernel."""
    if signal.layer:
        kernel, conv, before, axis = signal.layer
        shape = (1,) * (len(eqn.outvars[0].aval.shape) - factor.ndim) + factor.shape
        if all(length == 1 or n == axis for n, length in enumerate(shape)):
            channels = [-1 if letter == "O" else 1 for letter in conv.kernel_layout]
            return _Signal(layer=(kernel * factor.reshape(channels).astype(kernel.dtype), conv, before, axis))
    copies = math.prod(eqn.outvars[0].aval.shape) / max(1, math.prod(eqn.invars[position].aval.shape))  # of a scalar
    return _Signal(signal.bound * jnp.max(jnp.abs(factor)) * math.sqrt(copies))


def _moved(eqn: Any, ins: list[Any], signals: list[_Signal], repetition: float) -> _Signal:
    """Numbers moved about: pixels of one image stay so, as long as what is between them is zero."""
    images = [value.image or (value, None) if isinstance(value, _Signal) else (None, None) for value in ins]
    origins = {id(origin) for origin, _ in images}
    fill = ins[-1] if eqn.primitive is p.pad_p else None
    zeros = fill is not None and not isinstance(fill, jax.core.Tracer) and not np.any(fill)
    if len(origins) == 1 or zeros:
        origin = images[0][0]
        pixels = moved_pixels(eqn, [its for _, its in images], len(origins) == 1, zeros)
        if pixels is not None and origin is not None:
            return _Signal(image=(origin, pixels))
    if eqn.primitive is p.broadcast_in_dim_p:
        return _Signal(signals[0].bound * max(1.0, repetition))
    return _Signal(_hypot([signal.bound for signal in signals]))


def _window(eqn: Any) -> float:
    """Of pooling: a sum's norm is at most the root of its window's size times the windows that hold a pixel."""
    size, held = 1, 1
    dilations = eqn.params["window_dilation"]
    for w, s, d in zip(eqn.params["window_dimensions"], eqn.params["window_strides"], dilations, strict=True):
        size *= w
        held *= w if d > 1 else -(-w // s)
    return math.sqrt(held * (size if eqn.primitive.name == "reduce_window_sum" else 1))


def _convolved(eqn: Any, ins: list[Any]) -> _Signal:
    image, kernel = ins
    if isinstance(kernel, _Signal) or not isinstance(image, _Signal):
        return _refused(eqn, "as a convolution's kernel has none known here")
    numbers = eqn.params["dimension_numbers"]
    try:
        letters = dict(zip(numbers.rhs_spec, kernel_letters(eqn)))
        layout = "".join(letters[n] for n in range(kernel.ndim))
        flipped = [False] * (kernel.ndim - 2)
        origin, pixels = image.image or (image, all_pixels(eqn.invars[0].aval.shape))
        try:
            conv = conv_of(eqn, pixels, layout, flipped)
        except ValueError:  # padded by reflection, say: then the padding is a layer of its own
            origin, pixels = image, all_pixels(eqn.invars[0].aval.shape)
            conv = conv_of(eqn, pixels, layout, flipped)
    except ValueError as error:
        return _refused(eqn, str(error))
    return _Signal(layer=(jnp.asarray(kernel), conv, origin.bound, numbers.out_spec[1]))


def _multiplied(eqn: Any, ins: list[Any]) -> _Signal:
    contracted, batched = eqn.params["dimension_numbers"]
    if all(isinstance(value, _Signal) for value in ins):
        return _refused(eqn, "times another such, has none (attention?)")
    me = 1 if isinstance(ins[0], _Signal) else 0
    matrix = jnp.asarray(ins[me])
    free = [n for n in range(matrix.ndim) if n not in contracted[me] and n not in batched[me]]
    size = lambda axes: math.prod(matrix.shape[n] for n in axes)
    shape = (size(batched[me]), size(contracted[me]), size(free))
    matrices = matrix.transpose(*batched[me], *contracted[me], *free).reshape(shape)
    norms = jax.vmap(lambda m: _upper(m, Conv(())))(matrices)
    return _Signal(ins[1 - me].bound * jnp.max(norms))
