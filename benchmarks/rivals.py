"""Norms and clips by what others published, on the shapes of their own tables, beside ours.

    python -m benchmarks rivals [--quick] [--weights FOLDER]

lip4conv   a random 5x5 kernel, 64 -> 64 channels, on 12x12 pixels, with circular and with zero padding (the notebook
           of Delattre et al.)
ResNet-18, VGG-19   the convolutions in the tables of Grishina et al., for images of 224x224 pixels: each shape once,
           with the networks' strides and zero padding, and random kernels. 1x1 kernels are left out, as they are
           matrices, and so are VGG-19's maps above 56x56, where the truth takes too long
FOLDER     trained kernels: .npz files as for benchmarks/trained_networks.py
clip       the norm that is left of twice the bound, and how far the kernel moved

The truth of zero padding is a converged Lanczos iteration in float64 through the layer itself, that of circular padding
the largest of all singular values in float64. Every method gets float32 kernels, and a strided layer as the equal one
without strides (space_to_depth), except ours and power iteration. Medians of interleaved runs, compilation apart; a
method that takes more than a second is timed once. Rows that are there already are not measured again.
"""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks import renderings
from benchmarks.measure import interleaved, read, show, write
from benchmarks.trained_networks import of_pytorch

LIP4CONV = (5, 64, 64, 12, 1)  # taps, channels in and out, map, stride
SMALL = (3, 32, 32, 16, 1)  # of ResNet-32
NETWORKS = {
    "ResNet-18": [
        (7, 3, 64, 224, 2),
        (3, 64, 64, 56, 1),
        (3, 64, 128, 56, 2),
        (3, 128, 128, 28, 1),
        (3, 128, 256, 28, 2),
        (3, 256, 256, 14, 1),
        (3, 256, 512, 14, 2),
        (3, 512, 512, 7, 1),
    ],
    "VGG-19": [(3, 128, 256, 56, 1), (3, 256, 256, 56, 1), (3, 256, 512, 28, 1), (3, 512, 512, 14, 1)],
}
QUICK = (3, 4, 6, 8, 1)
SLOW = 1.0  # seconds
MOST_WORK = {"FFT and SVD": 1e10, "Gram, circular": 4e10, "Gram, zero padding": 4e10}  # more takes minutes

METHODS = {  # whether each is an upper bound, in exact arithmetic
    "SpectralNorm": "no",
    "SpectralNorm x sqrt(hw)": "yes, converged",
    "four unfoldings": "yes, converged",
    "tensor norm": "yes, if the maximum is found",
    "Gram, circular": "circular padding only",
    "Gram, zero padding": "yes",
    "power iteration": "no",
    "FFT and SVD": "circular padding only",
    "operator_norm": "no",
    "operator_norm_bounds, lower": "a lower bound",
    "operator_norm_bounds": "yes",
    "operator_norm_bounds, upper alone": "yes",
    "operator_norm_upper_bound": "yes",
}


def normal(taps, i, o):
    """A random kernel."""
    return np.random.default_rng(0).standard_normal((taps, taps, i, o)).astype(np.float32)


def lanczos_norm(kernel, size, stride=1, steps=400, tolerance=1e-6):
    """The zero-padded layer's norm in float64, from below, by Golub and Kahan's bidiagonalisation.

    Every vector is made orthogonal to all before it. It ends when twenty steps add less than ``tolerance``.
    """
    with jax.enable_x64(True):
        kernel = jnp.asarray(kernel, jnp.float64)
        shape = (1, *size, kernel.shape[2])
        forward = jax.jit(lambda x: renderings.zero_padded(x, kernel, stride))
        transpose = jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, jnp.float64))
        backward = jax.jit(lambda y: transpose(y)[0])
        x = np.random.default_rng(0).standard_normal(shape)
        basis = np.empty((steps, x.size))
        y, diagonal, above, norms = 0.0, [], [np.linalg.norm(x)], []
        for step in range(steps):
            basis[step] = x.ravel() / above[-1]
            x = basis[step].reshape(shape)
            y = np.asarray(forward(x)) - (above[-1] * y if step else 0)
            diagonal.append(np.linalg.norm(y))
            y /= diagonal[-1]
            norms.append(np.linalg.norm(np.diag(diagonal) + np.diag(above[1:], 1), 2))
            if step >= 20 and norms[-1] < (1 + tolerance) * norms[-21]:
                break
            x = np.array(backward(y)).ravel()
            for _ in range(2):
                x -= basis[: step + 1].T @ (basis[: step + 1] @ x)
            above.append(np.linalg.norm(x))
    return float(norms[-1])


def methods(shape, conv, iterations):
    """Functions of the kernel, and functions of the equal kernel without strides; ``iterations`` are Gram's."""
    (n, _), stride = conv.input_shape, conv.strides[0]
    h, w, i, o = renderings.space_to_depth(jnp.empty(shape), stride).shape
    size = (-(-n // stride),) * 2
    own = {
        "SpectralNorm": renderings.flattened_norm,
        "power iteration": lambda kernel: renderings.power_iteration(kernel, (n, n), 100, stride),
        "operator_norm": lambda kernel: oj.operator_norm(kernel, conv),
        "operator_norm_bounds": lambda kernel: oj.operator_norm_bounds(kernel, conv),
        "operator_norm_bounds, upper alone": lambda kernel: oj.operator_norm_bounds(kernel, conv).upper,
        "operator_norm_upper_bound": lambda kernel: oj.operator_norm_upper_bound(kernel, strides=stride),
    }
    unstrided = {
        "SpectralNorm x sqrt(hw)": lambda kernel: math.sqrt(h * w) * renderings.flattened_norm(kernel),
        "four unfoldings": renderings.four_unfoldings,
        "tensor norm": renderings.tensor_norm,
        "Gram, circular": lambda kernel: renderings.gram_circular(kernel, size, iterations[0]),
        "Gram, zero padding": lambda kernel: renderings.gram_zero_padded(kernel, iterations[1]),
        "FFT and SVD": lambda kernel: jnp.max(renderings.plain_spectrum(kernel, size)),
    }
    if conv.padding == "CIRCULAR":
        del own["power iteration"]  # the rendering pads with zeros
    work = min(i, o) ** 2 * max(i, o)  # of one frequency
    grid = ((h - 1) * 2 ** iterations[1] + 1) * ((w - 1) * 2 ** iterations[1] + 1)
    for name, most in MOST_WORK.items():
        if work * (grid if "zero" in name else size[0] ** 2) > most:
            del unstrided[name]
    return own, unstrided


def compiled(functions, kernel):
    """Each function compiled for such a kernel, and the seconds that it took."""
    programs, seconds = {}, {}
    for name, function in functions.items():
        began = time.perf_counter()
        programs[name] = jax.jit(function).lower(kernel).compile()
        seconds[name] = time.perf_counter() - began
    return programs, seconds


@functools.cache
def compiled_norms(shape, conv, iterations):
    """The methods compiled once for all layers of a shape."""
    own, unstrided = methods(shape, conv, iterations)
    kernel = jnp.empty(shape)
    return compiled(own, kernel), compiled(unstrided, renderings.space_to_depth(kernel, conv.strides[0]))


def timed(functions, repeats):
    """The values of functions of nothing, and their seconds."""
    values, seconds = {}, {}
    for name, function in functions.items():
        began = time.perf_counter()
        values[name] = jax.device_get(function())
        seconds[name] = time.perf_counter() - began
    quick = {name: function for name, function in functions.items() if seconds[name] < SLOW}
    return values, {**seconds, **interleaved(quick, repeats)}


def norms(label, kernel, conv, repeats, iterations=(7, 4)):
    """A row: every method's value over the truth, and its time."""
    kernel = jnp.asarray(kernel)
    if conv.padding == "CIRCULAR":
        truth = renderings.paper_spectrum(np.asarray(kernel, np.float64), conv.input_shape).max()
    else:
        truth = lanczos_norm(kernel, conv.input_shape, conv.strides[0])
    flat = renderings.space_to_depth(kernel, conv.strides[0])
    (own, own_seconds), (unstrided, unstrided_seconds) = compiled_norms(kernel.shape, conv, iterations)
    functions = {name: functools.partial(program, kernel) for name, program in own.items()}
    functions |= {name: functools.partial(program, flat) for name, program in unstrided.items()}
    values, seconds = timed(functions, repeats)
    values["operator_norm_bounds, lower"], values["operator_norm_bounds"] = values["operator_norm_bounds"]
    return {
        **label,
        "padding": "circular" if conv.padding == "CIRCULAR" else "zero",
        "truth": float(truth),
        "ratio": {name: float(values[name] / truth) for name in METHODS if name in values},
        "seconds": seconds,
        "compile_seconds": own_seconds | unstrided_seconds,
    }


def clips(label, kernel, conv, repeats):
    """A row: what each leaves of a kernel of norm 2 for a bound of 1, and how far it moves it."""
    size = conv.input_shape
    kernel = jnp.asarray(2 / lanczos_norm(kernel, size) * kernel, jnp.float32)
    functions = {
        "SpectralNorm": lambda kernel: kernel / jnp.maximum(renderings.flattened_norm(kernel), 1),
        "FFT, SVD and crop": lambda kernel: renderings.plain_clip(kernel, size, 1.0),
        "FastClip, 200 rounds": lambda kernel: renderings.fast_clip(kernel, size, 1.0, 200),
        "FastClip, 1000 rounds": lambda kernel: renderings.fast_clip(kernel, size, 1.0, 1000),
    }
    for function in (oj.clip_operator_norm, oj.rescale_operator_norm, oj.project_operator_norm):
        functions[function.__name__] = functools.partial(function, conv=conv, max_norm=1.0)
    programs, compile_seconds = compiled(functions, kernel)
    values, seconds = timed({name: functools.partial(program, kernel) for name, program in programs.items()}, repeats)
    return {
        **label,
        "padding": "zero",
        "norm": {name: lanczos_norm(value, size) for name, value in values.items()},
        "moved": {name: float(jnp.linalg.norm((value - kernel).ravel())) for name, value in values.items()},
        "seconds": seconds,
        "compile_seconds": compile_seconds,
    }


def layer(case, padding=None):
    """The label, the kernel and the description of a case."""
    taps, i, o, n, stride = case
    pads = ((taps - 1) // 2, taps // 2)
    conv = oj.Conv((n, n), strides=stride, padding=padding or (pads, pads))
    return (
        {"layer": f"{taps}x{taps}, {i} -> {o}, {n}x{n}" + f", stride {stride}" * (stride > 1)},
        normal(taps, i, o),
        conv,
    )


def run(options):
    """All rows."""
    rows, repeats = [] if options.quick else read(options.out, "rivals"), min(options.repeats, 3)
    networks = {"quick": [QUICK]} if options.quick else NETWORKS
    first = QUICK if options.quick else LIP4CONV

    def add(measure, label, kernel, conv, *how):
        if any(label.items() <= row.items() for row in rows):
            return
        row = measure(label, kernel, conv, *how)
        rows.append(row)
        if not options.quick:
            write(rows, "rivals", options.out)  # as they come
        show({key: value for key, value in row.items() if key not in ("moved", "compile_seconds")})

    for padding in ("CIRCULAR", None):
        label, kernel, conv = layer(first, padding)
        label = {"claim": "norm", "set": "lip4conv", "padding": "zero" if padding is None else "circular", **label}
        add(norms, label, kernel, conv, repeats, (5, 2) if options.quick else (5, 5))
    for case in (QUICK,) if options.quick else (LIP4CONV, SMALL):
        label, kernel, conv = layer(case)
        add(clips, {"claim": "clip", **label}, kernel, conv, repeats)
    for network, cases in networks.items():
        for case in cases:
            label, kernel, conv = layer(case)
            add(norms, {"claim": "norm", "set": network, **label}, kernel, conv, repeats)
    for path in sorted(options.weights.glob("*.npz")) if options.weights else ():
        for name, kernel, conv in of_pytorch(path):
            add(norms, {"claim": "norm", "set": "trained", "network": path.stem, "layer": name}, kernel, conv, 1)
    return rows
