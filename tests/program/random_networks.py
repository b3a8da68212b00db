"""Random small networks, and what they stretch: dense float64 matrices that share no code with the library.

A network is a list of operations. ``Network.fn`` runs it in jax. ``Network.steepest`` replaces every activation by a
diagonal of numbers in the interval of its slopes, chosen by ascent so that the whole, then linear, has a large norm. No
point of the input need have these slopes. But the semidefinite bound promises to hold for all such diagonals; so this
is the sharper test of it, and it is exact where a network has no activation.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from oracle import dense_matrix

ACTIVATIONS = {  # intervals that the slopes really fill, rounded inwards
    "relu": (jax.nn.relu, 0.0, 1.0),
    "leaky": (lambda x: jax.nn.leaky_relu(x, 0.2), 0.2, 1.0),
    "tanh": (jnp.tanh, 0.0, 1.0),
    "softplus": (jax.nn.softplus, 0.0, 1.0),
    "sigmoid": (jax.nn.sigmoid, 0.0, 0.25),
    "elu": (jax.nn.elu, 0.0, 1.0),
    "gelu": (jax.nn.gelu, -0.128, 1.128),
    "abs": (jnp.abs, -1.0, 1.0),
    "silu": (jax.nn.silu, -0.099, 1.099),
    "negative": (lambda x: jax.nn.leaky_relu(x, -0.5), -0.5, 1.0),
    "steep": (lambda x: jax.nn.leaky_relu(x, 2.0), 1.0, 2.0),
}


@dataclasses.dataclass
class Network:
    """Operations in order: each a name, the numbers of the values that it takes (0 is the input), and options."""

    shape: tuple[int, ...]  # of the input: spatial axes, channels
    ops: list[tuple] = dataclasses.field(default_factory=list)
    params: list[np.ndarray] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.shapes = [self.shape]

    def __str__(self):
        lines = [f"x {self.shape}"]
        lines += [f"{n}: {op} -> {shape}" for n, (op, shape) in enumerate(zip(self.ops, self.shapes[1:]), 1)]
        return "\n".join(lines)

    def add(self, op, shape):
        self.ops.append(op)
        self.shapes.append(tuple(shape))
        return len(self.ops)

    def fn(self, params, x):
        """The network on a batch."""
        values = [x]
        for name, sources, options in self.ops:
            one = values[sources[0]]
            if name == "conv":
                values.append(_convolve(one, params[options["kernel"]], options))
            elif name == "scale":
                factor = jnp.expand_dims(params[options["factor"]], tuple(range(one.ndim - 1)))
                values.append((one - 0.1) * factor + 0.3)
            elif name == "act":
                values.append(ACTIVATIONS[options["name"]][0](one))
            elif name == "sum":
                values.append(one + values[sources[1]])
            elif name == "difference":
                values.append(one - values[sources[1]])
            elif name == "concatenate":
                values.append(jnp.concatenate([one, values[sources[1]]], axis=-1))
            elif name == "pool":
                window = (1, *options["window"], 1)
                summed = jax.lax.reduce_window(one, 0.0, jax.lax.add, window, window, "VALID")
                values.append(summed / math.prod(window))
            elif name == "mean":
                values.append(jnp.mean(one, axis=tuple(range(1, one.ndim - 1))))
            elif name == "moved":
                values.append(_moved(one, options, jnp))
            else:
                values.append(one @ params[options["kernel"]] + 0.5)
        return values[-1]

    def matrices(self):
        """For every operation its dense matrices, one for each value that it takes; for an activation, its interval."""
        out = []
        for (name, sources, options), shape in zip(self.ops, self.shapes[1:]):
            before = self.shapes[sources[0]]
            size = math.prod(before)
            if name == "conv":
                geometry = {k: v for k, v in options.items() if k != "kernel"}
                out.append([dense_matrix(self.params[options["kernel"]], before[:-1], **geometry)])
            elif name == "scale":
                out.append([np.diag(np.tile(self.params[options["factor"]], size // before[-1]).astype(np.float64))])
            elif name == "act":
                out.append(ACTIVATIONS[options["name"]][1:])
            elif name in ("sum", "difference"):
                out.append([np.eye(size), np.eye(size) * (1 if name == "sum" else -1)])
            elif name == "concatenate":
                second = self.shapes[sources[1]][-1]
                places = np.arange(math.prod(shape)).reshape(-1, shape[-1])
                whole = np.eye(math.prod(shape))
                out.append(
                    [whole[:, places[:, : before[-1]].ravel()], whole[:, places[:, shape[-1] - second :].ravel()]]
                )
            elif name == "pool":
                kernel = np.broadcast_to(
                    np.eye(before[-1]) / math.prod(options["window"]), (*options["window"], *[before[-1]] * 2)
                )
                out.append([dense_matrix(kernel, before[:-1], strides=options["window"], padding="VALID")])
            elif name == "mean":
                pixels = size // before[-1]
                out.append([np.tile(np.eye(before[-1]) / pixels, pixels)])
            elif name == "moved":
                columns = _moved(np.eye(size).reshape(size, *before), options | {"fill": 0.0}, np)
                out.append([columns.reshape(size, -1).T])
            else:
                out.append([self.params[options["kernel"]].astype(np.float64).T])
        return out

    def steepest(self, rng, starts=4, sweeps=12):
        """The largest norm found with slopes anywhere in their intervals; exact if there is no activation."""
        matrices, best = self.matrices(), 0.0
        sites = [n for n, op in enumerate(self.ops) if op[0] == "act"]
        for _ in range(starts if sites else 1):
            slopes = {n: rng.choice(matrices[n], math.prod(self.shapes[n + 1])) for n in sites}
            found = 0.0
            for _ in range(sweeps):
                before = found
                for n in sites or [None]:
                    jacobian = [np.eye(math.prod(self.shape))]
                    for k, (_, sources, _) in enumerate(self.ops):
                        if k in slopes:
                            jacobian.append(slopes[k][:, None] * jacobian[sources[0]])
                        else:
                            jacobian.append(sum(a @ jacobian[s] for a, s in zip(matrices[k], sources, strict=True)))
                    left, values, right = np.linalg.svd(jacobian[-1])
                    found = max(found, values[0])
                    if n is None:
                        break
                    # The norm is at least the product of left, matrix and right, which is linear in one diagonal.
                    back = self._back(matrices, slopes, left[:, 0])
                    gain = back[n + 1] * (jacobian[self.ops[n][1][0]] @ right[0])
                    slopes[n] = np.where(gain > 0, max(matrices[n]), min(matrices[n]))
                best = max(best, found)
                if found <= before * (1 + 1e-9):
                    break
        return best

    def _back(self, matrices, slopes, left):
        """The output's component along ``left``, as a row vector over every value."""
        rows = [np.zeros(math.prod(shape)) for shape in self.shapes]
        rows[-1] = left
        for k in reversed(range(len(self.ops))):
            sources = self.ops[k][1]
            if k in slopes:
                rows[sources[0]] = rows[sources[0]] + slopes[k] * rows[k + 1]
            else:
                for a, s in zip(matrices[k], sources, strict=True):
                    rows[s] = rows[s] + rows[k + 1] @ a
        return rows


def _convolve(x, kernel, options):
    rank, letters = kernel.ndim - 2, "DHW"[5 - kernel.ndim :]
    padding = options["padding"]
    if padding == "CIRCULAR":
        reach = [d * (k - 1) for d, k in zip(options["kernel_dilation"], kernel.shape[:rank])]
        x = jnp.pad(x, ((0, 0), *((r // 2, r - r // 2) for r in reach), (0, 0)), mode="wrap")
        padding = "VALID"
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        options["strides"],
        padding,
        rhs_dilation=options["kernel_dilation"],
        feature_group_count=options["feature_group_count"],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )


def _moved(x, options, xp):
    """Slices of every axis, with constants around."""
    x = x[(slice(None), *(slice(*ends) for ends in options["slices"]))]
    if options["spelling"] == "pad":
        return xp.pad(x, ((0, 0), *options["pads"]), constant_values=options["fill"])
    for axis, pads in enumerate(options["pads"], 1):
        low, high = (xp.full((*x.shape[:axis], n, *x.shape[axis + 1 :]), options["fill"], x.dtype) for n in pads)
        x = xp.concatenate([low, x, high], axis)
    return x


def generate_shortcuts(seed, *, linear=False):
    """A random network of residual blocks whose shortcut is a strided slice with constant channels around.

    Some slices are shifted, cropped, padded or reversed besides; then a stage may end there. Most have a pooled head. Linear ones are circular, with one stride.
    """
    rng = np.random.default_rng(seed)
    rank = int(rng.choice([1, 2], p=[0.4, 0.6]))
    sides = tuple(int(rng.integers(4, 9) if rank == 1 else rng.integers(3, 7)) for _ in range(rank))
    net = Network((*sides, int(rng.integers(1, 4))))
    style = "CIRCULAR" if linear else str(rng.choice(["SAME", "CIRCULAR"], p=[0.7, 0.3]))
    names = list(rng.choice(list(ACTIVATIONS), 2)) if rng.random() < 0.4 else ["relu"]
    names = names if rng.random() < 0.9 and not linear else []

    def act(value):
        return net.add(("act", (value,), {"name": str(rng.choice(names))}), net.shapes[value]) if names else value

    def conv(value, channels, stride):
        *spatial, c = net.shapes[value]
        taps = [int(rng.choice([k for k in (1, 2, 3) if k <= n + 1])) for n in spatial]
        net.params.append(1.5 * rng.standard_normal((*taps, c, channels)) / math.sqrt(math.prod(taps) * c))
        net.params[-1] = net.params[-1].astype(np.float32)
        options = dict(padding=style, strides=[stride] * rank, kernel_dilation=[1] * rank, feature_group_count=1)
        shape = (*_output(spatial, taps, options), channels)
        return net.add(("conv", (value,), options | {"kernel": len(net.params) - 1}), shape)

    def shortcut(value, channels, stride):
        *spatial, c = net.shapes[value]
        slices, pads = [], []
        for n in spatial:
            kind = rng.choice(["plain", "shifted", "cropped", "reversed"], p=[0.7, 0.1, 0.15, 0.05])
            kind = "plain" if linear else kind
            start = stride - 1 if kind == "shifted" else 0
            stop = n - int(rng.integers(0, n)) if kind == "cropped" else n
            ends = (None, None, -stride) if kind == "reversed" else (start, stop, stride)
            missing = -(-n // stride) - len(range(n)[slice(*ends)])
            low = int(rng.integers(0, missing + 1))
            slices.append(ends)
            pads.append((low, missing - low))
        step = -1 if rng.random() < 0.2 else 1
        low = int(rng.integers(0, channels - c + 1))
        options = dict(slices=[*slices, (None, None, step)], pads=[*pads, (low, channels - c - low)])
        options |= dict(
            spelling=str(rng.choice(["pad", "concatenate"])), fill=float(rng.choice([0, 0.7], p=[0.8, 0.2]))
        )
        shape = (*(-(-n // stride) for n in spatial), channels)
        return net.add(("moved", (value,), options), shape)

    value = act(conv(0, int(rng.integers(1, 3)), 1)) if rng.random() < 0.6 else 0
    for _ in range(int(rng.integers(1, 4))):
        *spatial, c = net.shapes[value]
        stride = int(rng.choice([1, 2, 3], p=[0.3, 0.6, 0.1]))
        channels = min(c + int(rng.integers(0, 3)), 5)
        if style == "CIRCULAR" and any(n % stride for n in spatial):
            stride = 1
        if linear and any(max(options.get("strides", [1])) > 1 for *_, options in net.ops):
            stride = 1
        before = act(value) if rng.random() < 0.3 else value
        inner = act(conv(before, int(rng.integers(1, 4)), stride))
        inner = conv(inner, channels, 1) if rng.random() < 0.7 else conv(before, channels, stride)
        pair = (inner, shortcut(before if rng.random() < 0.8 else value, channels, stride))
        pair = pair if rng.random() < 0.5 else pair[::-1]
        value = net.add((str(rng.choice(["sum", "difference"])), pair, {}), net.shapes[inner])
        value = act(value) if rng.random() < 0.7 else value
    if rng.random() < 0.7:
        value = net.add(("mean", (value,), {}), net.shapes[value][-1:])
        net.params.append(rng.standard_normal((net.shapes[value][-1], 3)).astype(np.float32))
        value = net.add(("product", (value,), {"kernel": len(net.params) - 1}), (3,))
        value = act(value) if rng.random() < 0.2 else value
    return net


def generate(seed):
    """A random network."""
    rng = np.random.default_rng(seed)
    rank = int(rng.choice([1, 2, 2, 2, 3], p=[0.25, 0.2, 0.2, 0.2, 0.15]))
    n = {1: (4, 9), 2: (3, 6), 3: (2, 4)}[rank]
    sides = tuple(int(rng.integers(*n)) for _ in range(rank))
    if rng.random() < 0.4:
        sides = tuple(2 * -(-side // 2) for side in sides)  # so that strides fit
    net = Network((*sides, int(rng.integers(1, 4))))
    style = rng.choice(["SAME", "CIRCULAR", "mixed"], p=[0.5, 0.3, 0.2])
    names = list(rng.choice(list(ACTIVATIONS), 2)) if rng.random() < 0.8 else []
    value = 0

    def conv(value, channels=None, *, taps=None, strides=1):
        *spatial, c = net.shapes[value]
        channels = channels or int(rng.integers(1, 4))
        padding = style if style != "mixed" else str(rng.choice(["SAME", "CIRCULAR", "VALID", "explicit"]))
        taps = [int(rng.integers(1, 4)) for _ in spatial] if taps is None else [taps] * rank
        dilation = [1 if rng.random() < 0.8 else 2 for _ in spatial]
        strides = [strides] * rank
        reach = [d * (k - 1) for d, k in zip(dilation, taps)]
        if padding == "CIRCULAR" and any(r // 2 > m or r - r // 2 > m for r, m in zip(reach, spatial)):
            padding = "SAME"
        if padding == "VALID" and any(r >= m for r, m in zip(reach, spatial)):
            padding = "SAME"
        if padding == "explicit":
            padding = [(int(rng.integers(0, r + 2)), int(rng.integers(0, r + 2))) for r in reach]
            if any(m + low + high <= r for m, (low, high), r in zip(spatial, padding, reach)):
                padding = "SAME"
        groups = 1
        if c == channels and rng.random() < 0.2:
            groups = c
        kernel = rng.standard_normal((*taps, c // groups, channels)) / math.sqrt(math.prod(taps) * c)
        net.params.append((1.5 * kernel).astype(np.float32))
        options = dict(padding=padding, strides=strides, kernel_dilation=dilation, feature_group_count=groups)
        inner = _output(spatial, taps, options)
        return net.add(("conv", (value,), options | {"kernel": len(net.params) - 1}), (*inner, channels))

    def act(value):
        if not names:
            return value
        return net.add(("act", (value,), {"name": str(rng.choice(names))}), net.shapes[value])

    def scale(value):
        if rng.random() < 0.6:
            return value
        net.params.append(rng.uniform(-1.5, 1.5, net.shapes[value][-1]).astype(np.float32))
        return net.add(("scale", (value,), {"factor": len(net.params) - 1}), net.shapes[value])

    for _ in range(int(rng.integers(1, 5))):
        kind = rng.choice(["plain", "plain", "pre", "post", "dense", "strided", "shortcut", "pool", "linear"])
        *spatial, c = net.shapes[value]
        if kind in ("plain", "linear"):
            value = scale(conv(value))
            value = act(value) if kind == "plain" else value
        elif kind in ("pre", "post"):
            inner = act(scale(value)) if kind == "pre" else value
            inner = conv(act(scale(conv(inner))), c)
            if net.shapes[inner] == net.shapes[value]:
                value = net.add((str(rng.choice(["sum", "difference"])), (value, inner), {}), net.shapes[value])
                value = act(value) if kind == "post" else value
            else:
                value = inner
        elif kind == "dense":
            inner = act(conv(value))
            if net.shapes[inner][:-1] == net.shapes[value][:-1]:
                channels = c + net.shapes[inner][-1]
                value = net.add(("concatenate", (value, inner), {}), (*spatial, channels))
        elif kind == "strided" and min(spatial) > 1:
            value = act(scale(conv(value, strides=2)))
        elif kind == "shortcut" and min(spatial) > 1:
            first = act(scale(value))
            inner = conv(act(conv(first, strides=2)), c)
            other = conv(first, c, taps=1, strides=2)
            if net.shapes[inner] == net.shapes[other]:
                value = net.add(("sum", (inner, other), {}), net.shapes[inner])
            else:
                value = inner
        elif kind == "pool" and all(side % 2 == 0 for side in spatial):
            value = net.add(("pool", (value,), {"window": [2] * rank}), (*(side // 2 for side in spatial), c))
    if rng.random() < 0.35:
        value = net.add(("mean", (value,), {}), net.shapes[value][-1:])
        for _ in range(int(rng.integers(1, 3))):
            net.params.append(rng.standard_normal((net.shapes[value][-1], 3)).astype(np.float32))
            value = net.add(("product", (value,), {"kernel": len(net.params) - 1}), (3,))
            value = act(value)
    return net


def _output(spatial, taps, options):
    """The spatial shape behind a convolution, by the published definitions."""
    out = []
    for n, k, s, d, pad in zip(
        spatial,
        taps,
        options["strides"],
        options["kernel_dilation"],
        options["padding"] if isinstance(options["padding"], list) else [options["padding"]] * len(taps),
    ):
        reach = d * (k - 1)
        if pad in ("SAME", "CIRCULAR"):
            out.append(-(-n // s))
        else:
            low, high = (0, 0) if pad == "VALID" else pad
            out.append((n + low + high - reach - 1) // s + 1)
    return out
