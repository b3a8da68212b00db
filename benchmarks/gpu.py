"""All that is claimed of accelerators, in one run of under 9 minutes.

    python -m benchmarks gpu [--quick]

spectrum, norm, clip, inside (clip of a kernel with half the norm) against the plain two-liner in jitted jax.numpy on
the same device, 3x3 kernels; norm and clip by batched ``eigh`` and by matrix products alone, which decides what
``factorization="auto"`` should take there; every answer compared with NumPy's in float64 first. product: one batched
complex product of the blocks, the unit in which a roofline counts (the norm by products takes 25, a clip some 90).
training: what ``every=1`` and ``every=100`` add to a step of ResNet-18 and ResNet-32. Rows are printed as they come;
what no time is left for is named.
On a CPU it runs too, which shows that it works and nothing else.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks import rivals, training
from benchmarks.measure import interleaved, show

SIZES = [(64, 32), (128, 16), (256, 8), (512, 7)]  # channels, map
NETWORKS = [("ResNet-18", 128, ("rescale", "clip")), ("ResNet-32", 128, ("rescale", "clip", "project"))]
LIMIT_SECONDS = 500


def measure(channels, n, repeats):
    """Rows of one size."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
    size, k = (n, n), jax.device_put(kernel)
    truth = np.sort(rivals.paper_spectrum(kernel.astype(np.float64), size).ravel())
    norm = float(truth[-1])
    spectrum = jax.jit(functools.partial(oj.singular_values, conv=size))
    found = np.sort(np.ravel(jax.device_get(spectrum(k))))
    jit = lambda function, **options: functools.partial(jax.jit(functools.partial(function, conv=size, **options)), k)
    both = lambda function, **options: {
        f"ours, {name}": jit(function, execution=oj.Execution(factorization=name), **options)
        for name in ("decompose", "products")
    }
    norms, clips = both(oj.operator_norm), both(oj.clip_operator_norm, max_norm=norm / 2)
    clipped = rivals.paper_clip(kernel, size, norm / 2)
    errors = {"values, of the largest": float(np.abs(found - truth).max() / norm)}
    errors |= {f"norm, {name}": abs(float(function()) / norm - 1) for name, function in norms.items()}
    errors |= {f"clip, {name}": float(np.abs(function() - clipped).max()) for name, function in clips.items()}
    cases = {
        "spectrum": {"jax.numpy": lambda: rivals.plain_spectrum(k, size), "ours": lambda: spectrum(k)},
        "norm": {"jax.numpy": lambda: rivals.plain_spectrum(k, size), "ours": jit(oj.operator_norm), **norms},
        "clip": {"jax.numpy": lambda: rivals.plain_clip(k, size, norm / 2), **clips},
        "inside": {
            "jax.numpy": lambda: rivals.plain_clip(k, size, 2 * norm),
            **both(oj.clip_operator_norm, max_norm=2 * norm),
            "ours, rescale": jit(oj.rescale_operator_norm, max_norm=2 * norm),
        },
    }
    for claim, functions in cases.items():
        seconds = interleaved(functions, repeats)
        times = {name: seconds["jax.numpy"] / seconds[name] for name in functions if name != "jax.numpy"}
        row = {"claim": claim, "channels": channels, "map": n, "times faster": times, "errors": errors}
        yield {**row, "seconds": seconds}
    blocks = jax.lax.complex(*jax.random.normal(jax.random.key(0), (2, n * (n // 2 + 1), channels, channels)))
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    seconds = interleaved({"product": lambda: product(blocks, blocks)}, repeats)
    rate = 8 * blocks.shape[0] * channels**3 / seconds["product"]
    yield {"claim": "product", "channels": channels, "map": n, "flops per second": rate, "seconds": seconds}


def run(options):
    """All rows."""
    began, rows = time.perf_counter(), []
    left = lambda: LIMIT_SECONDS - (time.perf_counter() - began)
    repeats = min(options.repeats, 5)
    for channels, n in [(8, 8)] if options.quick else SIZES:
        if left() < 60:
            print(f"no time left for {channels}@{n}")
            continue
        for row in measure(channels, n, repeats):
            rows.append(row)
            show(row)
    for case in training.QUICK if options.quick else NETWORKS:
        if left() < 90:
            print(f"no time left for {case[0]}")
            continue
        rows.append(training.measure(*case, repeats))
    return rows
