"""All that is claimed of accelerators, in one run of under 9 minutes.

    python -m benchmarks gpu [--quick]

spectrum, norm, clip, inside (clip of a kernel with half the norm) against the plain two-liner in jitted jax.numpy on
the same device, 3x3 kernels; every answer compared with NumPy's in float64 first. training: what ``every=1`` and
``every=100`` add to a step of ResNet-18 and ResNet-32. Rows are printed as they come; what no time is left for is
named.
On a CPU it runs too, which shows that it works and nothing else.
"""

import functools
import time

import jax
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
    errors = {
        "values, of the largest": float(np.abs(found - truth).max() / norm),
        "norm": abs(float(oj.operator_norm(k, size)) / norm - 1),
        "clip": float(
            np.abs(oj.clip_operator_norm(k, size, norm / 2) - rivals.paper_clip(kernel, size, norm / 2)).max()
        ),
    }
    jit = lambda function, **options: functools.partial(jax.jit(functools.partial(function, conv=size, **options)), k)
    cases = {
        "spectrum": {"jax.numpy": lambda: rivals.plain_spectrum(k, size), "ours": lambda: spectrum(k)},
        "norm": {"jax.numpy": lambda: rivals.plain_spectrum(k, size), "ours": jit(oj.operator_norm)},
        "clip": {
            "jax.numpy": lambda: rivals.plain_clip(k, size, norm / 2),
            "ours": jit(oj.clip_operator_norm, max_norm=norm / 2),
        },
        "inside": {
            "jax.numpy": lambda: rivals.plain_clip(k, size, 2 * norm),
            "ours": jit(oj.clip_operator_norm, max_norm=2 * norm),
            "ours, rescale": jit(oj.rescale_operator_norm, max_norm=2 * norm),
        },
    }
    for claim, functions in cases.items():
        seconds = interleaved(functions, repeats)
        times = seconds["jax.numpy"] / seconds["ours"]
        row = {"claim": claim, "channels": channels, "map": n, "times faster": times, "errors": errors}
        yield {**row, "seconds": seconds}


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
