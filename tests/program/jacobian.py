"""A float64 oracle for traced programs: a small interpreter in NumPy, and the slopes of what it runs.

A program is traced in float64, flattened and evaluated by NumPy, equation by equation; casts between floating dtypes
do nothing. Equations that NumPy has no name for are left to jax itself, in float64. Nothing here is imported from
opnorm_jax. ``test_random_programs.py`` checks the interpreter against jax.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class Program:
    """``fn(params, x)`` as a function of ``x`` alone, in float64.

    It is traced in float64 too, or, with ``as_it_is``, in its own dtypes: constants are then those of narrow floats.
    """

    def __init__(self, fn, params, x, as_it_is=False):
        self.shape = tuple(x.shape)
        self.size = math.prod(self.shape)
        flat = lambda params, x: jax.tree.leaves(fn(params, x))
        with jax.enable_x64(not as_it_is):
            wide = jax.tree.map(_wide, params)
            traced = params if as_it_is else wide
            dtype = x.dtype if as_it_is else jnp.float64
            jaxpr = jax.make_jaxpr(flat)(traced, jax.ShapeDtypeStruct(self.shape, dtype))
        self.run = _Flat(jaxpr, [*jax.tree.leaves(wide), _UNKNOWN])

    def __call__(self, x):
        """All outputs that are numbers, one after another."""
        outs = self.run([np.asarray(x, np.float64).reshape(self.shape)])
        return np.concatenate([np.ravel(np.asarray(out, np.float64)) for out in outs] or [np.zeros(0)])

    def jacobian(self, x, step=1e-7):
        """One-sided differences, a column for each element of ``x``."""
        x = np.asarray(x, np.float64).reshape(-1)
        here = self(x)
        return np.stack([(self(x + step * row) - here) / step for row in np.eye(x.size)], -1)

    def linear_part(self):
        """The matrix of an affine program, or ``None`` if it is not affine."""
        size = math.prod(self.shape)
        offset = self(np.zeros(size))
        matrix = np.stack([self(row) - offset for row in np.eye(size)], -1)
        rng = np.random.default_rng(0)
        for scale in (1.0, -100.0):
            x = scale * rng.standard_normal(size)
            if not np.allclose(self(x) - offset, matrix @ x, rtol=1e-9, atol=1e-9 * (1 + abs(offset).max(initial=0))):
                return None
        return matrix

    def quotient(self, x, y):
        """By how much two images' results differ, over how much the images do: at most the Lipschitz constant."""
        distance = np.linalg.norm(x - y)
        with np.errstate(invalid="ignore"):  # a constant infinity, less itself
            change = np.linalg.norm(self(x) - self(y))
        return change / distance if distance and not math.isnan(change) else 0.0

    def steepest(self, points, rng, steps=(1e-3, 0.3)):
        """The largest quotient found: between random images, and along the Jacobian's top singular vector.

        A Jacobian taken by differences may straddle a kink, so it only gives directions: every value returned is the
        quotient of two images. Minus infinity says that the program was finite at none.
        """
        best, finite = 0.0, False
        points = [np.asarray(point, np.float64).reshape(-1) for point in points]
        for point in points:
            if not np.isfinite(self(point)).all():
                continue  # a constant infinity, or an overflow: no quotient says anything
            finite = True
            jacobian = self.jacobian(point)
            if not np.isfinite(jacobian).all():
                return math.inf
            if not jacobian.any():
                directions = [rng.standard_normal(point.size)]
            else:
                directions = [np.linalg.svd(jacobian, full_matrices=False)[2][0]]
            for direction in directions:
                direction = direction / np.linalg.norm(direction)
                for step in steps:
                    quotients = [
                        self.quotient(point + step * direction, point - step * direction),
                        self.quotient(point + step * direction, point),
                        self.quotient(point, point - step * direction),
                    ]
                    best = max(best, *quotients)
        for one, other in zip(points, points[1:]):
            best = max(best, self.quotient(one, other))
        return float(best) if finite else -math.inf


def _wide(value):
    if not isinstance(value, np.ndarray) and jnp.issubdtype(getattr(value, "dtype", float), jax.dtypes.extended):
        return value  # random keys
    value = np.asarray(value)
    return value.astype(np.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value


_UNKNOWN = object()


class _Flat:
    """A jaxpr with the calls in it written out, and what does not depend on the unknown inputs evaluated once."""

    def __init__(self, jaxpr, inputs):
        self.steps = []
        self.count = sum(value is _UNKNOWN for value in inputs)
        slots = iter(range(self.count))
        self.size = self.count
        inputs = [_Slot(next(slots)) if value is _UNKNOWN else value for value in inputs]
        self.outputs = self._inline(jaxpr, inputs)

    def _inline(self, jaxpr, inputs):
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict(zip(jaxpr.constvars, map(_wide, consts))) | dict(zip(jaxpr.invars, inputs))
        read = lambda v: _wide(v.val) if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            if name in _CALLS:
                inner = next(v for k, v in eqn.params.items() if k in _CALLED and isinstance(v, (ClosedJaxpr, Jaxpr)))
                outs = self._inline(inner, ins)
            elif not any(isinstance(value, _Slot) for value in ins):
                outs = _apply(eqn, ins)
            else:
                outs = [_Slot(self.size + n) for n in range(len(eqn.outvars))]
                self.size += len(outs)
                known = (name == "gather" or name.startswith("scatter")) and not isinstance(ins[1], _Slot)
                rule = (_by_index(eqn, ins) if known else None) or functools.partial(_apply, eqn)
                self.steps.append((rule, ins, outs))
            env.update(zip(eqn.outvars, outs))
        return [read(v) for v in jaxpr.outvars]

    def __call__(self, values):
        known = list(values) + [None] * (self.size - self.count)
        read = lambda value: known[value.n] if isinstance(value, _Slot) else value
        for rule, ins, outs in self.steps:
            for slot, value in zip(outs, rule([read(value) for value in ins])):
                known[slot.n] = value
        return [read(value) for value in self.outputs]


class _Slot:
    def __init__(self, n):
        self.n = n


_CALLS = {"jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"}
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")

_IDENTITY = {"copy", "copy_p", "name", "reduce_precision", "optimization_barrier", "device_put", "stop_gradient"}

_ELEMENTWISE = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asinh": np.arcsinh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "sqrt": np.sqrt,
    "cbrt": np.cbrt,
    "square": np.square,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "logistic": scipy.special.expit,
    "erf": scipy.special.erf,
    "erfc": scipy.special.erfc,
    "floor": np.floor,
    "ceil": np.ceil,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "is_finite": np.isfinite,
    "pow": lambda x, y: np.power(x, y, dtype=np.float64),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "stop_gradient": lambda x: x,
}

_REDUCTIONS = {
    "reduce_sum": np.sum,
    "reduce_prod": np.prod,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_and": np.all,
    "reduce_or": np.any,
}


def _apply(eqn, ins):
    """The results of one equation."""
    name, params = eqn.primitive.name, eqn.params
    with np.errstate(all="ignore"):
        if name in _ELEMENTWISE:
            return [_ELEMENTWISE[name](*ins)]
        if name in _IDENTITY:
            return list(ins)
        if name in _REDUCTIONS:
            return [_REDUCTIONS[name](ins[0], axis=tuple(params["axes"]))]
        if name == "scan":
            return _scan(eqn, ins)
        if name in _SCATTERS:
            return _by_index(eqn, ins)(ins)
        if rule := _RULES.get(name):
            outs = rule(ins, params)
            return outs if isinstance(outs, list) else [outs]
    return _by_jax(eqn, ins)


def _by_index(eqn, ins):
    """A gather or scatter whose indices are known: which element each is, asked of jax once."""
    name, indices = eqn.primitive.name, ins[1]
    shape = eqn.invars[0].aval.shape
    size = math.prod(shape)
    own = np.arange(1.0, size + 1).reshape(shape)
    if name == "gather":
        if eqn.params["fill_value"] not in (None, 0):
            return None
        out_of_range = math.nan if eqn.params["fill_value"] is None else 0.0
        source = np.nan_to_num(_by_jax(eqn, [own, indices])[0]).astype(int)
        return lambda values: [np.concatenate([[out_of_range], np.ravel(values[0])])[source]]
    if name == "scatter":
        count = math.prod(eqn.invars[2].aval.shape)
        new = -np.arange(1.0, count + 1).reshape(eqn.invars[2].aval.shape)
        source = _by_jax(eqn, [own, indices, new])[0].astype(int)
        source = np.where(source > 0, source - 1, size - 1 - source)
        return lambda values: [np.concatenate([np.ravel(values[0]), np.ravel(values[2])])[source]]
    if not (into := _SCATTERS.get(name)):
        return None
    inner = eqn.invars[2].aval.shape
    with jax.enable_x64(True):
        one = lambda update: jax.lax.scatter_add(
            jnp.zeros(shape),
            jnp.asarray(indices),
            update.reshape(inner),
            eqn.params["dimension_numbers"],
            mode=eqn.params["mode"],
        )
        reached = np.asarray(jax.vmap(one)(jnp.eye(math.prod(inner)))).reshape(-1, size)
    there, inside = reached.argmax(1), reached.any(1)

    def rule(values):
        out = np.array(values[0], np.float64).reshape(-1)
        into.at(out, there[inside], np.ravel(values[2])[inside])
        return [out.reshape(shape)]

    return rule


_SCATTERS = {"scatter-add": np.add, "scatter-mul": np.multiply, "scatter-max": np.maximum, "scatter-min": np.minimum}
_SCATTERS |= {name.replace("-", "_"): rule for name, rule in _SCATTERS.items()}


def _by_jax(eqn, ins):
    with jax.enable_x64(True):
        dtype = lambda v: jnp.float64 if jnp.issubdtype(v.aval.dtype, jnp.floating) else v.aval.dtype
        cast = [
            value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value), dtype(v))
            for value, v in zip(ins, eqn.invars)
        ]
        outs = eqn.primitive.bind(*cast, **eqn.params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    return [out if jnp.issubdtype(out.dtype, jax.dtypes.extended) else np.asarray(out) for out in outs]


def _convert(ins, params):
    dtype = params["new_dtype"]
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(ins[0], np.float64)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.asarray(ins[0], np.complex128)
    return np.asarray(ins[0]).astype(dtype)


def _div(ins, params):
    one, other = ins
    if np.issubdtype(np.asarray(one).dtype, np.integer):
        return np.asarray(np.trunc(one / other)).astype(np.asarray(one).dtype)
    return np.true_divide(one, other)


def _broadcast(ins, params):
    shape = [1] * len(params["shape"])
    for axis, length in zip(params["broadcast_dimensions"], np.shape(ins[0])):
        shape[axis] = length
    return np.broadcast_to(np.reshape(ins[0], shape), params["shape"])


def _pad(ins, params):
    x, fill = ins
    for axis, (low, high, interior) in enumerate(params["padding_config"]):
        x = np.moveaxis(x, axis, 0)
        length = len(x) + max(len(x) - 1, 0) * interior
        spread = np.full((length, *x.shape[1:]), fill, np.asarray(x).dtype)
        spread[:: interior + 1] = x
        lows = np.full((max(low, 0), *x.shape[1:]), fill, spread.dtype)
        highs = np.full((max(high, 0), *x.shape[1:]), fill, spread.dtype)
        spread = np.concatenate([lows, spread, highs])
        x = np.moveaxis(spread[max(-low, 0) : len(spread) - max(-high, 0)], 0, axis)
    return x


def _starts(shape, sizes, indices):
    return [int(np.clip(int(i), 0, n - size)) for i, n, size in zip(indices, shape, sizes)]


def _dynamic_slice(ins, params):
    sizes = params["slice_sizes"]
    starts = _starts(ins[0].shape, sizes, ins[1:])
    return ins[0][tuple(slice(start, start + size) for start, size in zip(starts, sizes))]


def _dynamic_update_slice(ins, params):
    out, update, *indices = ins
    out = np.array(out)
    starts = _starts(out.shape, update.shape, indices)
    out[tuple(slice(start, start + size) for start, size in zip(starts, update.shape))] = update
    return out


def _slice(ins, params):
    steps = params["strides"] or [1] * np.ndim(ins[0])
    return ins[0][tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]


def _cumulative(function):
    def rule(ins, params):
        axis, x = params["axis"], ins[0]
        x = np.flip(x, axis) if params["reverse"] else x
        out = function(x, axis=axis)
        return np.flip(out, axis) if params["reverse"] else out

    return rule


def _sort(ins, params):
    axis, keys = params["dimension"], params["num_keys"]
    if len(ins) == 1:
        return [np.sort(ins[0], axis=axis, kind="stable")]
    order = np.lexsort([np.moveaxis(key, axis, -1) for key in reversed(ins[:keys])], axis=-1)
    order = np.moveaxis(order, -1, axis)
    return [np.take_along_axis(np.asarray(value), order, axis) for value in ins]


def _windows(x, fill, params):
    """Every window's elements, along a new first axis."""
    size, strides, dilation = params["window_dimensions"], params["window_strides"], params["window_dilation"]
    base = params["base_dilation"]
    config = [(low, high, e - 1) for (low, high), e in zip(params["padding"], base)]
    x = _pad([x, fill], {"padding_config": config})
    outs = [(n - d * (w - 1) - 1) // s + 1 for n, w, s, d in zip(x.shape, size, strides, dilation)]
    found = []
    for tap in np.ndindex(*size):
        found.append(
            x[tuple(slice(t * d, t * d + s * (o - 1) + 1, s) for t, d, s, o in zip(tap, dilation, strides, outs))]
        )
    return np.stack(found)


def _reduce_window(ins, params):
    """With a reducer of its own, applied to all windows at once."""
    half = len(ins) // 2
    windows = [_windows(x, init, params) for x, init in zip(ins[:half], ins[half:])]
    found = [np.full(window.shape[1:], init) for window, init in zip(windows, ins[half:])]
    run = _flat(params["jaxpr"])
    for tap in range(len(windows[0])):
        found = run([*found, *(window[tap] for window in windows)])
    return found


def _dot(ins, params):
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    names = iter("abcdefghijklmnopqrstuvwxyz")
    one, other = [""] * np.ndim(ins[0]), [""] * np.ndim(ins[1])
    out = ""
    for i, j in zip(left_batch, right_batch):
        one[i] = other[j] = letter = next(names)
        out += letter
    for i, j in zip(left, right):
        one[i] = other[j] = next(names)
    for axes in (one, other):
        for n, letter in enumerate(axes):
            if not letter:
                axes[n] = next(names)
                out += axes[n]
    return np.einsum(f"{''.join(one)},{''.join(other)}->{out}", ins[0], ins[1])


def _conv(ins, params):
    numbers = params["dimension_numbers"]
    x, kernel = np.transpose(ins[0], numbers.lhs_spec), np.transpose(ins[1], numbers.rhs_spec)
    rank = x.ndim - 2
    e, s, d = params["lhs_dilation"], params["window_strides"], params["rhs_dilation"]
    config = [(0, 0, 0)] * 2 + [(low, high, n - 1) for (low, high), n in zip(params["padding"], e)]
    x = _pad([x, 0.0], {"padding_config": config})
    groups, batches = params["feature_group_count"], params["batch_group_count"]
    taps = kernel.shape[2:]
    outs = [(x.shape[2 + a] - d[a] * (taps[a] - 1) - 1) // s[a] + 1 for a in range(rank)]
    outs = [max(n, 0) for n in outs]
    if batches > 1:
        parts = [
            _conv_of(part, its, taps, outs, s, d) for part, its in zip(np.split(x, batches), np.split(kernel, batches))
        ]
    else:
        parts = [
            _conv_of(part, its, taps, outs, s, d) for part, its in zip(np.split(x, groups, 1), np.split(kernel, groups))
        ]
    y = np.concatenate(parts, 1)
    return np.transpose(y, np.argsort(numbers.out_spec))


def _conv_of(x, kernel, taps, outs, s, d):
    y = np.zeros((len(x), len(kernel), *outs))
    for tap in np.ndindex(*taps):
        where = tuple(
            slice(d[a] * t, d[a] * t + s[a] * (outs[a] - 1) + 1, s[a]) if outs[a] else slice(0, 0)
            for a, t in enumerate(tap)
        )
        y += np.einsum("bi...,oi->bo...", x[(slice(None), slice(None), *where)], kernel[(..., *tap)])
    return y


def _scan(eqn, ins):
    params = eqn.params
    body, length = params["jaxpr"], params["length"]
    jaxpr = getattr(body, "jaxpr", body)
    same = lambda outside, inside: sum(v.aval.ndim == w.aval.ndim for v, w in zip(outside, inside))
    carried = same(eqn.outvars, jaxpr.outvars)
    consts = same(eqn.invars, jaxpr.invars) - carried
    fixed, carry, scanned = ins[:consts], list(ins[consts : consts + carried]), ins[consts + carried :]
    run = _flat(body)
    rows = []
    for n in range(length):
        n = length - 1 - n if params["reverse"] else n
        outs = run([*fixed, *carry, *(np.asarray(value[n]) for value in scanned)])
        carry = outs[:carried]
        rows.append(outs[carried:])
    if params["reverse"]:
        rows.reverse()
    empty = [np.zeros((0, *v.aval.shape)) for v in jaxpr.outvars[carried:]]
    return [*carry, *([np.stack(column) for column in zip(*rows)] if rows else empty)]


_FLATS = {}


def _flat(body):
    """A body's flat program, made once; the body is kept, so that its id stays its own."""
    if id(body) not in _FLATS:
        inputs = [_UNKNOWN] * len(getattr(body, "jaxpr", body).invars)
        _FLATS[id(body)] = (body, _Flat(body, inputs))
    return _FLATS[id(body)][1]


def forget():
    """Frees what was compiled: thousands of programs take more memory maps than a process may have."""
    _FLATS.clear()
    jax.clear_caches()


def _while(ins, params):
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body, carry = ins[:of_cond], ins[of_cond : of_cond + of_body], list(ins[of_cond + of_body :])
    while bool(_flat(params["cond_jaxpr"])([*cond, *carry])[0]):
        carry = _flat(params["body_jaxpr"])([*body, *carry])
    return list(carry)


def _cond(ins, params):
    branches = params["branches"]
    return _flat(branches[int(np.clip(int(ins[0]), 0, len(branches) - 1))])(ins[1:])


def _top_k(ins, params):
    k, axis = params["k"], params.get("axis", params.get("operand_axis", -1))
    order = np.argsort(-ins[0], axis=axis, kind="stable")
    order = np.take(order, np.arange(k), axis)
    return [np.take_along_axis(ins[0], order, axis), order.astype(np.int32)]


_RULES = {
    "convert_element_type": _convert,
    "div": _div,
    "integer_pow": lambda ins, params: np.power(np.asarray(ins[0], np.float64), params["y"]),
    "select_n": lambda ins, params: (
        np.where(ins[0], ins[2], ins[1]) if len(ins) == 3 and np.asarray(ins[0]).dtype == bool else _choose(ins)
    ),
    "broadcast_in_dim": _broadcast,
    "reshape": lambda ins, params: (
        np.reshape(np.transpose(ins[0], params["dimensions"]), params["new_sizes"])
        if params.get("dimensions") is not None
        else np.reshape(ins[0], params["new_sizes"])
    ),
    "squeeze": lambda ins, params: np.squeeze(ins[0], tuple(params["dimensions"])),
    "expand_dims": lambda ins, params: np.expand_dims(ins[0], tuple(params["dimensions"])),
    "transpose": lambda ins, params: np.transpose(ins[0], params["permutation"]),
    "rev": lambda ins, params: np.flip(ins[0], tuple(params["dimensions"])),
    "stack": lambda ins, params: np.stack(ins, params["axis"]),
    "tile": lambda ins, params: np.tile(ins[0], params["reps"]),
    "concatenate": lambda ins, params: np.concatenate(ins, params["dimension"]),
    "split": lambda ins, params: np.split(ins[0], np.cumsum(params["sizes"])[:-1], params["axis"]),
    "slice": _slice,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "cumsum": _cumulative(np.cumsum),
    "cumprod": _cumulative(np.cumprod),
    "cummax": _cumulative(np.maximum.accumulate),
    "cummin": _cumulative(np.minimum.accumulate),
    "sort": _sort,
    "argmax": lambda ins, params: np.argmax(ins[0], params["axes"][0]).astype(params["index_dtype"]),
    "argmin": lambda ins, params: np.argmin(ins[0], params["axes"][0]).astype(params["index_dtype"]),
    "top_k": _top_k,
    "reduce_window_max": lambda ins, params: _windows(ins[0], -np.inf, params).max(0),
    "reduce_window_min": lambda ins, params: _windows(ins[0], np.inf, params).min(0),
    "reduce_window_sum": lambda ins, params: _windows(ins[0], 0.0, params).sum(0),
    "reduce_window": _reduce_window,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "while": _while,
    "cond": _cond,
}


def _choose(ins):
    which, *cases = ins
    out = cases[0]
    for n, case in enumerate(cases[1:], 1):
        out = np.where(which == n, case, out)
    return out


def linear_norm(layer, shape):
    """The norm of a linear map of images of a shape, channels last, from its matrix in double precision."""
    with jax.enable_x64(True):
        side = math.prod(shape)
        return np.linalg.norm(np.asarray(layer(jnp.eye(side).reshape(side, *shape))).reshape(side, -1), 2)


def conv_norm(kernel, conv):
    """The norm of what a description says, ``None`` where this oracle does not know its padding.

    Written from the meaning of the names: an axis' padding is a list of the pixels that its taps see.
    """
    letters = ("", "W", "HW", "DHW")[len(conv.input_shape)]
    kernel = np.asarray(kernel, np.float64).transpose([conv.kernel_layout.index(c) for c in f"{letters}IO"])
    rank, groups = len(letters), conv.feature_group_count
    padding = conv.padding if not isinstance(conv.padding, str) else (conv.padding,) * rank
    axes = []
    for a in range(rank):
        n, k, s = conv.input_shape[a], kernel.shape[a], conv.strides[a]
        e, d, pad = conv.input_dilation[a], conv.kernel_dilation[a], padding[a]
        reach, length = d * (k - 1), (n - 1) * e + 1
        spread = np.full(length, -1)
        spread[::e] = np.arange(n)
        if pad == "CIRCULAR":
            around = np.full(n * e, -1)
            around[::e] = np.arange(n)
            pixels = around[np.arange(n * e + reach) % (n * e)]
        elif pad in ("REFLECT", "EDGE"):
            pixels = (
                np.pad(spread, (reach // 2, reach - reach // 2), mode=pad.lower()) if n > 1 or pad == "EDGE" else None
            )
        elif pad == "SAME":
            total = max((math.ceil(length / s) - 1) * s + reach + 1 - length, 0)
            pixels = np.pad(spread, (total // 2, total - total // 2), constant_values=-1)
        elif pad == "CAUSAL":
            pixels = np.pad(spread, (reach, 0), constant_values=-1)
        elif pad == "VALID":
            pixels = spread
        elif isinstance(pad, tuple):
            low, high = pad
            pixels = np.pad(spread, (max(low, 0), max(high, 0)), constant_values=-1)
            pixels = pixels[max(-low, 0) : len(pixels) - max(-high, 0)]
        else:
            return None
        if pixels is None:
            return None
        outs = (len(pixels) - reach - 1) // s + 1
        if pad == "CIRCULAR":
            outs = -(-n * e // s)
        table = np.zeros((max(outs, 0), n, k))
        for t in range(max(outs, 0)):
            for j in range(k):
                if (pixel := pixels[s * t + d * j]) >= 0:
                    table[t, pixel, j] += 1
        axes.append(table)
    ins, outs = kernel.shape[rank:]
    norms = []
    for group in range(groups):
        part = kernel[..., group * (outs // groups) : (group + 1) * (outs // groups)]
        matrix = part.reshape(*kernel.shape[:rank], -1)
        for table in axes:  # one spatial axis at a time becomes (outputs, inputs), at the end
            matrix = np.tensordot(matrix, table, axes=([0], [2]))
        # now (i*o, t1, n1, t2, n2, ...)
        channels, *rest = matrix.shape
        matrix = matrix.reshape(ins, outs // groups, *rest)
        rows = [1, *range(2, 2 + 2 * rank, 2)]
        columns = [0, *range(3, 3 + 2 * rank, 2)]
        size = math.prod(matrix.shape[n] for n in rows)
        matrix = matrix.transpose(rows + columns).reshape(size, -1)
        norms.append(np.linalg.norm(matrix, 2) if matrix.size else 0.0)
    return max(norms)
