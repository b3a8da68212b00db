"""The paper's section 4.1: time for all singular values of a convolution, against its number of channels.

    python -m benchmarks spectrum [--quick]

3x3 kernels on 16x16 maps and 11x11 kernels on 64x64 maps, four ways: the full matrix, the paper's NumPy algorithm
(rendered independently), the same in plain jitted jax.numpy, and opnorm_jax. One process; runs interleaved; medians;
compilation apart; every answer checked against the paper's before it is timed.
"""

import jax
import numpy as np

import opnorm_jax as oj
from benchmarks import renderings
from benchmarks.measure import compile_seconds, geometric_mean, interleaved, show

CASES = [((3, 3), (16, 16), c) for c in (2, 4, 8, 16, 32, 64, 128)] + [
    ((11, 11), (64, 64), c) for c in (1, 2, 4, 8, 16, 32)
]
QUICK = [((3, 3), (16, 16), 4), ((11, 11), (64, 64), 2)]
LARGEST_MATRIX = 2048  # side; beyond it the full matrix takes minutes


ours = jax.jit(oj.singular_values, static_argnums=1)
METHODS = {
    "full matrix": renderings.full_matrix_spectrum,
    "paper, NumPy": renderings.paper_spectrum,
    "plain jax.numpy": renderings.plain_spectrum,
    "opnorm_jax": ours,
}


def measure(taps, size, channels, repeats):
    """Median seconds of each method, and the compilation of the jitted ones."""
    kernel = np.random.default_rng(0).standard_normal((*taps, channels, channels)).astype(np.float32)
    methods = dict(METHODS)
    if size[0] * size[1] * channels > LARGEST_MATRIX:
        del methods["full matrix"]
    reference = np.sort(renderings.paper_spectrum(kernel.astype(np.float64), size).ravel())
    for name, method in methods.items():
        values = np.sort(np.ravel(jax.device_get(method(kernel, size))))
        assert np.abs(values - reference).max() < 1e-4 * reference[-1], name
    jax.clear_caches()
    jitted = {"plain jax.numpy": renderings.plain_spectrum, "opnorm_jax": ours}
    row = {
        "claim": "section 4.1",
        "taps": taps,
        "map": size,
        "channels": channels,
        "compile_seconds": {name: compile_seconds(function, kernel, size) for name, function in jitted.items()},
        "seconds": interleaved({name: lambda f=f: f(kernel, size) for name, f in methods.items()}, repeats),
    }
    show(row)
    return row


def summary(rows):
    """How many times faster than each rival: (rival, the geometric mean, the least)."""
    for rival in (name for name in METHODS if name != "opnorm_jax"):
        ratios = [row["seconds"][rival] / row["seconds"]["opnorm_jax"] for row in rows if rival in row["seconds"]]
        yield rival, geometric_mean(ratios), min(ratios)


def run(options):
    """All rows."""
    rows = [measure(*case, options.repeats) for case in (QUICK if options.quick else CASES)]
    for rival, mean, least in summary(rows):
        print(f"times faster than {rival}: geometric mean {mean:.2f}, least {least:.2f}")
    return rows
