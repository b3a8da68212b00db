"""All that is claimed of accelerators, in one run of under 9 minutes.

    python -m benchmarks gpu [--quick]

First the trainer's throughput (throughput.py). factorizations: the library's calls on stacks of matrices, with their
errors; one batched product is the unit in which a roofline counts (the norm by products takes 25, a clip some 90). Then
spectrum, norm, clip, inside (a clip of a kernel with half the norm) against the plain two-liner in jitted jax.numpy on
the same device, 3x3 kernels; norm and clip by batched ``eigh`` and by matrix products alone, which decides what
``factorization="auto"`` should take; every answer compared with NumPy's in float64. training: what ``every=1`` and
``every=100`` add to a step of ResNet-18 and ResNet-32. Rows are printed and written as they come; what no time is left
for is named.
On a CPU it runs too, which shows that it works and nothing else.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks import renderings, throughput, training
from benchmarks.measure import show, write
from opnorm_jax._blocks import factor

SIZES = [(64, 32), (128, 16), (512, 7), (256, 8)]  # channels, map
SIDES = [(8, 1024), (16, 1024), (32, 1024), (33, 1024), (64, 544), (128, 144), (256, 40), (512, 28)]  # side, matrices
NETWORKS = [("ResNet-32", 128, ("clip", "rescale", "project")), ("ResNet-18", 128, ("clip", "rescale"))]
LIMIT_SECONDS = 500


def timed(functions, repeats, limit):
    """Median seconds of each of several functions of nothing, in turns, and what each first call took besides.

    A function whose first calls used up the limit is measured by its second call alone.
    """
    first, times, end = {}, {name: [] for name in functions}, time.perf_counter() + limit
    for name, function in functions.items():
        began = time.perf_counter()
        jax.block_until_ready(function())
        first[name] = time.perf_counter() - began
    for turn in range(repeats):
        for name, function in functions.items():
            if turn and time.perf_counter() > end:
                continue
            began = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - began)
    seconds = {name: float(np.median(found)) for name, found in times.items()}
    return seconds, {name: first[name] - seconds[name] for name in functions}


def kernels(channels, n, repeats):
    """The row of one size."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
    size, k = (n, n), jax.device_put(kernel)
    truth = np.sort(renderings.paper_spectrum(kernel.astype(np.float64), size).ravel())
    norm = float(truth[-1])
    jit = lambda function, **options: functools.partial(jax.jit(functools.partial(function, conv=size, **options)), k)
    both = lambda name, function, **options: {
        f"{name}, {by}": jit(function, execution=oj.Execution(factorization=by), **options)
        for by in ("decompose", "products")
    }
    functions = {
        "spectrum, jax.numpy": lambda: renderings.plain_spectrum(k, size),
        "clip, jax.numpy": lambda: renderings.plain_clip(k, size, norm / 2),
        "spectrum, ours": jit(oj.singular_values),
        **both("norm", oj.operator_norm),
        **both("bounds", oj.operator_norm_bounds),
        **both("clip", oj.clip_operator_norm, max_norm=norm / 2),
        **both("inside", oj.clip_operator_norm, max_norm=2 * norm),
        "rescale": jit(oj.rescale_operator_norm, max_norm=norm / 2),
    }
    seconds, compiling = timed(functions, repeats, limit=20)
    host = {name: np.asarray(jax.device_get(function()), np.float64) for name, function in functions.items()}
    clipped = renderings.paper_clip(kernel.astype(np.float64), size, norm / 2)
    errors = {}
    for name, found in host.items():
        if name.startswith("spectrum"):
            errors[name] = float(np.abs(np.sort(found.ravel()) - truth).max() / norm)
        elif name.startswith("norm"):
            errors[name] = abs(float(found) / norm - 1)
        elif name.startswith("bounds"):
            lower, upper = (float(end) for end in found)
            errors[name] = {"lower / norm - 1": lower / norm - 1, "upper / norm - 1": upper / norm - 1}
        elif name.startswith("clip"):
            errors[name] = float(np.abs(found - clipped).max())
        elif name.startswith("inside"):
            errors[name] = float(np.abs(found - kernel).max())
    against = {"spectrum": "spectrum", "norm": "spectrum", "bounds": "spectrum"}
    times = {
        name: seconds[f"{against.get(name.split(',')[0], 'clip')}, jax.numpy"] / seconds[name]
        for name in functions
        if "jax.numpy" not in name
    }
    row = {"claim": "kernels", "channels": channels, "map": n, "times faster": times, "errors": errors}
    row |= {"seconds": seconds, "compile_seconds": compiling}
    show({key: value for key, value in row.items() if key != "errors"})
    return row


def factorizations(side, count, repeats):
    """The library's calls on a stack of matrices of this side: times, and errors against float64 on the host.

    Errors are of the first 16, in units of eps times the largest eigenvalue or singular value.
    """
    rng = np.random.default_rng(side)
    stack = (rng.standard_normal((count, side, side)) + 1j * rng.standard_normal((count, side, side))).astype("c8")
    square = np.asarray(jax.jit(factor.gram)(stack))
    square = (square + square.conj().swapaxes(1, 2)) / 2
    a, g = jax.device_put(stack), jax.device_put(square)
    functions = {
        "eigh": functools.partial(jax.jit(factor.eigh), g),
        "cholesky": functools.partial(jax.jit(factor.all_below), g, jnp.float32(1e9)),
        "svd": functools.partial(jax.jit(factor.singular_values), a),
        "product": functools.partial(jax.jit(functools.partial(jnp.matmul, precision="highest")), a, a),
    }
    seconds, compiling = timed(functions, repeats, limit=10)
    few = slice(0, 16)
    eps = float(np.finfo(np.float32).eps)
    values, vectors = (np.asarray(x) for x in functions["eigh"]())
    truth = np.linalg.eigvalsh(square[few].astype(np.complex128))
    wide = vectors[few].astype(np.complex128)
    residual = square[few] @ wide - wide * values[few, None, :]
    unit = eps * truth[:, -1]
    lengths = np.linalg.svd(stack[few].astype(np.complex128), compute_uv=False)
    found = np.asarray(functions["svd"]())[few]
    errors = {
        "eigenvalues": float((np.abs(values[few] - truth).max(1) / unit).max()),
        "residual": float((np.linalg.norm(residual, 2, (1, 2)) / unit).max()),
        "orthogonality": float(np.abs(wide.conj().swapaxes(1, 2) @ wide - np.eye(side)).max() / eps),
        "singular values": float((np.abs(found - lengths).max(1) / (eps * lengths[:, 0])).max()),
    }
    row = {"claim": "factorizations", "side": side, "matrices": count, "errors in eps": errors, "seconds": seconds}
    row |= {"compile_seconds": compiling}
    show(row)
    return row


def parts(options):
    """(seconds it may need, name, function that yields rows) of everything, the most important first."""
    quick, repeats = options.quick, min(options.repeats, 5)
    for case in throughput.QUICK if quick else throughput.CASES:
        yield 60, f"throughput of {case}", lambda case=case: [throughput.measure(*case, quick)]
    for side, count in [(8, 16)] if quick else SIDES:
        yield 15, f"factorizations of {side}", lambda s=side, c=count: [factorizations(s, c, repeats)]
    for channels, n in [(8, 8)] if quick else SIZES:
        yield 40, f"kernels {channels}@{n}", lambda c=channels, n=n: [kernels(c, n, repeats)]
    for case in training.QUICK if quick else NETWORKS:
        yield 90, f"training of {case[0]}", lambda case=case: [training.measure(*case, repeats)]


def run(options):
    """All rows that there is time for; a part that fails is named, and the others go on."""
    rows, end = [], time.perf_counter() + (options.seconds or LIMIT_SECONDS)
    for need, name, make in parts(options):
        if options.parts and name.split()[0] not in options.parts:
            continue
        if end - time.perf_counter() < need:
            print(f"no time left for {name}", flush=True)
            continue
        began = time.perf_counter()
        try:
            for row in make():
                rows.append(row)
                if not options.quick:
                    write(rows, "gpu", options.out)
        except Exception as error:  # whatever an accelerator's library says
            print(f"failed: {name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            rows.append({"claim": "failed", "name": name, "error": f"{type(error).__name__}: {str(error)[:2000]}"})
        print(f"   {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return rows
