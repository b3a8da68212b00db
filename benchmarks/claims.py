"""Each claim about one kernel's speed, measured: 3x3 kernels, rivals in the same process, medians of interleaved runs.

    python -m benchmarks claims [--quick] [--repeats 7]

spectrum   all singular values
norm       the exact norm; against power iteration (100 steps, no bound) and Flax's SpectralNorm (speed only: the norm
           that it takes, of the kernel as a matrix, is not the layer's)
clip       one clip of a kernel whose norm is twice the bound
inside     clip and rescale of a kernel inside the ball (norm half the bound), against clips by the rivals
project    the nearest kernel inside the ball (norm 1.2 times the bound), against as many clips as it takes iterations
any size   the bound for every size (1 % slack), and the exact norm, against the full spectrum in NumPy at 224x224. The
           former's time does not depend on the size: it takes no size

Rivals: the paper's NumPy code, the same two lines in jitted jax.numpy, and in PyTorch if that is installed. Two ways of
ours: on one device, as it comes, and with the frequencies divided among the CPU's cores
(``Execution(mesh=...)``).
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks import renderings
from benchmarks.measure import CORES, geometric_mean, interleaved, show

SIZES = [(16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (512, 7)]  # channels, map
QUICK = [(16, 8)]
OURS = ("ours", f"ours, {CORES} devices")


def ours(function, kernel, size, mesh, **options):
    """One of the library's functions on one device and over the mesh: functions of nothing."""
    jit = lambda mesh: jax.jit(functools.partial(function, conv=size, execution=oj.Execution(mesh=mesh), **options))
    return {name: functools.partial(jit(where), kernel) for name, where in zip(OURS, (None, mesh))}


def measure(channels, n, repeats, mesh):
    """Rows of one size."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
    size, k = (n, n), jnp.asarray(kernel)
    norm = float(oj.operator_norm(k, size))
    rows = []

    def row(claim, functions, repeats=repeats, **more):
        seconds = interleaved(functions, repeats)
        rows.append({"claim": claim, "channels": channels, "map": n, "seconds": seconds, **more})
        show(rows[-1])

    torch = renderings.torch_rivals(kernel, size, norm / 2)
    named = lambda what: {"torch": torch[what]} if torch else {}
    spectra = {
        "NumPy": lambda: renderings.paper_spectrum(kernel, size),
        "jax.numpy": lambda: renderings.plain_spectrum(k, size),
    }
    check_spectra({**spectra, **named("spectrum"), **ours(oj.singular_values, k, size, mesh)}, norm)
    row("spectrum", {**spectra, **named("spectrum"), **ours(oj.singular_values, k, size, mesh)})
    normalise, variables = renderings.flax_spectral_norm(kernel)
    row(
        "norm",
        {
            **spectra,
            "power iteration": lambda: renderings.power_iteration(k, size),
            "Flax SpectralNorm": lambda: normalise(variables),
            **ours(oj.operator_norm, k, size, mesh),
        },
    )
    clips = lambda bound: {
        "NumPy": lambda: renderings.paper_clip(kernel, size, bound),
        "jax.numpy": lambda: renderings.plain_clip(k, size, bound),
    }
    row("clip", {**clips(norm / 2), **named("clip"), **ours(oj.clip_operator_norm, k, size, mesh, max_norm=norm / 2)})
    for name, function in (("clip", oj.clip_operator_norm), ("rescale", oj.rescale_operator_norm)):
        inside = ours(function, k, size, mesh, max_norm=2 * norm)
        row("inside", {**clips(2 * norm), **inside}, function=name)
    if channels <= 64 and n <= 16:
        info = oj.project_operator_norm_info(k, size, norm / 1.2)[1]
        project = ours(oj.project_operator_norm, k, size, mesh, max_norm=norm / 1.2)
        row(
            "project",
            {**clips(norm / 1.2), **project},
            min(repeats, 3),
            iterations=int(info.iterations),
            relative_gap=float(info.gap / info.distance),
        )
    return rows


def check_spectra(functions, norm):
    """Every answer is the paper's, before any is timed."""
    values = {name: np.sort(np.ravel(jax.device_get(function()))) for name, function in functions.items()}
    for name, found in values.items():
        assert np.abs(found - values["NumPy"]).max() < 1e-4 * norm, name


def any_size(repeats, channels=64, n=224):
    """The bound for every size, against the spectrum in NumPy at a large one (once: it takes minutes)."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
    bound = jax.jit(oj.operator_norm_upper_bound)
    exact = jax.jit(functools.partial(oj.operator_norm, conv=(n, n)))
    began = time.perf_counter()
    largest = renderings.paper_spectrum(kernel, (n, n)).max()
    seconds = {"NumPy": time.perf_counter() - began}
    value = float(bound(kernel))
    assert largest <= value <= largest * 1.02
    assert abs(float(exact(kernel)) - largest) < 1e-5 * largest
    k = jnp.asarray(kernel)
    seconds |= interleaved({"ours": lambda: bound(k), "ours, the exact norm": lambda: exact(k)}, repeats)
    row = {"claim": "any size", "channels": channels, "map": n, "seconds": seconds}
    show(row)
    return row


def summary(rows):
    """Times faster than each rival: (claim, ours, rival, geometric mean, least, sizes)."""
    found = []
    for claim, function in dict.fromkeys((row["claim"], row.get("function")) for row in rows):
        chosen = [row["seconds"] for row in rows if (row["claim"], row.get("function")) == (claim, function)]
        for rival in (name for name in chosen[0] if not name.startswith("ours")):
            for name in (name for name in chosen[0] if name.startswith("ours")):
                ratios = [seconds[rival] / seconds[name] for seconds in chosen]
                label = f"{claim}, {function}" if function else claim
                found.append((label, name, rival, geometric_mean(ratios), min(ratios), len(ratios)))
    return found


def run(options):
    """All rows."""
    mesh = jax.make_mesh((CORES,), ("frequency",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = []
    for channels, n in QUICK if options.quick else SIZES:
        rows += measure(channels, n, options.repeats, mesh)
    rows.append(any_size(options.repeats, *((8, 32) if options.quick else (64, 224))))
    print("\ntimes faster: geometric mean (least)")
    for claim, name, rival, mean, least, sizes in summary(rows):
        print(f"  {claim:16} {name:16} than {rival:18} {mean:8.2f} ({least:.2f}) over {sizes}")
    return rows
