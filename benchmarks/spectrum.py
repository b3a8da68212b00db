"""The paper's section 4.1: time for all singular values of a convolution, against its number of channels.

    python benchmarks/spectrum.py [--quick] [--out benchmarks/results]

3x3 kernels on 16x16 maps and 11x11 kernels on 64x64 maps, four ways: the full matrix, the paper's NumPy algorithm
(rendered independently), the same in plain jitted jax.numpy, and opnorm_jax. One process; runs interleaved; medians;
compilation apart; every answer checked against the paper's before it is timed. Writes JSON lines and a PNG.
"""

import argparse
import functools
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj

CASES = [((3, 3), (16, 16), c) for c in (2, 4, 8, 16, 32, 64, 128)] + [
    ((11, 11), (64, 64), c) for c in (1, 2, 4, 8, 16, 32)
]
QUICK = [((3, 3), (16, 16), 4), ((11, 11), (64, 64), 2)]
LARGEST_MATRIX = 2048  # side; beyond it the full matrix takes minutes


def paper_numpy(kernel, size):
    """The paper's code: FFT at the map's size, then one SVD per frequency."""
    return np.linalg.svd(np.fft.fft2(kernel, size, axes=[0, 1]), compute_uv=False)


@functools.partial(jax.jit, static_argnums=1)
def plain_jnp(kernel, size):
    """The same two lines in jax.numpy."""
    return jnp.linalg.svd(jnp.fft.fft2(kernel, size, axes=[0, 1]), compute_uv=False)


def full_matrix(kernel, size):
    """SVD of the convolution's matrix, assembled by shifting each tap's identity round the torus."""
    (h, w), (i, o) = size, kernel.shape[2:]
    matrix = np.zeros((h, w, o, h, w, i), kernel.dtype)
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    for a in range(kernel.shape[0]):
        for b in range(kernel.shape[1]):
            matrix[y, x, :, (y + a) % h, (x + b) % w, :] += kernel[a, b].T
    return np.linalg.svd(matrix.reshape(h * w * o, h * w * i), compute_uv=False)


ours = jax.jit(oj.singular_values, static_argnums=1)
METHODS = {"full matrix": full_matrix, "paper, NumPy": paper_numpy, "plain jax.numpy": plain_jnp, "opnorm_jax": ours}


def environment():
    """Versions and hardware."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "numpy", "opnorm-jax")},
    }


def measure(taps, size, channels, repeats):
    """Median seconds of each method, and the compilation of ours."""
    kernel = np.random.default_rng(0).standard_normal((*taps, channels, channels)).astype(np.float32)
    methods = dict(METHODS)
    if size[0] * size[1] * channels > LARGEST_MATRIX:
        del methods["full matrix"]
    reference = np.sort(paper_numpy(kernel.astype(np.float64), size).ravel())
    compile_seconds = {}
    for name, method in methods.items():
        began = time.perf_counter()
        values = np.sort(np.ravel(jax.block_until_ready(method(kernel, size))))
        compile_seconds[name] = time.perf_counter() - began
        assert np.abs(values - reference).max() < 1e-4 * reference[-1], name
    times = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            if name == "full matrix" and len(times[name]) >= 3:
                continue
            began = time.perf_counter()
            jax.block_until_ready(method(kernel, size))
            times[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    return {
        "taps": taps,
        "map": size,
        "channels": channels,
        "repeats": repeats,
        "seconds": medians,
        "first_call_seconds": {name: compile_seconds[name] for name in ("plain jax.numpy", "opnorm_jax")},
        "times_faster_than": {
            name: seconds / medians["opnorm_jax"] for name, seconds in medians.items() if name != "opnorm_jax"
        },
    }


def plot(rows, path):
    """Seconds against channels, one panel per kernel size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(tuple(row["taps"]), tuple(row["map"])) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (taps, size) in zip(axes[0], panels):
        for color, name in enumerate(METHODS):
            points = [
                (row["channels"], row["seconds"][name])
                for row in rows
                if (tuple(row["taps"]), tuple(row["map"])) == (taps, size) and name in row["seconds"]
            ]
            if points:
                axis.loglog(*zip(*points), marker="o", label=name, color=f"C{color}")
        axis.set(title=f"{taps[0]}x{taps[1]} kernels, {size[0]}x{size[1]} maps", xlabel="channels", ylabel="seconds")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small cases, to see that it runs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, where = [], environment()
    print(f"{'taps':>6} {'map':>6} {'channels':>8} | milliseconds")
    for taps, size, channels in QUICK if options.quick else CASES:
        row = measure(taps, size, channels, options.repeats)
        rows.append(row)
        shown = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in row["seconds"].items())
        print(f"{taps[0]:>6} {size[0]:>6} {channels:>8} | {shown}", flush=True)
    for rival in ("full matrix", "paper, NumPy", "plain jax.numpy"):
        ratios = [row["times_faster_than"][rival] for row in rows if rival in row["times_faster_than"]]
        print(
            f"times faster than {rival}: geometric mean {np.exp(np.mean(np.log(ratios))):.2f}, least {min(ratios):.2f}"
        )
    with open(options.out / "spectrum.jsonl", "w") as out:
        for row in rows:
            out.write(json.dumps({**row, **where}) + "\n")
    plot(rows, options.out / "spectrum.png")


if __name__ == "__main__":
    main()
