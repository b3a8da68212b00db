"""A bound on a whole network's Lipschitz constant, from the bounds on its layers.

The traced program is run once more: on real values wherever they do not depend on the input, and on :class:`Signal`
objects wherever they do. A signal bounds its own change when something asks: from where its elements come if they were
only moved, from its convolution's norm, from a known activation, or by the rule of the operation that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._program.jaxpr import (
    Literal,
    called_program,
    computes_narrowly,
    evaluate,
    is_identity,
    open_jaxpr,
    p,
    programs_inside,
    quantises,
    scan_split,
    takes_real_part,
    touches_reference,
    trace,
    widened,
)
from opnorm_jax._program.movement import ElementMap, NotUnderstood, is_plain, row, run_on, stack
from opnorm_jax._program.numbers import hypot, maximum, minimum, rounded_up, times, widest
from opnorm_jax._program.rules import Refused, is_signal
from opnorm_jax._program.signals import Signal, bound_of, is_unknown
from opnorm_jax._program.stages import semidefinite_bound

METHODS = ("sdp", "product")


def lipschitz_bound(fn: Callable[..., Any], params: Any, x: Any, *, method: str = "sdp") -> jax.Array:
    r"""Computes an upper bound on the Lipschitz constant of ``x -> fn(params, x)``, in the Euclidean norm of all of x.

    With ``method="product"`` it is the product of the layers' certified norms (:func:`operator_norm_bounds`, for the
    padding and strides really used) with the largest slopes of what stands between them. Where paths are summed it is
    the sum of theirs; where they are concatenated, the root of the sum of squares. A factor per output channel that
    follows a layer, such as that of batch normalisation on running statistics, is folded into its kernel before the
    norm is taken. Operations that only move numbers count exactly: the root of the largest number of copies of one
    element.

    With ``method="sdp"``, the default, what is known of a map is carried from layer to layer at every frequency, not as
    one number: a semidefinite bound, LipSDP, cut into small matrices by the Fourier transform. It is never above the
    product, and often far below. It carries convolutions (circular or zero-padded, strided, dilated, grouped), sums of
    paths with the identity or with a strided slice, channels that are concatenated, picked or constant, factors per
    channel, activations of any interval of slopes, average pools, sums over all pixels, and dense layers. Linear
    networks of circular layers come out exactly. What it does not carry counts as in the product; then it begins anew.

    It is an upper bound, and can still be far above the truth.

    Args:
      fn: a function of the parameters and of one array. Pass other arguments by closure, as in
        ``lambda params, x: model.apply({"params": params, "batch_stats": stats}, x, train=False)``.
      params: a tree of arrays. Leaves of other types are passed on as they are, so that modules of Equinox and states
        of Flax NNX will do.
      x: an example input, for its shape and dtype: an array or a ``jax.ShapeDtypeStruct``. The bound holds for every
        input of this shape. As no example of a batch influences another, the bound for one is that for a batch.
      method: ``"sdp"`` or ``"product"``.

    Returns:
      A scalar, float32, or float64 if ``x`` is float64. It is for the function in exact arithmetic, casts included: the
      rounding of evaluating ``fn`` itself is not in it. It is computed in at least float32 whatever dtype the network
      computes in, and rounded upwards.

    Raises:
      ValueError: ``fn`` applies to the input an operation that has no Lipschitz constant, or none known here (products
        of two paths as in attention, division by a norm or by a batch's own statistics, exp, branches on the input).
        The message names it. Products, quotients, powers, roots and exponentials are accepted where functions such as
        ``jnp.clip``, ``jnp.tanh`` and ``jax.nn.sigmoid`` hold their operands between limits, as in gated units and in
        squeeze and excitation behind a bounded activation. Activations are recognised by their expression: those of
        ``jax.nn`` except ``glu``, ``standardize`` and ``log_softmax``, and common ones written by hand.
      ValueError: ``method`` is none of the two.
      TypeError: ``x`` is no array of a real floating dtype, or ``fn`` is no function.

    Cost: one norm per layer. With ``"sdp"`` also, for every activation or residual block, some 30 factorisations of
    matrices of a few times the number of channels at up to 10^9 operations' worth of frequencies, and two at each
    frequency. They are computed by NumPy in double precision if ``params`` are known. Then the multipliers of all
    blocks are improved together, which takes some 10 seconds for a ResNet-20. If ``params`` are traced, the matrices
    are compiled: a second or two for each kind of block. Parts whose matrices would have more than 2048 rows, or that
    would carry more than 1 GiB, are left to the product.

    Differentiable with respect to ``params``, and may itself be inside ``jit``. The multipliers of the semidefinite
    bound are found by a search that takes no part in the derivative.

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

    References:
      Fazlyab, Robey, Hassani, Morari and Pappas, Efficient and accurate estimation of Lipschitz constants for deep
      neural networks, 2019. Its multipliers here are one for each channel of each activation; if ``params`` are traced,
      one for each activation.
    """
    if not callable(fn):
        raise TypeError(f"expected fn to be a function of the parameters and of one array, got {fn!r}.")
    if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected x to be an array of a real floating dtype, or its ShapeDtypeStruct, got {x!r}.")
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {METHODS}, got {method!r}.")
    traced = trace(fn, params, (x,), {})
    *values, _ = traced.values
    signal = Signal(tuple(x.shape), bound=1.0)
    try:
        outs = [out for out in _Run().run(traced.program, [*map(widest, values), signal]) if is_signal(out)]
        bound = hypot([out.bound for out in outs])
        if method == "sdp" and len(outs) == 1:
            dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
            bound = minimum([bound, semidefinite_bound(signal, outs[0], dtype)])
    except Refused as error:
        raise ValueError(f"expected fn to be made of operations with a known Lipschitz constant; {error}") from None
    return rounded_up(bound, jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


class _Run:
    """One run of a program on arrays and signals."""

    def __init__(self):
        self.pairs: dict[Any, Signal] = {}
        self.made: dict[Any, Signal] = {}

    def run(self, program: Any, values: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a program: arrays, or signals where they depend on the input."""
        jaxpr = open_jaxpr(program)
        consts = [widest(value) for value in getattr(program, "consts", ())]
        known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, values, strict=True))
        read = lambda v: (
            widest(np.asarray(v.val, getattr(v.aval, "dtype", None))) if isinstance(v, Literal) else known[v]
        )
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
            floats = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)
            kept = floats and not quantises(eqn) and not takes_real_part(eqn)
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
        dtypes = [str(getattr(v.aval, "dtype", "")) for v in (*eqn.invars, *eqn.outvars)]
        key = (eqn.primitive, index, repr(eqn.params), *dtypes, *map(_identity, ins))
        key = key if not programs_inside(eqn) else object()
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
        """Returns the results of an equation on arrays, in at least single precision where that can be had."""
        if not computes_narrowly(eqn):
            return evaluate(program, eqn, ins)
        if is_identity(eqn) and quantises(eqn):
            return [widest(eqn.primitive.bind(*map(jnp.asarray, ins), **eqn.params))]
        if eqn.primitive.name == "bitcast_convert_type":
            return [widest(out) for out in evaluate(program, eqn, [_in_its_dtype(eqn, *ins)])]
        if inner := called_program(eqn):
            return self.run(inner, ins)
        if eqn.primitive is p.reduce_precision_p:
            return ins
        if eqn.primitive is p.scan_p:
            return self._scan(eqn, ins)
        if eqn.primitive is p.cond_p:
            return self._cond(eqn, ins)
        if eqn.primitive is p.while_p and not any(isinstance(value, jax.core.Tracer) for value in ins):
            return self._while(eqn, ins)
        name = eqn.primitive.name
        if name == "scatter-add" or (name == "scatter" and is_plain(eqn)):
            return run_on(eqn, ins)
        if programs_inside(eqn):
            raise Refused(f"{name} on parameters computes in less than single precision: cast them to float32 before.")
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
        """Returns the results of a scan whose rows do not depend on one another, or None if they do."""
        consts, carries = scan_split(eqn)
        carry, rows = ins[consts : consts + carries], []
        for n in range(eqn.params["length"]):
            n = eqn.params["length"] - 1 - n if eqn.params["reverse"] else n
            alone = Signal(scanned.shape[1:], bound=1.0)
            alone.range = scanned.range
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

    def _while(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """A loop over known values alone."""
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = ins[of_cond + of_body :]
        while bool(self.run(eqn.params["cond_jaxpr"], [*ins[:of_cond], *carry])[0]):
            carry = self.run(eqn.params["body_jaxpr"], [*ins[of_cond : of_cond + of_body], *carry])
        return carry

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
        """Returns the elements of ``max(a, b)`` or ``min(a, b)`` as those of the sorted pair, of which both are a part.

        Sorting is nonexpansive, so the pair's bound is that of a and b together: MaxMin counts once, not twice.
        """
        if not all(is_signal(value) and value.shape == signal.shape for value in signal.ins):
            return None
        both = [value.elements for value in signal.ins]
        numbers = [elements.numbers() for elements in both]
        if min(int(each.min()) for each in numbers) < 0:
            return None  # constants among them could differ from pair to pair
        key = frozenset((elements.sources, each.shape, each.tobytes()) for elements, each in zip(both, numbers))
        if key not in self.pairs:
            pair = stack(both, signal.shape)
            self.pairs[key] = Signal((2, *signal.shape), compute=lambda: bound_of(pair), ins=signal.ins)
        return row(self.pairs[key].elements, int(signal.eqn.primitive.name == "max"))


def _in_its_dtype(eqn: Any, value: Any) -> Any:
    """Returns the operand of an equation that reads its bits in the dtype that it has there."""
    dtype = eqn.invars[0].aval.dtype
    if value.dtype == dtype:
        return value
    if isinstance(value, jax.core.Tracer) or np.any(np.asarray(value) != (own := value.astype(dtype))):
        raise Refused(f"{eqn.primitive.name} reads the bits of a {dtype} that was computed from parameters.")
    return own


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
        return Signal(aval.shape, compute=lambda: hypot([signal.bound for signal in signals]))


def _identity(value: Any) -> Any:
    """Returns the same for two operands that are equal for sure."""
    if is_unknown(value) or np.size(value) != 1 or not jnp.issubdtype(value.dtype, np.number):
        return id(value)
    return np.shape(value), str(value.dtype), np.asarray(value).item()
