"""Random networks as source text, from a seed, over every operation that has a rule and some that may have none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import random_padding
from random_padding import along, at, function

SMALL = 260  # elements of anything


@dataclasses.dataclass(frozen=True)
class Case:
    name: object
    text: str
    params: dict
    shape: tuple[int, ...]

    @property
    def fn(self):
        return function(self.text)


class Builder:
    """A program being written; ``x`` is its running value, ``saved`` other paths."""

    def __init__(self, rng):
        self.rng, self.lines, self.params, self.saved, self.count = rng, [], {}, [], 0
        batch = int(rng.choice([1, 1, 2]))
        shapes = [(batch, 4, 4, 2), (batch, 4, 4, 1), (batch, 3, 5, 2), (batch, 6, 2), (batch, 5), (batch, 6)]
        self.start = self.shape = shapes[rng.choice(len(shapes), p=[0.35, 0.15, 0.1, 0.15, 0.1, 0.15])]

    def param(self, array):
        self.count += 1
        name = f"p{self.count}"
        self.params[name] = np.asarray(array, np.float32)
        return f"p['{name}']"

    def normal(self, *shape, scale=1.0):
        return self.param(scale * self.rng.standard_normal(shape))

    def pick(self, values):
        values = list(values)
        return values[self.rng.integers(len(values))]

    def number(self, low=-2.0, high=2.0):
        return round(float(self.rng.uniform(low, high)), 3)

    def add(self, text):
        """Appends lines if jax takes them and they stay small; says whether it did."""
        names = {f"v{n}": jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in enumerate(self.saved)}

        def trial(p, x, saved):
            scope = dict(random_padding.NAMES)
            args = ", ".join(["p", "x", *names])
            body = "\n".join(f"    {line}" for line in text.splitlines())
            exec(f"def fn({args}):\n{body}\n    return x", scope)
            return scope["fn"](p, x, **saved)

        try:
            x = jax.ShapeDtypeStruct(self.shape, jnp.float32)
            out = jax.eval_shape(trial, self.params, x, names)
            ok = out.dtype == jnp.float32 and 0 < out.size <= SMALL and out.ndim <= 5
        except Exception:  # jax or a framework refuses the line, each in its own way
            return False
        if ok:
            self.lines += text.splitlines()
            self.shape = tuple(out.shape)
        return ok


OPERATIONS = {}


def operation(weight=1.0, table=OPERATIONS):
    def add(function):
        table[function.__name__] = (function, weight)
        return function

    return add


ACTIVATIONS = [
    "jax.nn.relu(x)", "jax.nn.relu6(x)", "jax.nn.sigmoid(x)", "jnp.tanh(x)", "jax.nn.silu(x)", "jax.nn.elu(x)",
    "jax.nn.elu(x, {a})", "jax.nn.celu(x, {p})", "jax.nn.selu(x)", "jax.nn.gelu(x)", "jax.nn.gelu(x, approximate=False)",
    "jax.nn.softplus(x)", "jax.nn.soft_sign(x)", "jax.nn.hard_tanh(x)", "jax.nn.hard_sigmoid(x)", "jax.nn.hard_silu(x)",
    "jax.nn.hard_swish(x)", "jax.nn.leaky_relu(x)", "jax.nn.leaky_relu(x, {a})", "jax.nn.log_sigmoid(x)", "jax.nn.mish(x)",
    "jax.nn.squareplus(x)", "jax.nn.squareplus(x, {p})", "jnp.sin(x)", "jnp.cos(x)", "jnp.arctan(x)", "jnp.arcsinh(x)",
    "jnp.abs(x)", "jax.scipy.special.erf(x)", "jnp.maximum(x, {a})", "jnp.minimum({a}, x)", "jnp.clip(x, {m}, {p})",
    "jnp.where(x >= 0, x, {a} * x)", "jnp.where(x > 0, x, {a} * x)", "jnp.where(x < 0, {a} * x, x)",
    "jnp.where(x <= 0, 0.0, x)", "jnp.where(x >= 0, {a} * x, 0.0)", "jnp.where(0.0 < x, x, x * {a})",
    "nn.PReLU(negative_slope_init={a}).apply({{'params': {{'negative_slope': jnp.full((), {a}, x.dtype)}}}}, x)",
    "eqx.nn.PReLU({a})(x)", "jax.lax.logistic(x)", "jnp.logaddexp(x, 0.0)", "-x", "x / {p}", "{a} * x", "x - {a}", "{a} - x",
    "jnp.logaddexp(x, -x)", "x * jax.nn.sigmoid({a})", "jax.nn.relu(x) - jax.nn.relu(-x)", "x * jnp.asarray({a}, x.dtype)",
    "jnp.maximum(x, {a} * x)", "jnp.minimum(x, {a} * x)", "jax.nn.sparse_plus(x)", "jax.nn.sparse_sigmoid(x)",
]  # fmt: skip

WRAPPERS = [
    "x = {f}",
    "x = {f}",
    "x = {f}",
    "x = jax.vmap(lambda x: {f})(x)",
    "x = jax.vmap(jax.vmap(lambda x: {f}))(x)",
    "x = jax.vmap(lambda x: {f}, in_axes=-1, out_axes=-1)(x)",
    "x = jax.vmap(lambda x: {f}, in_axes=-1, out_axes=0)(x)",
    "x = jax.jit(lambda x: {f})(x)",
    "x = jax.checkpoint(lambda x: {f})(x)",
    "x = jax.jit(jax.checkpoint(lambda x: {f}))(x)",
    "x = jax.vmap(jax.jit(lambda x: {f}))(x)",
    "fn_ = jax.custom_jvp(lambda x: {f})\nfn_.defjvp(lambda primals, tangents: (primals[0], tangents[0]))\nx = fn_(x)",
    "fn_ = jax.custom_vjp(lambda x: {f})\nfn_.defvjp(lambda x: (x, None), lambda _, g: (g,))\nx = fn_(x)",
    "x = lax.cond(True, lambda x: {f}, lambda x: 3 * x, x)",
    "x = lax.cond(jnp.asarray(0) > 1, lambda x: 0 * x, lambda x: {f}, x)",
    "x = lax.switch(1, [lambda x: x, lambda x: {f}], x)",
    "x = lax.map(lambda x: {f}, x)",
    "x = lax.fori_loop(0, 2, lambda i, x: {f}, x)",
    "x = lax.scan(lambda x, _: ({f}, None), x, None, length=2)[0]",
    "x = lax.scan(lambda x, _: ({f}, x), x, None, length=2, reverse=True)[1]",
    "x = lax.scan(lambda x, _: ({f}, x), x, None, length=0)[0]",
    "x = lax.scan(lambda c, x: (c, {f}), 0.0, x)[1]",
    "x = lax.scan(lambda c, x: (c, {f}), 0.0, x, reverse=True)[1]",
    "x = jnp.stack([(lambda x: {f})(row) for row in x])",
]


@operation(5)
def activation(b):
    positive = round(float(b.rng.uniform(0.2, 2.5)), 3)
    return "x = " + b.pick(ACTIVATIONS).format(a=b.number(), p=positive, m=-positive)


@operation(3)
def wrapped(b):
    positive = round(float(b.rng.uniform(0.2, 2.5)), 3)
    f = b.pick(ACTIVATIONS).format(a=b.number(), p=positive, m=-positive)
    if "nn.PReLU" in f and "eqx" not in f:
        f = "jax.nn.gelu(x)"
    return b.pick(WRAPPERS).format(f=f)


@operation(1.5)
def slope_per_channel(b):
    c = b.shape[-1]
    ones = ", ".join(["1"] * (len(b.shape) - 1))
    slope = f"{b.normal(c)}.reshape({ones}, {c})"
    return b.pick(
        [
            f"x = jax.nn.leaky_relu(x, {slope})",
            f"x = jnp.where(x >= 0, x, {slope} * x)",
            f"x = jnp.where(x > 0, x, x * {slope})",
            f"x = jnp.maximum(x, 0) + {slope} * jnp.minimum(x, 0)",
            f"x = jax.nn.elu(x, jnp.abs({slope}))",
            f"x = jax.nn.celu(x, jnp.abs({slope}) + 0.1)",
        ]
    )


@operation(1.5)
def sorting(b):
    axis = b.pick(range(1, len(b.shape)))
    n = b.shape[axis]
    if n % 2:
        return b.pick([f"x = jnp.sort(x, {axis})", f"x = -jnp.sort(-x, {axis})"])
    half = n // 2
    return b.pick(
        [
            f"x = jnp.sort(x, {axis})",
            f"u, v = jnp.split(x, 2, {axis})\nx = jnp.concatenate([jnp.maximum(u, v), jnp.minimum(u, v)], {axis})",
            f"u, v = x[{at(len(b.shape), axis, '::2')}], x[{at(len(b.shape), axis, '1::2')}]\n"
            f"x = jnp.stack([jnp.minimum(u, v), jnp.maximum(u, v)], {axis + 1}).reshape(x.shape)",
            f"x = jnp.sort(x.reshape({[*b.shape[:axis], half, 2, *b.shape[axis + 1 :]]}), {axis + 1})"
            f".reshape({list(b.shape)})",
            f"u, v = jnp.split(x, 2, {axis})\nx = jnp.concatenate([jnp.maximum(u, v), jnp.maximum(v, u)], {axis})",
            f"u, v = jnp.split(x, 2, {axis})\nx = jnp.concatenate([jnp.maximum(u, 2 * v), jnp.minimum(u, v)], {axis})",
            f"u, v = jnp.split(x, 2, {axis})\nx = jnp.maximum(u, v)",
            f"u, v = jnp.split(x, 2, {axis})\nx = jnp.concatenate([jnp.maximum(u, u), jnp.minimum(v, v)], {axis})",
            f"u, v = jnp.split(x, 2, {axis})\nx = jnp.concatenate([jnp.maximum(u, u), jnp.minimum(u, u)], {axis})",
            f"u, v = x[{at(len(b.shape), axis, ':' + str(half))}], x[{at(len(b.shape), axis, str(half // 2) + ':' + str(half // 2 + half))}]\n"
            f"x = jnp.concatenate([jnp.maximum(u, v), jnp.minimum(u, v)], {axis})",
        ]
    )


@operation(1)
def softmax(b):
    axis = b.pick(range(1, len(b.shape)))
    return b.pick(
        [
            f"x = jax.nn.softmax(x, {axis})",
            f"x = jax.nn.softmax(x, {axis})",
            f"x = jax.nn.softmax({b.number()} * x, {axis})",
            f"x = jax.vmap(lambda x: jax.nn.softmax(x, {axis - 1}))(x)",
            f"x = jax.nn.logsumexp(x, {axis})",
            f"x = jax.nn.log_softmax(x, {axis})",
        ]
    )


@operation(5)
def convolution(b):
    if len(b.shape) not in (3, 4):
        return None
    rank, c = len(b.shape) - 2, b.shape[-1]
    letters = "HW" if rank == 2 else "W"
    taps = [b.pick([1, 2, 3, 3]) for _ in range(rank)]
    groups = c if b.rng.random() < 0.25 else 1
    out = groups * b.pick([1, 2])
    padding = b.pick(["'SAME'", "'SAME'", "'VALID'", str([(1, 0)] * rank), str([(2, 1)] * rank)])
    strides = b.pick([[1] * rank, [1] * rank, [2] * rank, [2, 1][:rank]])
    spread = b.pick([[1] * rank] * 3 + [[2] * rank])
    dilated = b.pick([[1] * rank] * 4 + [[2] * rank])
    if max(dilated) > 1 and padding == "'SAME'":
        padding = str([(1, 1)] * rank)
    array = random_padding.kernel(b.rng, [*taps, c // groups, out], list(range(rank)))
    kernel, layout = b.param(array * np.float32(b.pick([1, 0.3, 1e-3, 30]))), f"{letters}IO"
    way = b.rng.random()
    if way < 0.06:
        kernel = f"({kernel} / jnp.sqrt(jnp.sum({kernel} ** 2) + 1e-6))"
    elif way < 0.1:
        kernel = f"({kernel} - jnp.mean({kernel}))"
    elif way < 0.14:
        kernel, layout = f"jnp.transpose({kernel}, {[*range(rank + 2)][::-1]})", ("OI" + letters[::-1])
    elif way < 0.18:
        kernel = f"jnp.flip({kernel}, 0)"
    elif way < 0.22:
        kernel = f"({kernel} * {b.normal(out)}.reshape({[1] * (rank + 1) + [out]}))"
    elif way < 0.25:
        kernel = f"{kernel}.astype(jnp.bfloat16).astype(x.dtype)" if b.rng.random() < 0 else kernel
    if b.rng.random() < 0.1 and groups == 1 and max(dilated) == 1 and padding in ("'SAME'", "'VALID'"):
        return f"x = lax.conv_transpose(x, {kernel}, {strides}, {padding}, dimension_numbers=('N{letters}C', '{layout}', 'N{letters}C'))"
    text = (
        f"lax.conv_general_dilated(x, {kernel}, {strides}, {padding}, lhs_dilation={dilated}, rhs_dilation={spread}, "
        f"feature_group_count={groups}, dimension_numbers=('N{letters}C', '{layout}', 'N{letters}C'))"
    )
    follow = b.rng.random()
    if follow < 0.35:
        text += f" + {b.normal(out)}.reshape({[1] * (rank + 1) + [out]})"
    if follow < 0.2:
        text = f"({text}) * {b.normal(out)}.reshape({[1] * (rank + 1) + [out]})"
    if 0.4 < follow < 0.5:
        mean, var, scale, bias = (b.param(v) for v in b.rng.uniform(0.1, 2, (4, out)))
        flax = (
            f"nn.BatchNorm(use_running_average=True).apply({{'params': {{'scale': {scale}, 'bias': {bias}}}, "
            f"'batch_stats': {{'mean': {mean}, 'var': {var}}}}}, {text})"
        )
        text = flax
    if follow > 0.9:
        text = f"jax.vmap(lambda x: ({text.replace('(x,', '(x[None],', 1)})[0])(x)"
    return f"x = {text}"


@operation(1)
def layers_of_flax_and_equinox(b):
    if len(b.shape) not in (3, 4):
        return None
    rank, c = len(b.shape) - 2, b.shape[-1]
    kernel = b.normal(*[3] * rank, c, 2)
    transposed = b.normal(*[3] * rank, c, 2)
    equinox = b.normal(2, c, *[3] * rank)
    mode = b.pick(["ZEROS", "REFLECT", "REPLICATE", "CIRCULAR"])
    padding = b.pick(["SAME", "VALID", "CIRCULAR", "REFLECT"])
    return b.pick(
        [
            f"x = nn.Conv(2, {[3] * rank}, padding='{padding}', use_bias=False).apply({{'params': {{'kernel': {kernel}}}}}, x)",
            f"x = nn.Conv(2, {[3] * rank}, strides=2, padding='{padding}', use_bias=False)"
            f".apply({{'params': {{'kernel': {kernel}}}}}, x)",
            f"x = nn.ConvTranspose(2, {[3] * rank}, strides={[2] * rank}, padding='{b.pick(['SAME', 'CIRCULAR', 'VALID'])}', "
            f"use_bias=False).apply({{'params': {{'kernel': {transposed}}}}}, x)",
            f"layer = eqx.filter_eval_shape(lambda: eqx.nn.Conv({rank}, {c}, 2, 3, padding='SAME', use_bias=False, "
            f"padding_mode='{mode}', key=jax.random.key(0)))\n"
            f"layer = eqx.tree_at(lambda m: m.weight, layer, {equinox})\n"
            "x = jnp.moveaxis(jax.vmap(layer)(jnp.moveaxis(x, -1, 1)), 1, -1)",
        ]
    )


@operation(3)
def dense(b):
    n = b.shape[-1]
    m = b.pick([1, 2, 3, n])
    w = b.normal(n, m, scale=b.pick([1.0, 0.2, 5.0]))
    square = b.normal(n, n, scale=0.5)
    middle = b.shape[1]
    return b.pick(
        [
            f"x = x @ {w}",
            f"x = x @ {w} + {b.normal(m)}.reshape({[1] * (len(b.shape) - 1) + [m]})",
            f"x = jnp.einsum('...i,io->...o', x, {w})",
            f"x = nn.Dense({m}, use_bias=False).apply({{'params': {{'kernel': {w}}}}}, x)",
            f"x = jax.vmap(lambda x: x @ {w})(x)",
            f"x = jnp.tensordot(x, {b.normal(middle, 2)}, axes=([1], [0]))",
            f"x = jnp.einsum('bi...,ijk->b...jk', x, {b.normal(middle, 2, 1)})",
            f"x = x.reshape({b.shape[0]}, -1) @ {b.normal(int(np.prod(b.shape[1:])), m)}",
            # Cayley's orthogonal matrices and others made from parameters alone
            f"s = {square} - {square}.T\nx = x @ jnp.linalg.solve(jnp.eye({n}, dtype=x.dtype) + s, jnp.eye({n}, dtype=x.dtype) - s)",
            f"x = x @ jnp.linalg.qr({square})[0]",
            f"x = x @ jnp.linalg.inv({square} + 3 * jnp.eye({n}, dtype=x.dtype))",
            f"x = x @ jax.scipy.linalg.expm({square} - {square}.T)",
            f"x = x @ jnp.fft.fft({square}).real.astype(x.dtype)",
            f"x = x @ (({square}) / jnp.linalg.norm({square}, axis=0, keepdims=True))",
            f"x = x @ ({square} / jnp.linalg.norm({square}, 2))",
            f"x = x @ lax.fori_loop(0, 3, lambda i, w: w @ {square}, {square})",
            f"x = jnp.einsum('...i,i->...', x, {b.normal(n)})",
            f"x = x * {b.normal(n)}.reshape({[1] * (len(b.shape) - 1) + [n]})",
            f"x = x / (jnp.abs({b.normal(n)}) + 0.1).reshape({[1] * (len(b.shape) - 1) + [n]})",
            f"x = {b.normal(n)}.reshape({[1] * (len(b.shape) - 1) + [n]}) / (2 + jnp.tanh(x))",
            f"x = x * {b.normal(middle)}.reshape({[1, middle] + [1] * (len(b.shape) - 2)})",
            f"x = jax.vmap(lambda w: x @ w)({b.normal(3, n, m)})",
            f"x = jax.vmap(lambda w, x: x @ w, in_axes=(0, -1))({b.normal(n, middle if len(b.shape) > 2 else b.shape[0], 2)}, x)",
        ]
    )


@operation(1)
def transposed_maps(b):
    """The transposes of linear maps, as they stand in a gradient."""
    rank, c = len(b.shape) - 2, b.shape[-1]
    axis = b.pick(range(len(b.shape)))
    n = b.shape[axis]
    out = lambda *shape: f"jax.ShapeDtypeStruct({shape}, x.dtype)"
    apply = lambda map, struct: f"x = jax.linear_transpose({map}, {struct})(x)[0]"
    index = b.rng.integers(0, n + 1, n).tolist()
    choices = [
        apply(f"lambda v: jnp.cumsum(v, {axis})", out(*b.shape)),
        apply(
            f"lambda v: jnp.take(v, np.array({index}), {axis})", out(*(s + (a == axis) for a, s in enumerate(b.shape)))
        ),
        apply(f"lambda v: v @ {b.normal(3, c)}", out(*b.shape[:-1], 3)),
        apply(f"lambda v: v[{at(len(b.shape), axis, ':-1')}]", out(*(s + (a == axis) for a, s in enumerate(b.shape)))),
        apply(
            f"lambda v: jnp.broadcast_to(v, {b.shape})", out(*(1 if a == axis else s for a, s in enumerate(b.shape)))
        ),
        apply(f"lambda v: jnp.concatenate([v, v], {axis})[{at(len(b.shape), axis, f':{n}')}]", out(*b.shape)),
        apply(f"lambda v: jnp.sum(v, {axis})", out(*b.shape[:axis], 2, *b.shape[axis:])),
    ]
    if rank in (1, 2):
        letters = "HW"[-rank:]
        numbers = f"dimension_numbers=('N{letters}C', '{letters}IO', 'N{letters}C')"
        same = f"[1] * {rank}, 'SAME', {numbers}"
        half = f"[2] * {rank}, 'SAME', {numbers}"
        doubled = (b.shape[0], *(2 * s for s in b.shape[1:-1]), 2)
        groups = f", feature_group_count={c}"
        choices += 2 * [
            apply(
                f"lambda v: lax.conv_general_dilated(v, {b.normal(*[3] * rank, 2, c)}, {same})", out(*b.shape[:-1], 2)
            ),
            apply(f"lambda v: lax.conv_general_dilated(v, {b.normal(*[3] * rank, 2, c)}, {half})", out(*doubled)),
            apply(
                f"lambda v: lax.conv_general_dilated(v, {b.normal(*[3] * rank, 1, c)}, {same}{groups})", out(*b.shape)
            ),
            apply(f"lambda k: lax.conv_general_dilated({b.normal(*b.shape)}, k, {same})", out(*[3] * rank, c, c)),
            apply(
                f"lambda k: lax.conv_general_dilated({b.normal(*b.shape)}, k, {same}{groups})", out(*[3] * rank, 1, c)
            ),
        ]
    return b.pick(choices)


@operation(1)
def products(b):
    """Products with parameters, spelled with more axes than a matrix has."""
    letters = "abcd"[: len(b.shape)]
    if len(letters) != len(b.shape):
        return None
    left = "".join(c for c in letters if b.rng.random() < 0.6) + ("z" if b.rng.random() < 0.4 else "")
    out = list({*letters[:1], *(c for c in letters + left if b.rng.random() < 0.6)})
    b.rng.shuffle(out)
    sizes = dict(zip(letters, b.shape)) | {"z": 2}
    if not left:
        return None
    array = b.normal(*(sizes[c] for c in left))
    order = f"{letters},{left}" if b.rng.random() < 0.5 else f"{left},{letters}"
    args = f"x, {array}" if order.startswith(letters + ",") else f"{array}, x"
    return f"x = jnp.einsum('{order}->{''.join(out)}', {args})"


@operation(2)
def loops(b):
    n = b.shape[-1]
    length = b.pick([0, 1, 3])
    stack = b.normal(length, n, n, scale=0.6)
    reverse = b.pick(["", ", reverse=True"])
    f = b.pick(["jnp.tanh", "jax.nn.silu", "jax.nn.gelu", "jax.nn.softplus", "jax.nn.elu", "jax.nn.relu", ""])
    m = b.shape[0]
    choices = [
        f"x = lax.scan(lambda x, w: ({f}(x @ w), None), x, {stack}{reverse})[0]",
        f"x = lax.scan(lambda x, w: (x + {f}(x @ w), x), x, {stack}{reverse})[0]",
        f"x = lax.scan(lambda x, w: ({f}(x @ w), x), x, {stack}{reverse})[1]",
        f"x = lax.scan(lambda c, v: (c + v, c), jnp.zeros_like(x[0]), x{reverse})[1]",
        f"x = lax.scan(lambda c, v: (0.5 * c + v, {f}(c)), jnp.zeros_like(x[0]), x{reverse})[0]",
        f"x = lax.scan(lambda c, v: (c, x), 0.0, jnp.zeros(({length}, 1)){reverse})[1]",
        f"x = lax.scan(lambda c, v: (v[0], c - v[0]), x[0], (x, jnp.arange({m})){reverse})[1]",
        f"x = lax.fori_loop(0, {length}, lambda i, x: x @ {b.normal(n, n, scale=0.6)}, x)",
        f"x = lax.fori_loop(0, 3, lambda i, x: x * {b.normal(3)}[i], x)",
        "x = lax.associative_scan(jnp.add, x, axis=1)",
    ]
    if len(b.shape) == 4:
        stack = b.normal(length, 3, 3, n, n, scale=0.3)
        numbers = "dimension_numbers=('NHWC', 'HWIO', 'NHWC')"
        choices += [
            f"x = lax.scan(lambda x, k: ({f}(lax.conv_general_dilated(x, k, (1, 1), 'SAME', {numbers})), None), x, {stack}{reverse})[0]",
            f"x = lax.scan(lambda x, k: (x + {f}(lax.conv_general_dilated(x, k, (1, 1), 'SAME', {numbers})), None), x, {stack}{reverse})[0]",
            f"x = jax.vmap(lambda k: lax.conv_general_dilated(x, k, (1, 1), 'SAME', {numbers}))({stack})",
            f"x = jax.vmap(lambda k, x: lax.conv_general_dilated(x[None], k, (1, 1), 'SAME', {numbers})[0])({b.normal(b.shape[0], 3, 3, n, n)}, x)",
        ]
    return b.pick(choices)


@operation(2)
def pooling(b):
    rank = len(b.shape)
    if rank not in (3, 4):
        return None
    window = tuple(b.pick([1, 2, 3]) for _ in range(rank - 2))
    strides = tuple(b.pick([1, 2, 3]) for _ in range(rank - 2))
    padding = b.pick(["SAME", "VALID"])
    whole, steps = (1, *window, 1), (1, *strides, 1)
    every = tuple(b.pick([1, 2]) for _ in range(rank))
    dilation = tuple(b.pick([1, 1, 2]) for _ in range(rank))
    n = rank - 2
    choices = [
        f"x = nn.max_pool(x, {window}, {strides}, '{padding}')",
        f"x = nn.avg_pool(x, {window}, {strides}, '{padding}')",
        f"x = nn.avg_pool(x, {window}, {strides}, '{padding}', count_include_pad=False)",
        f"x = nn.min_pool(x, {window}, {strides}, '{padding}')",
        f"x = lax.reduce_window(x, jnp.asarray(-jnp.inf, x.dtype), lax.max, {whole}, {steps}, '{padding}')",
        f"x = lax.reduce_window(x, jnp.asarray(0.0, x.dtype), lax.max, {whole}, {steps}, '{padding}')",
        f"x = lax.reduce_window(x, jnp.asarray(0.0, x.dtype), lax.add, {whole}, {steps}, '{padding}')",
        f"x = lax.reduce_window(x, jnp.asarray(1.5, x.dtype), lax.add, {whole}, {steps}, '{padding}')",
        f"x = lax.reduce_window(x, jnp.asarray(jnp.inf, x.dtype), lax.min, {whole}, {steps}, '{padding}')",
        f"x = lax.reduce_window(x, jnp.asarray(0.0, x.dtype), lax.add, {every}, {(1,) * rank}, 'SAME')",
        f"x = lax.reduce_window(x, jnp.asarray(-jnp.inf, x.dtype), lax.max, {every}, {(1,) * rank}, 'SAME', window_dilation={dilation})",
        f"x = lax.reduce_window(x, jnp.asarray(0.0, x.dtype), lax.add, {whole}, {steps}, {[(1, 1)] * rank}, base_dilation={dilation})",
        f"x = lax.reduce_window(x, jnp.asarray(-jnp.inf, x.dtype), lax.max, {whole}, {steps}, {[(0, 1)] * rank}, base_dilation={dilation})",
        f"x = lax.reduce_window(x, jnp.asarray(0.0, x.dtype), lambda a, b: a + b, {whole}, {steps}, 'VALID')",
        f"x = jax.vmap(lambda x: eqx.nn.MaxPool({n}, {list(window)}, {list(strides)}, use_ceil=True)(x))(x)".replace(
            "eqx.nn.MaxPool(", f"eqx.nn.MaxPool{n}d("
        ).replace(f"MaxPool{n}d({n}, ", f"MaxPool{n}d("),
        f"x = jax.vmap(eqx.nn.AvgPool{n}d({list(window)}, {list(strides)}))(x)",
    ]
    return b.pick(choices)


@operation(2)
def reductions(b):
    axis = b.pick(range(len(b.shape)))
    axes = tuple(sorted({axis, b.pick(range(len(b.shape)))}))
    reverse = b.pick(["True", "False"])
    ones = "True"
    return b.pick(
        [
            f"x = jnp.sum(x, {axes}, keepdims={ones})",
            f"x = jnp.mean(x, {axes}, keepdims={ones})",
            f"x = jnp.max(x, {axes}, keepdims={ones})",
            f"x = jnp.min(x, {axes}, keepdims={ones})",
            f"x = x - jnp.mean(x, {axes}, keepdims=True)",
            f"x = x + jnp.max(x, {axes}, keepdims=True)",
            f"x = jnp.sum(x, {axis})",
            f"x = jnp.mean(x, {axis})",
            f"x = jnp.cumsum(x, {axis})",
            f"x = lax.cumsum(x, {axis}, reverse={reverse})",
            f"x = lax.cummax(x, {axis}, reverse={reverse})",
            f"x = lax.cummin(x, {axis}, reverse={reverse})",
            f"x = jnp.diff(x, axis={axis})",
            f"x = jnp.median(x, {axis})",
            "x = jnp.trace(x.reshape(x.shape[0], -1)[:, :4].reshape(-1, 2, 2), axis1=1, axis2=2)",
            f"x = jnp.broadcast_to(jnp.sum(x), {b.shape})",
            f"x = jnp.convolve(x.ravel(), {b.normal(3)})",
        ]
    )


@operation(6)
def movement(b):
    rank = len(b.shape)
    axis = b.pick(range(rank))
    if rank in (3, 4) and b.rng.random() < 0.5:
        text = random_padding.anything(b.rng, rank, b.pick(range(1, rank - 1)), b.shape[1])
        return text
    n = b.shape[axis]
    order = b.rng.permutation(rank).tolist()
    half = max(1, n // 2)
    some = at(rank, axis, f"{half}:")
    return b.pick(
        [
            f"x = jnp.transpose(x, {order})",
            "x = x.reshape(x.shape[0], -1)",
            "x = x.reshape(-1)",
            "x = x.reshape(-1, 2)",
            "x = x[None]",
            f"x = jnp.concatenate([x, x], {axis})",
            f"x = jnp.concatenate([x, x[{some}]], {axis})",
            f"x = jnp.concatenate([x, x, x], {axis})",
            f"x = jnp.concatenate([x, jnp.zeros_like(x)], {axis})",
            f"x = jnp.concatenate([x, 2 * x], {axis})",
            f"x = jnp.concatenate([x, jnp.tanh(x), jnp.abs(x)], {axis})",
            f"x = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], {axis})",
            f"x = jnp.stack([x, x], {axis})",
            f"x = jnp.stack([x, -x, 0 * x], {axis})",
            f"x = jnp.tile(x, {along(rank, axis, 2, 1)})",
            f"x = jnp.repeat(x, 2, {axis})",
            f"x = jnp.repeat(x, np.array({b.rng.integers(0, 3, n).tolist()}), {axis}, total_repeat_length={n})",
            "x = jnp.broadcast_to(x[None], (3, *x.shape))",
            f"x = jnp.roll(x, 1, {axis})",
            f"x = jnp.flip(x, {axis})",
            f"x = jnp.take(x, np.array({b.rng.integers(0, n, 4).tolist()}), {axis})",
            f"x = jnp.take(x, np.array({b.rng.integers(0, n + 2, 4).tolist()}), {axis}, mode='clip')",
            f"x = jnp.take(x, np.array({b.rng.integers(0, n + 2, 4).tolist()}), {axis}, mode='fill', fill_value=0)",
            f"x = x[{at(rank, axis, f'np.array({b.rng.integers(0, n, 3).tolist()})')}]",
            f"x = x[{at(rank, axis, '::-1')}]",
            f"x = x[{at(rank, axis, f'{half}:')}]",
            f"x = jnp.zeros([s + 2 for s in x.shape], x.dtype).at[{', '.join(['1:-1'] * rank)}].add(x)",
            f"x = jnp.zeros_like(x).at[{at(rank, axis, f'np.array({b.rng.integers(0, n, n).tolist()})')}].add(x)",
            f"x = jnp.zeros_like(x).at[{at(rank, axis, f'np.array({b.rng.integers(0, n, n).tolist()})')}].set(x)",
            f"x = x.at[{at(rank, axis, '0')}].add(x[{at(rank, axis, '-1')}])",
            f"x = x.at[{at(rank, axis, '0')}].set(2 * x[{at(rank, axis, '-1')}])",
            f"x = x.at[{at(rank, axis, '0')}].multiply(3.0)",
            f"x = x.at[{at(rank, axis, '0')}].set(1.0)",
            f"x = x.at[{at(rank, axis, '0')}].max(x[{at(rank, axis, '-1')}])",
            f"x = lax.dynamic_slice_in_dim(x, {half}, {n - half or 1}, axis={axis})",
            f"x = lax.dynamic_update_slice_in_dim(x, 3 * x[{at(rank, axis, ':1')}], {n - 1}, {axis})",
            "x = jnp.pad(x, 1)",
            f"x = lax.pad(x, jnp.zeros((), x.dtype), {[(1, 0, 1)] * rank})",
            f"x = lax.pad(jnp.sum(x[{at(rank, axis, ':1')}], keepdims=True), x.ravel()[0], {[(1, 1, 0)] * rank})",
            f"x = jnp.pad(x, 1, mode='{b.pick(['wrap', 'edge', 'reflect', 'symmetric', 'mean', 'maximum', 'linear_ramp'])}')",
            f"x = jax.image.resize(x, [s * 2 if a == {axis} else s for a, s in enumerate(x.shape)], 'nearest')",
            f"x = jax.image.resize(x, [s * 2 if a == {axis} else s for a, s in enumerate(x.shape)], 'linear')",
            f"x = jnp.where((np.arange({n}) % 2 == 0).reshape({[n if a == axis else 1 for a in range(rank)]}), x, 2 * x[{at(rank, axis, '::-1')}])",
            f"x = jnp.split(x, [{half}], {axis})[0]",
            f"x = sum(jnp.split(x, {n}, {axis}))",
            f"x = jnp.take_along_axis(x, jnp.asarray(np.argsort(np.random.default_rng(0).standard_normal({b.shape}), {axis})), {axis})",
            "x = jnp.diagonal(x.reshape(x.shape[0], -1)[:, :4].reshape(-1, 2, 2), axis1=1, axis2=2)",
            "x = jnp.triu(x.reshape(x.shape[0], -1)[:, :4].reshape(-1, 2, 2))",
            "x = jnp.vstack([x, x[:1]])",
            f"x = lax.rev(x, ({axis},))",
            f"x = jnp.moveaxis(x, {axis}, 0)",
            "x = jnp.atleast_3d(x)",
            f"x = x.swapaxes({axis}, -1)",
            "x = jnp.kron(jnp.eye(2, dtype=x.dtype), x.reshape(x.shape[0], -1)[:, :6])",
        ]
    )


@operation(1)
def precision(b):
    narrow = b.pick(["jnp.bfloat16", "jnp.float16"])
    n = b.shape[-1]
    w = b.normal(n, n)
    return b.pick(
        [
            f"x = x.astype({narrow}).astype(x.dtype)",
            f"y = x.astype({narrow})\nx = (y * 1e-4 * 1e-4 * 1e4 * 1e4).astype(x.dtype)",
            f"y = x.astype({narrow})\nx = (y + 0.0039 * y + 0.0039 * y).astype(x.dtype)",
            f"x = (x.astype({narrow}) @ {w}.astype({narrow})).astype(x.dtype)",
            f"x = (x.astype({narrow}) * {b.normal(n)}.astype({narrow}).reshape({[1] * (len(b.shape) - 1) + [n]})).astype(x.dtype)",
            "x = x * 1e-9 * 1e9",
            "x = x * 1e9 * 1e-9",
            "x = x * 1e-20 * 1e-15 * 1e20 * 1e15",
            f"x = (x @ ({w} * 1e-9)) * 1e9",
            f"x = (x * 1e9) @ ({w} * 1e-9)",
            "x = lax.reduce_precision(x, 8, 7)",
            "x = jnp.float32(2.0).astype(x.dtype) * x",
        ]
    )


@operation(1)
def containers(b):
    return b.pick(
        [
            "x = jax.jit(jax.checkpoint(lambda v: jax.jit(lambda w: 2 * w)(v) - v))(x)",
            "x = jax.named_call(lambda v: 2 * v, name='double')(x)",
            "x = jax.lax.stop_gradient(x) * 1.5",
            "x = jax.lax.optimization_barrier(x)",
            f"x = lax.cond({b.normal(1)}[0] > 0, lambda v: 2 * v, lambda v: -3 * v, x)",
            "x = lax.switch(2, [lambda v: v, lambda v: 2 * v, lambda v: 3 * v], x)",
            "x = jnp.vectorize(lambda v: jnp.tanh(v) * 2)(x)",
            "x = jax.jvp(lambda v: 2 * v, (x,), (x,))[1]",
            "x = jax.grad(lambda v: jnp.sum(jnp.log(jnp.cosh(v))))(x)",
            "x = jax.linearize(lambda v: 3 * v, x)[1](x)",
            "x = jax.vjp(lambda v: jnp.flip(2 * v, 0), x)[1](x)[0]",
            "x = jnp.apply_along_axis(lambda v: v - v.mean(), 0, x)",
            "x = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]",
            "x = jax.tree.reduce(jnp.add, [x, 2 * x, -x])",
        ]
    )


@operation(3)
def save(b):
    if len(b.saved) >= 3:
        return None
    return f"v{len(b.saved)} = x"


@operation(4)
def combine(b):
    if not b.saved:
        return None
    v = f"v{b.pick(range(len(b.saved)))}"
    axis = b.pick(range(len(b.shape)))
    return b.pick(
        [
            f"x = x + {v}",
            f"x = x + {v}",
            f"x = x - {v}",
            f"x = {b.number()} * x + {b.number()} * {v}",
            f"x = jnp.concatenate([x, {v}], {axis})",
            f"x = jnp.concatenate([{v}, x, {v}], {axis})",
            f"x = jnp.maximum(x, {v})",
            f"x = jnp.minimum(x, {v})",
            f"x = jnp.stack([x, {v}], {axis})",
            f"x = jnp.where({b.normal(*b.shape)} > 0, x, {v})",
            f"x = jnp.concatenate([x.ravel(), {v}.ravel()])",
            f"x = x.ravel()[:4] + {v}.ravel()[:4]",
            f"x = {v}",
            f"x = (x + {v}) / 2",
            f"x = jnp.sum(x) + {v}",
            f"x = jnp.concatenate([jnp.maximum(x, {v}), jnp.minimum(x, {v})], {axis})",
            f"x = x + jnp.mean({v})",
            f"x = jnp.clip(x, {v}, {v} + 1)",
            f"x = lax.dynamic_update_slice(x, {v}, {(0,) * len(b.shape)})",
            f"x = x.at[{at(len(b.shape), axis, '0')}].set({v}[{at(len(b.shape), axis, '0')}])",
            f"x = lax.scan(lambda c, xs: (c, xs[0] + 2 * xs[1]), 0.0, (x, {v}))[1]",
            f"x = lax.select_n({b.normal(*b.shape)} > 0, {v}, x)",
        ]
    )


@operation(0.4)
def without_a_bound(b):
    """Operations that most often have no constant: all that matters is that nothing false is said of them."""
    return b.pick(
        [
            "x = x * x", "x = x * jnp.tanh(x)", "x = jnp.exp(x)", "x = x ** 3", "x = jnp.square(x)", "x = jnp.sign(x)",
            "x = jnp.floor(x)", "x = jnp.round(x)", "x = x / (1 + jnp.abs(x))", "x = x / (jnp.linalg.norm(x) + 1)",
            "x = jnp.where(x >= 1, x, 0.1 * x)", "x = jnp.where(x > 0, x, x + 1)", "x = jnp.where(x >= 0, x, 0.1 * x + 0.5)",
            "x = jnp.where(jnp.sin(x) > 0, x, -x)", "x = jnp.where(x > 0, 1.0, 0.0)", "x = x.astype(jnp.int32).astype(x.dtype)",
            "x = jnp.where(jnp.flip(x, -1) >= 0, x, 0.1 * x)", "x = jax.nn.glu(jnp.concatenate([x, x], -1))",
            "x = jnp.where(x >= 0, x, 0.1 * jnp.flip(x, -1))", "x = jax.nn.standardize(x)", "x = jnp.einsum('...i,...i->...', x, x)",
            "x = jnp.sqrt(jnp.abs(x))", "x = jnp.log1p(jnp.abs(x))", "x = jnp.sqrt(1 + x * x)", "x = jnp.linalg.norm(x, axis=-1)",
            "x = jnp.cumprod(x, -1)", "x = jnp.prod(x, -1)", "x = jax.nn.relu(x) ** 2", "x = jnp.arcsin(jnp.clip(x, -1, 1))",
            "x = jnp.tan(x)", "x = jnp.sinh(x)", "x = jnp.fmod(x, 1.0)", "x = jnp.mod(x, 1.0)", "x = jnp.where(x != 0, x, 5.0)",
            "x = jnp.nan_to_num(x)", "x = x * (x > 0)", "x = (x > 0).astype(x.dtype)", "x = jnp.var(x, -1)",
            "x = jnp.fft.fft(x).real.astype(x.dtype)", "x = jnp.fft.rfft(x).imag.astype(x.dtype)", "x = lax.top_k(x, 1)[0]",
            "x = jnp.argsort(x, -1).astype(x.dtype)", "x = jnp.take_along_axis(x, jnp.argsort(-x, -1), -1)",
            "x = jnp.where(x >= 0, x, -0.0 * x)", "x = jnp.heaviside(x, 0.5)", "x = jnp.copysign(x, jnp.flip(x, -1))",
            "x = lax.cond(jnp.sum(x) > 0, lambda v: v, lambda v: 2 * v, x)", "x = jnp.exp(-jnp.abs(x))", "x = 1 / (1 + jnp.exp(-x))",
            "x = lax.while_loop(lambda v: jnp.sum(jnp.abs(v)) < 9, lambda v: 2 * v + 1, x)", "x = jnp.sinc(x)",
            "x = x.at[jnp.argmax(x.reshape(-1)) % x.shape[0]].set(0.0)", "x = jax.nn.softmax(x, -1) * x", "x = jnp.hypot(x, 1.0)",
            "x = x @ x.swapaxes(-1, -2)", "x = jnp.exp(jnp.minimum(x, 0))", "x = jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1], dtype=x.dtype)",
            "x = jnp.searchsorted(jnp.arange(3.0), x.ravel()).astype(x.dtype)", "x = jax.lax.rsqrt(1 + jnp.abs(x))",
        ]
    )  # fmt: skip


MOVED = {}
"""Operations of programs in which layers follow on movement and on channels that are taken apart."""


def uneven(b, *shape):
    """An array whose entries along each axis differ by powers of ten, so that directions matter."""
    array = b.rng.standard_normal(shape)
    for axis, length in enumerate(shape):
        if length > 1:
            along_axis = [length if n == axis else 1 for n in range(len(shape))]
            array = array * 10.0 ** b.rng.integers(-2, 1, length).reshape(along_axis)
    return b.param(array)


def layer(b, c, out=None):
    """A convolution of ``{}``, over the channels ``c``, in one of the usual layouts."""
    rank, out = len(b.shape) - 2, out or b.pick([1, 2, c])
    letters = "HW"[-rank:]
    kernel = uneven(b, *(b.pick([1, 2, 3]) for _ in range(rank)), c, out)
    padding = b.pick(["'SAME'", "'SAME'", "'VALID'", str([(1, 0)] * rank), str([(-1, 2)] * rank)])
    strides = b.pick([[1] * rank] * 3 + [[2] * rank])
    spec = b.pick([f"N{letters}C"] * 4 + [f"C{letters}N", f"{letters}NC"])
    numbers = f"dimension_numbers=('{spec}', '{letters}IO', '{spec}')"
    return f"lax.conv_general_dilated({{}}, {kernel}, {strides}, {padding}, {numbers})"


MOVES_OF_IMAGES = [
    "{x}", "{x}[:, ::-1]", "{x}[..., ::-1]", "{x}[::-1]", "jnp.roll({x}, 1, 1)", "jnp.roll({x}, 1, -1)", "{x}[:, :-1]",
    "{x}[:, 1:]", "{x}[:, ::2]", "{x}[:, jnp.array([1, 0, 2])]", "{x}[:, jnp.array([0, 0, 1])]", "jnp.swapaxes({x}, 1, -2)",
    "lax.rev({x}, (1, len({x}.shape) - 1))", "jnp.concatenate([{x}[:, 1:], {x}[:, :1]], 1)", "jnp.pad({x}, [(0, 0), (1, 0)] + [(0, 0)] * (len({x}.shape) - 2))",
    "jnp.pad({x}, [(0, 0), (1, 1)] + [(0, 0)] * (len({x}.shape) - 2), mode='wrap')", "jnp.pad({x}, [(0, 0), (1, 2)] + [(0, 0)] * (len({x}.shape) - 2), mode='wrap')",
    "jnp.pad({x}, [(0, 0), (1, 1)] + [(0, 0)] * (len({x}.shape) - 2), mode='edge')", "jnp.concatenate([0 * {x}[:, :1], {x}], 1)", "lax.pad({x}, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 1)] + [(0, 0, 0)] * (len({x}.shape) - 2))",
]  # fmt: skip


@operation(4, MOVED)
def convolution_of_what_was_moved(b):
    if len(b.shape) not in (3, 4):
        return None
    image = b.pick(MOVES_OF_IMAGES).format(x="x")
    return f"x = {layer(b, b.shape[-1]).format(image)}"


@operation(3, MOVED)
def sum_with_what_was_moved(b):
    if len(b.shape) not in (3, 4):
        return None
    move, c = b.pick(MOVES_OF_IMAGES), b.shape[-1]
    text = layer(b, c, c).format(move.format(x="x"))
    before = b.pick(["x", "x", "x[:, ::-1]", "x[:, :-1]", "x[:, :3]", "x[..., ::-1]"])
    return f"x = {before} {b.pick('+-')} {b.pick(['', 'jax.nn.relu'])}({text})"


@operation(3, MOVED)
def coupling(b):
    if len(b.shape) not in (3, 4) or b.shape[-1] < 2:
        return None
    c, half = b.shape[-1], b.shape[-1] // 2
    first, second = b.pick([(f"x[..., :{half}]", f"x[..., {half}:]"), (f"x[..., {c - half}:]", f"x[..., :{c - half}]")])
    inner = b.pick(["", "jax.nn.relu", "jnp.tanh"])
    text = layer(b, half, c - half).format(first)
    return b.pick(
        [
            f"x = jnp.concatenate([{first}, {second} + {inner}({text})], -1)",
            f"x = jnp.concatenate([{inner}({text}), {second}], -1)",
            f"x = {second} - {inner}({text})",
            f"x = {text}",
        ]
    )


@operation(2, MOVED)
def shuffled_channels(b):
    c = b.shape[-1]
    order = b.rng.permutation(c).tolist()
    return b.pick(
        [
            f"x = x[..., jnp.array({order})]",
            "x = x[..., ::-1]",
            f"x = x[..., jnp.array({b.rng.integers(0, c, c + 1).tolist()})]",
            "x = x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)",
        ]
    )


@operation(3, MOVED)
def factor_of_tokens(b):
    """A factor for each channel of maps that were laid out anew."""
    c = b.shape[-1]
    operation = b.pick(["*", "/"])
    ones = [1] * (len(b.shape) - 1)
    return b.pick(
        [
            f"x = x.reshape(x.shape[0], -1, {c}) {operation} {uneven(b, c)}",
            f"x = jnp.moveaxis(x, -1, 1) {operation} {uneven(b, c)}.reshape({[c] + ones[1:]})",
            f"x = x.reshape(-1, {c}) {operation} {uneven(b, c)}",
            f"x = x {operation} {uneven(b, c)}",
            f"x = x {operation} {uneven(b, b.shape[1])}.reshape({[b.shape[1]] + ones[1:]})",
        ]
    )


@operation(2, MOVED)
def pooled_head(b):
    if len(b.shape) not in (3, 4):
        return None
    c, axes = b.shape[-1], tuple(range(1, len(b.shape) - 1))
    return b.pick(
        [
            f"x = x.sum({axes}) @ {uneven(b, c, 2)}",
            f"x = x.mean({axes}) @ {uneven(b, c, 2)}",
            f"x = x.sum({tuple(range(2, len(b.shape)))}) @ {uneven(b, b.shape[1], 2)}",
            f"x = x.sum({axes[:1]})",
            f"x = jnp.moveaxis(x, -1, 0).sum({tuple(range(2, len(b.shape)))}).T @ {uneven(b, c, 2)}",
        ]
    )


@operation(2, MOVED)
def softmax_by_hand(b):
    c = b.shape[-1]
    shift = b.pick([f"x @ {uneven(b, c, 1)}", "x.max(-1, keepdims=True)", "x[..., :1]", "0 * x[..., :1]"])
    total = b.pick(
        ["e.sum(-1, keepdims=True)", "jnp.zeros(x.shape[:-1] + (1,), x.dtype).at[...].add(e.sum(-1, keepdims=True))"]
    )
    return f"e = jnp.exp(x - jnp.broadcast_to({shift}, x.shape))\nx = e / {total}"


@operation(2, MOVED)
def selected(b):
    c = b.shape[-1]
    mask = (b.rng.random(c) < 0.5).tolist()
    copies = b.rng.integers(0, c, 3 * c).tolist()
    few = round(10.0 ** float(b.rng.integers(-3, 1)), 4)
    return b.pick(
        [
            f"x = jnp.where(jnp.array({mask}), x, {few} * jnp.tanh(x))",
            f"s = x[..., jnp.array({copies})]\nx = jnp.where(jnp.arange({3 * c}) > {c}, s, {few} * jnp.tanh(s))",
            f"u = jnp.full(x.shape, {b.number()}, x.dtype).at[...].add(x)\nx = jnp.concatenate([jnp.maximum(u, x[..., ::-1]), jnp.minimum(x, x[..., ::-1])], -1)",
            f"x = jnp.concatenate([x, {few} * x[..., ::-1]], -1)",
        ]
    )


@operation(2, MOVED)
def dense_uneven(b):
    return f"x = {b.pick(['', 'jax.nn.relu'])}(x @ {uneven(b, b.shape[-1], b.pick([1, 2, 3]))})"


@operation(2, MOVED)
def complex_and_back(b):
    c = b.shape[-1]
    return b.pick(
        [
            f"x = ((x @ {uneven(b, c, c)}) * {b.pick(['1j', '(3 + 4j)', '(1 - 1j)'])}).{b.pick(['imag', 'real'])}",
            f"x = jnp.abs(jnp.tanh(x @ {uneven(b, c, c)}) * (3 + 4j))",
            f"x = jnp.abs(lax.complex(x, {b.number()} * x[..., ::-1]))",
            "x = jnp.fft.ifft(jnp.fft.fft(x, axis=1) * 2j, axis=1).imag",
        ]
    )


for _function, _weight in ((activation, 3), (save, 1.5), (combine, 2), (sorting, 0.5), (pooling, 0.5)):
    operation(_weight, MOVED)(_function)


def generate_moved(seed):
    """A program of layers that follow on movement."""
    return generate(seed, MOVED, 12)


def generate(seed, operations=OPERATIONS, stream=11):
    """The program of a seed."""
    rng = np.random.default_rng([seed, stream])
    b = Builder(rng)
    names = list(operations)
    weights = np.array([operations[name][1] for name in names], float)
    # Bounds of long programs are loose, and forgive mistakes: every third is short.
    wanted, done = int(2 if rng.random() < 0.35 else rng.integers(2, 9)), 0
    for _ in range(200):
        if done >= wanted:
            break
        name = names[rng.choice(len(names), p=weights / weights.sum())]
        before = dict(b.params)
        try:
            text = operations[name][0](b)
        except (ValueError, IndexError):  # too few axes for it
            text = None
        if text is None or not b.add(text):
            b.params = before
            continue
        used_here = {key for key in b.params if f"'{key}'" in text}
        b.params = {key: value for key, value in b.params.items() if key in before or key in used_here}
        if name == "save":
            b.saved.append(b.shape)
            continue
        done += 1
    return Case(seed, "\n".join(b.lines), b.params, b.start)
