"""Random programs that move pixels about before a convolution, as source text, from a seed."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

NAMES = {"pl": pl, "jax": jax, "jnp": jnp, "lax": lax, "nn": nn, "eqx": eqx, "hk": hk, "np": np}
BEFORE = ["", "x = x * 3.0", "x = jnp.maximum(x, 0)", "x = x + jnp.roll(x, 1, 1)"]


@dataclasses.dataclass(frozen=True)
class Case:
    seed: int
    text: str  # what moves pixels, and the convolution
    params: dict
    shape: tuple[int, ...]
    before: str = ""  # what changes numbers before they move
    stacked: str = ""  # how the kernel's parameter holds several

    @functools.cached_property
    def fn(self):
        text = f"{self.before}\n{self.text}"
        if self.stacked == "index":
            text = text.replace("p['k']", "p['k'][1]")
        elif self.stacked == "traced index":
            text = text.replace("p['k']", "lax.dynamic_index_in_dim(p['k'], 1, 0, False)")
        elif self.stacked == "ensemble":
            body = text.strip().replace("p['k']", "k").replace("\n", "\n    ")
            text = f"def one(k, x):\n    {body}\n    return x\nx = jax.vmap(one, in_axes=(0, None))(p['k'], x)"
        elif self.stacked == "scan":
            body = text.strip().replace("p['k']", "k").replace("\n", "\n    ")
            text = f"def one(x, k):\n    v = x\n    {body}\n    return v, x\nx = lax.scan(one, x, p['k'])[1]"
        return function(text)

    @property
    def all_params(self):
        """As ``fn`` takes them: the kernel is the second of three, if they are stacked."""
        if not self.stacked:
            return self.params
        return {"k": np.stack([0 * self.params["k"], self.params["k"], 2 * self.params["k"]])}

    @functools.cached_property
    def layer(self):
        """Without what comes before: the map whose norm is to be bounded."""
        return function(self.text)


def function(text):
    names = dict(NAMES)
    lines = "\n".join(f"    {line}" for line in text.splitlines() if line)
    exec(f"def fn(p, x):\n{lines}\n    return x", names)
    return names["fn"]


def kernel(rng, shape, spatial):
    """A kernel that shows mistakes; ``spatial`` are its spatial axes."""
    kind = rng.choice(["normal", "rank one", "cosine", "one row", "ones", "alternating", "ends"])
    taps = [shape[axis] for axis in spatial]
    grid = np.meshgrid(*map(np.arange, taps), indexing="ij")
    if kind == "normal":
        return rng.standard_normal(shape).astype(np.float32)
    if kind == "cosine":
        period = int(rng.integers(2, 7))
        pattern = np.prod([np.cos(2 * np.pi * axis / period) for axis in grid], axis=0)
    elif kind == "one row":
        pattern = (grid[0] == rng.choice([0, taps[0] - 1])).astype(float)
    elif kind == "alternating":
        pattern = (-1.0) ** sum(grid)
    elif kind == "ends":
        pattern = np.prod([(axis == 0) | (axis == axis.max()) for axis in grid], axis=0).astype(float)
    else:
        pattern = np.ones(taps)
    if kind == "rank one":
        pattern = functools.reduce(np.multiply.outer, [rng.standard_normal(k) for k in taps])
    others = [n for n in range(len(shape)) if n not in spatial]
    channels = rng.standard_normal([shape[n] for n in others]) if rng.random() < 0.5 else 1.0
    full = np.multiply.outer(pattern, channels * np.ones([shape[n] for n in others]))
    return np.transpose(full, np.argsort([*spatial, *others])).astype(np.float32)


def at(rank, axis, text):
    """An index with ``text`` in one place."""
    return ", ".join(text if n == axis else ":" for n in range(rank))


def along(rank, axis, here, elsewhere):
    return "(" + ", ".join(str(here if n == axis else elsewhere) for n in range(rank)) + ")"


def pads(rng, rank, axis, n, low, high):
    """Padding along one axis as one of the usual sorts, spelled in one of the usual ways."""
    mode = rng.choice(["wrap", "edge", "reflect", "symmetric", "constant"], p=[0.35, 0.15, 0.15, 0.15, 0.2])
    if mode == "constant":
        way = rng.choice(["jnp", "lax", "concatenate", "set", "add", "update"])
        config = along(rank, axis, (low, high), (0, 0))
        zeros = lambda width: f"jnp.zeros([{width} if a == {axis} else s for a, s in enumerate(x.shape)], x.dtype)"
        if way == "jnp":
            return f"x = jnp.pad(x, {config})"
        if way == "lax":
            return f"x = lax.pad(x, jnp.zeros((), x.dtype), {along(rank, axis, (low, high, 0), (0, 0, 0))})"
        if way == "concatenate":
            return f"x = jnp.concatenate([{zeros(low)}, x, {zeros(high)}], {axis})"
        if way == "update":
            start = along(rank, axis, low, 0)
            return f"x = lax.dynamic_update_slice({zeros(low + n + high)}, x, {start})"
        return f"x = {zeros(low + n + high)}.at[{at(rank, axis, f'{low}:{low + n}')}].{way}(x)"
    index = np.pad(np.arange(n), (low, high), mode=str(mode))
    way = rng.choice(["jnp", "take", "index", "concatenate", "tile", "slices"])
    if way == "jnp":
        return f'x = jnp.pad(x, {along(rank, axis, (low, high), (0, 0))}, mode="{mode}")'
    if way == "take":
        how = rng.choice(["", ', mode="wrap"', ', mode="clip"', ', mode="fill"'])
        return f"x = jnp.take(x, np.array({index.tolist()}), {axis}{how})"
    if way == "index":
        return f"x = x[{at(rank, axis, f'np.array({index.tolist()})')}]"
    if way == "tile" and mode == "wrap":
        times = -(-(low + n + high) // n) + 1
        start = -low % n
        repeats = along(rank, axis, times + 1, 1)
        return f"x = jnp.tile(x, {repeats})[{at(rank, axis, f'{start}:{start + low + n + high}')}]"
    if way == "slices":
        parts = ", ".join(f"lax.slice_in_dim(x, {i}, {i + 1}, axis={axis})" for i in index)
        return f"x = jnp.concatenate([{parts}], {axis})"
    before, after = index[:low].tolist(), index[low + n :].tolist()
    ends = lambda these: f"x[{at(rank, axis, str(these) if these else ':0')}]"
    return f"x = jnp.concatenate([{ends(before)}, x, {ends(after)}], {axis})"


def anything(rng, rank, axis, n):
    """A movement with no plan behind it."""
    a, b = sorted(int(v) for v in rng.choice(np.arange(n + 1), 2, replace=False))
    low, high = int(rng.integers(0, 4)), int(rng.integers(0, 4))
    modes = ["wrap", "edge", "reflect", "symmetric", "maximum", "minimum", "mean", "median", "linear_ramp", "constant"]
    every = {
        "pad": lambda: f'x = jnp.pad(x, {along(rank, axis, (low, high), (0, 0))}, mode="{rng.choice(modes)}")',
        "constant pad": lambda: f"x = jnp.pad(x, {along(rank, axis, (low, high), (0, 0))}, constant_values=2.5)",
        "slice": lambda: f"x = x[{at(rank, axis, f'{a}:{b}')}]",
        "strided slice": lambda: f"x = x[{at(rank, axis, f'{int(rng.integers(0, 2))}::2')}]",
        "backwards": lambda: f"x = x[{at(rank, axis, '::-1')}]",
        "negative pad": lambda: (
            f"x = lax.pad(x, jnp.zeros((), x.dtype), {along(rank, axis, (-1, low, 0), (0, 0, 0))})"
            if n > 1
            else "x = jnp.flip(x, 1)"
        ),
        "interior pad": lambda: (
            f"x = lax.pad(x, jnp.zeros((), x.dtype), {along(rank, axis, (low - 1, high, 1), (0, 0, 0))})"
        ),
        "roll": lambda: f"x = jnp.roll(x, {int(rng.integers(-3, 4))}, {axis})",
        "flip": lambda: f"x = jnp.flip(x, {axis})",
        "parts": lambda: f"x = jnp.concatenate([x[{at(rank, axis, f'{a}:')}], x[{at(rank, axis, f':{b}')}]], {axis})",
        "halves": lambda: f"x = jnp.concatenate([x, x[{at(rank, axis, '::-1')}]], {axis})",
        "zeros": lambda: (
            f"x = jnp.concatenate([x, jnp.zeros_like(x[{at(rank, axis, ':1')}]), x[{at(rank, axis, f':{low}')}]], {axis})"
        ),
        "constants": lambda: f"x = jnp.concatenate([jnp.ones_like(x[{at(rank, axis, ':1')}]), x], {axis})",
        "tile": lambda: f"x = jnp.tile(x, {along(rank, axis, 3, 1)})[{at(rank, axis, f'{low}:{low + n + high}')}]",
        "stack": lambda: (
            f"x = jnp.stack([x, jnp.zeros_like(x)], {axis + int(rng.integers(0, 2))})"
            f".reshape([2 * s if a == {axis} else s for a, s in enumerate(x.shape)])"
        ),
        "stack copies": lambda: (
            f"x = jnp.stack([x, x], {axis + int(rng.integers(0, 2))})"
            f".reshape([2 * s if a == {axis} else s for a, s in enumerate(x.shape)])"
        ),
        "take": lambda: f"x = jnp.take(x, np.array({rng.integers(0, n, n + low).tolist()}), {axis})",
        "permute": lambda: f"x = x[{at(rank, axis, f'np.array({rng.permutation(n).tolist()})')}]",
        "set": lambda: (
            f"x = jnp.zeros([{n + 3} if a == {axis} else s for a, s in enumerate(x.shape)], x.dtype)"
            f".at[{at(rank, axis, f'np.array({rng.choice(n + 3, n, replace=False).tolist()})')}].set(x)"
        ),
        "add": lambda: (
            f"x = jnp.zeros([{n + 2} if a == {axis} else s for a, s in enumerate(x.shape)], x.dtype)"
            f".at[{at(rank, axis, f'np.array({rng.permutation(n + 2)[:n].tolist()})')}].add(x)"
        ),
        "overwrite": lambda: f"x = x.at[{at(rank, axis, str(int(rng.integers(0, n))))}].set(0.0)",
        "copy within": lambda: (
            f"x = x.at[{at(rank, axis, str(int(rng.integers(0, n))))}].set(x[{at(rank, axis, str(int(rng.integers(0, n))))}])"
        ),
        "dynamic slice": lambda: f"x = lax.dynamic_slice_in_dim(x, {a}, {b - a}, axis={axis})",
        "repeat": lambda: f"x = jnp.repeat(x, 2, {axis})",
        "resize": lambda: (
            f"x = jax.image.resize(x, [s * {int(rng.integers(1, 4))} if a == {axis} else s "
            'for a, s in enumerate(x.shape)], "nearest")'
        ),
        "jit": lambda: f"x = jax.jit(lambda v: jnp.roll(v, 1, {axis}))(x)",
        "split": lambda: f"x = jnp.concatenate(jnp.split(x, [{a}, {b}], {axis})[::-1], {axis})",
        "square flip": lambda: "x = jnp.swapaxes(x, 1, 2)" if rank == 4 else "x = x[:, ::-1]",
        "rotate": lambda: "x = jnp.rot90(x, 1, (1, 2))" if rank == 4 else "x = x[:, ::-1]",
        "diagonal": lambda: (
            "x = x.reshape(x.shape[0], -1, 1, x.shape[3])" if rank == 4 else "x = x.reshape(x.shape[0], -1, x.shape[2])"
        ),
        "channels": lambda: "x = x[..., ::-1]",
        "cast": lambda: "x = x.astype(jnp.float32).astype(x.dtype)",
        "identity": lambda: f"x = jnp.swapaxes(jnp.swapaxes(x, 0, {axis}), 0, {axis})",
    }
    return every[rng.choice(list(every))]()


def moved_kernel(rng, layout, shape):
    """The kernel, moved about itself before it is used."""
    axes = [n for n, c in enumerate(layout) if c not in "IO"]
    axis, some = int(rng.choice(axes)), tuple(n for n in range(len(layout)) if rng.random() < 0.5)
    order = rng.permutation(shape[axis]).tolist()
    out = layout.index("O")
    zeros = ", ".join("(1, 1)" if n == axis else "(0, 0)" for n in range(len(layout)))
    return str(
        rng.choice(
            [
                f"jnp.flip(p['k'], {axis})",
                f"jnp.flip(p['k'], {axis})",
                f"jnp.flip(p['k'], {tuple(axes)})",
                f"jnp.flip(p['k'], {some})",
                f"jnp.roll(p['k'], 1, {axis})",
                f"jnp.take(p['k'], np.array({order}), {axis})",
                f"jnp.flip(p['k'], {out})",
                f"jnp.pad(p['k'], ({zeros}))",
                f"p['k'].swapaxes({axes[0]}, {axes[-1]})",
                f"jnp.repeat(p['k'], 2, {axis})",
                "(2 * p['k'])",
                f"(p['k'] + jnp.flip(p['k'], {axis}))",
                f"p['k'].at[{at(len(layout), axis, '0')}].set(0.0)",
                f"lax.rev(p['k'].transpose({[*range(len(layout))][::-1]}), ({len(layout) - 1 - axis},))"
                f".transpose({[*range(len(layout))][::-1]})",
                f"p['k'].reshape(-1)[::-1].reshape({list(shape)})",
            ]
        )
    )


def _one(rng):
    """Text, parameters and shape of one candidate; a shape may turn out impossible."""
    spatial = int(rng.choice([1, 2], p=[0.55, 0.45]))
    rank = spatial + 2
    shape = [1, *(int(n) for n in rng.integers(3, 8 if spatial == 1 else 6, spatial)), int(rng.integers(1, 3))]
    framework = rng.choice(["lax", "flax", "transpose", "equinox", "haiku"], p=[0.66, 0.1, 0.1, 0.1, 0.04])
    if framework != "lax":
        lines = [anything(rng, rank, 1, shape[1])] if rng.random() < 0.2 else []
        return _framework(rng, framework, spatial, shape, lines)
    taps = [int(k) for k in rng.integers(1, 6 if spatial == 1 else 4, spatial)]
    strides = [int(v) for v in rng.integers(1, 4, spatial)] if rng.random() < 0.3 else [1] * spatial
    dilation = [int(v) for v in rng.integers(1, 3, spatial)] if rng.random() < 0.3 else [1] * spatial
    spread = [int(v) for v in rng.integers(1, 3, spatial)] if rng.random() < 0.2 else [1] * spatial
    padding = [(0, 0)] * spatial
    lines = []
    planned = rng.random() < 0.6
    if planned:  # padded by what the kernel reaches
        for axis in rng.permutation(spatial) + 1:
            reach = (taps[axis - 1] - 1) * dilation[axis - 1]
            if rng.random() < 0.15:
                reach += int(rng.integers(-1, 3))
            low = int(rng.choice([reach // 2, reach, 0, rng.integers(0, max(reach, 0) + 1)], p=[0.7, 0.1, 0.1, 0.1]))
            if reach > 0:
                lines.append(pads(rng, rank, int(axis), shape[axis], low, max(reach - low, 0)))
    else:
        for _ in range(int(rng.integers(1, 4))):
            lines.append(None)
        if rng.random() < 0.4:
            padding = [tuple(int(v) for v in rng.integers(-1, 4, 2)) for _ in range(spatial)]
    if planned and rng.random() < 0.35:
        lines.insert(int(rng.integers(0, len(lines) + 1)), None)
    current = list(shape)
    for n, line in enumerate(lines):
        axis = int(rng.integers(1, spatial + 1))
        lines[n] = line or anything(rng, rank, axis, current[axis])
        current = _shape_after(lines[n], current)
    groups = 2 if current[-1] == 2 and rng.random() < 0.25 else 1
    out = groups * int(rng.integers(1, 3))
    letters = "HW"[:spatial] if spatial == 2 else "W"
    x_layout, y_layout = (str(rng.choice([f"N{letters}C", f"NC{letters}", f"{letters}NC"])) for _ in range(2))
    k_layout = str(rng.choice([f"{letters}IO", f"OI{letters}", f"I{letters}O", f"O{letters[::-1]}I"]))
    sizes = dict(zip(letters, taps)) | {"I": current[-1] // groups, "O": out}
    params = {"k": kernel(rng, [sizes[c] for c in k_layout], [k_layout.index(c) for c in letters])}
    order = [f"N{letters}C".index(c) for c in x_layout]
    if order != sorted(order):
        lines.append(f"x = x.transpose({order})")
    weights = "p['k']"
    if rng.random() < 0.4:
        weights = moved_kernel(rng, k_layout, params["k"].shape)
    options = {"padding": padding, "lhs_dilation": spread, "rhs_dilation": dilation, "feature_group_count": groups}
    if all(pad == (0, 0) for pad in padding) and rng.random() < 0.5:
        options["padding"] = "VALID"
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    lines.append(
        f"x = lax.conv_general_dilated(x, {weights}, {strides}, {text}, "
        f"dimension_numbers={(x_layout, k_layout, y_layout)})"
    )
    return lines, params, shape


def _framework(rng, framework, spatial, shape, lines):
    current = list(shape)
    for line in lines:
        current = _shape_after(line, current)
    taps = [int(k) for k in rng.integers(1, 5, spatial)]
    strides = [int(v) for v in rng.integers(1, 4, spatial)] if rng.random() < 0.4 else [1] * spatial
    dilation = [int(v) for v in rng.integers(1, 3, spatial)] if rng.random() < 0.3 else [1] * spatial
    ins, out = current[-1], int(rng.integers(1, 3))
    letters = "HW" if spatial == 2 else "W"
    explicit = [tuple(int(v) for v in rng.integers(0, 3, 2)) for _ in range(spatial)]
    if framework == "flax":
        named = ["CIRCULAR", "REFLECT", "SAME", "VALID", *(["CAUSAL"] if spatial == 1 else [])]
        padding = str(rng.choice(named)) if rng.random() < 0.85 else explicit
        kernel_shape = [*taps, ins, out]
        layer = (
            f"nn.Conv({out}, {taps}, strides={strides}, padding={padding!r}, kernel_dilation={dilation}, "
            "use_bias=False)"
        )
        lines.append(f"x = {layer}.apply({{'params': {{'kernel': p['k']}}}}, x)")
    elif framework == "transpose":
        padding = str(rng.choice(["CIRCULAR", "SAME", "VALID"], p=[0.6, 0.2, 0.2]))
        kernel_shape = [*taps, ins, out]
        extra = ""
        if rng.random() < 0.3:
            extra, kernel_shape = ", transpose_kernel=True", [*taps, out, ins]
        layer = (
            f"nn.ConvTranspose({out}, {taps}, strides={strides}, padding={padding!r}, kernel_dilation={dilation}, "
            f"use_bias=False{extra})"
        )
        lines.append(f"x = {layer}.apply({{'params': {{'kernel': p['k']}}}}, x)")
    elif framework == "haiku":
        padding = rng.choice(["hk.pad.causal", "hk.pad.full", "hk.pad.same", "hk.pad.reverse_causal", "'SAME'"])
        kernel_shape = [*taps, ins, out]
        rate = dilation if max(strides) == 1 else [1] * spatial
        lines += [
            f"layer = hk.without_apply_rng(hk.transform(lambda v: hk.Conv{spatial}D({out}, {taps}, stride={strides}, "
            f"rate={rate}, padding={padding}, with_bias=False, name='c')(v)))",
            "x = layer.apply({'c': {'w': p['k']}}, x)",
        ]
    else:
        transposed = rng.random() < 0.2
        mode = (
            "ZEROS"
            if transposed and rng.random() < 0.5
            else str(rng.choice(["ZEROS", "REFLECT", "REPLICATE", "CIRCULAR"]))
        )
        padding = rng.choice(["'SAME'", "'VALID'", repr(explicit), "1"], p=[0.5, 0.1, 0.3, 0.1])
        kernel_shape = [out, ins, *taps]
        kind = "ConvTranspose" if transposed else "Conv"
        if transposed and mode == "CIRCULAR":
            padding = "'SAME'"
        lines += [
            f"layer = eqx.filter_eval_shape(lambda: eqx.nn.{kind}({spatial}, {ins}, {out}, {taps}, stride={strides}, "
            f"padding={padding}, dilation={dilation}, use_bias=False, padding_mode='{mode}', key=jax.random.key(0)))",
            "layer = eqx.tree_at(lambda m: m.weight, layer, p['k'])",
            "x = layer(jnp.moveaxis(x[0], -1, 0))",
        ]
        if rng.random() < 0.3:
            lines[-1] = "x = jax.vmap(layer)(jnp.moveaxis(x, -1, 1))"
    spatials = [kernel_shape.index(k) for k in taps]
    start = 2 if framework == "equinox" else 0
    spatials = list(range(start, start + spatial))
    del letters
    return lines, {"k": kernel(rng, kernel_shape, spatials)}, shape


def _shape_after(line, shape):
    fn = function(line)
    return list(jax.eval_shape(lambda x: fn({}, x), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)).shape)


def generate(seed):
    """The case of a seed; a candidate that jax itself refuses gives way to the next."""
    rng = np.random.default_rng([seed, 7])
    while True:
        try:
            lines, params, shape = _one(rng)
            before = str(rng.choice(BEFORE, p=[0.7, 0.1, 0.1, 0.1]))
            stacked = str(
                rng.choice(["", "index", "traced index", "ensemble", "scan"], p=[0.84, 0.04, 0.04, 0.04, 0.04])
            )
            if "layer =" in "".join(lines):
                stacked = ""  # Equinox's modules and Haiku's functions are not made inside vmap
            case = Case(seed, "\n".join(lines), params, tuple(shape), before, stacked)
            struct = jax.ShapeDtypeStruct(case.shape, jnp.float32)
            jax.eval_shape(case.fn, case.all_params, struct)
            out = jax.eval_shape(case.layer, params, struct)
            if 0 < np.prod(out.shape) <= 400:
                return case
        except (
            ValueError,
            TypeError,
            IndexError,
            ZeroDivisionError,
            AssertionError,
            NotImplementedError,
            RuntimeError,
        ):
            continue
