"""Each claim about speed on a CPU, measured: 3x3 kernels, rivals in the same process, medians of interleaved runs.

    python benchmarks/claims.py [--quick] [--repeats 7] [--out benchmarks/results]

spectrum   all singular values, against the paper's NumPy code and against the same two lines in jitted jax.numpy
clip       one clip of a kernel whose norm is twice the bound, against the paper's NumPy code
inside     clip and rescale of a kernel inside the ball (norm half the bound), against the paper's NumPy clip
any size   the bound for every size (1 % slack), against the full spectrum in NumPy at 224x224; and its time's
           dependence on the size, which is nil by construction: it takes no size

Two ways are timed: on one device, as it comes, and with the frequencies divided among as many CPU devices as cores
(``jax_num_cpu_devices`` and ``mesh=``). Writes JSON lines with versions and hardware.
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

# Read when the libraries load. The matrices are small: more threads wait for each other; see README.md.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
jax.config.update("jax_num_cpu_devices", CORES)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from spectrum import environment, paper_numpy, plain_jnp  # noqa: E402

import opnorm_jax as oj  # noqa: E402

SIZES = [(16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (512, 7)]  # channels, map
QUICK = [(16, 8), (32, 4)]


def paper_clip(kernel, size, bound):
    """The paper's code for a clip, in NumPy."""
    blocks = np.fft.fft2(kernel, size, axes=[0, 1])
    u, s, v = np.linalg.svd(blocks, full_matrices=False)
    clipped = np.matmul(u * np.minimum(s, bound)[..., None, :], v)
    return np.fft.ifft2(clipped, axes=[0, 1]).real[: kernel.shape[0], : kernel.shape[1]]


def interleaved(functions, repeats):
    """Median seconds of each of several functions of nothing, called once before, in turns."""
    for function in functions.values():
        jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def measure(channels, n, repeats, mesh):
    """Rows of one size."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
    size, on_device = (n, n), jnp.asarray(kernel)
    norm = float(oj.operator_norm(on_device, size))
    jitted = {}
    for suffix, where in (("", None), (f", {CORES} devices", mesh)):
        jitted["spectrum" + suffix] = jax.jit(functools.partial(oj.singular_values, conv=size, mesh=where))
        for name, function in (("clip", oj.clip_operator_norm), ("rescale", oj.rescale_operator_norm)):
            jitted[name + suffix] = jax.jit(functools.partial(function, conv=size, mesh=where))
    ours = lambda what, **options: {
        k: functools.partial(f, on_device, **options) for k, f in jitted.items() if what in k
    }
    rivals = {
        "paper, NumPy": lambda: paper_numpy(kernel, size),
        "plain jax.numpy": lambda: plain_jnp(on_device, size),
    }
    spectra = interleaved({**rivals, **ours("spectrum")}, repeats)
    rows = [("spectrum", spectra)]
    clips = {"paper, NumPy": lambda: paper_clip(kernel, size, norm / 2)}
    rows.append(("clip", interleaved({**clips, **ours("clip", max_norm=norm / 2)}, repeats)))
    clips = {"paper, NumPy": lambda: paper_clip(kernel, size, 2 * norm)}
    inside = {**clips, **ours("clip", max_norm=2 * norm), **ours("rescale", max_norm=2 * norm)}
    rows.append(("inside", interleaved(inside, repeats)))
    return [{"claim": claim, "channels": channels, "map": n, "seconds": seconds} for claim, seconds in rows]


def any_size(repeats, channels=64, n=224):
    """The bound for every size, against the spectrum in NumPy at a large one (once: it takes minutes)."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
    bound = jax.jit(oj.operator_norm_upper_bound)
    began = time.perf_counter()
    largest = paper_numpy(kernel, (n, n)).max()
    seconds = {"paper, NumPy": time.perf_counter() - began}
    value = float(bound(kernel))
    assert largest <= value <= largest * 1.02
    seconds |= interleaved({"operator_norm_upper_bound": lambda: bound(jnp.asarray(kernel))}, repeats)
    return {"claim": "any size", "channels": channels, "map": n, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    mesh = jax.make_mesh((CORES,), ("frequency",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = []
    for channels, n in QUICK if options.quick else SIZES:
        rows += measure(channels, n, options.repeats, mesh)
        for row in rows[-3:]:
            shown = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in row["seconds"].items())
            print(f"{row['claim']:9} {channels:4}@{n:<4} ms: {shown}", flush=True)
    rows.append(any_size(options.repeats, *((8, 32) if options.quick else (64, 224))))
    print(f"{rows[-1]['claim']:9} ms: " + ", ".join(f"{k} {1e3 * v:.2f}" for k, v in rows[-1]["seconds"].items()))
    print("\ntimes faster: geometric mean (least)")
    for claim in ("spectrum", "clip", "inside", "any size"):
        chosen = [row["seconds"] for row in rows if row["claim"] == claim]
        for rival in ("paper, NumPy", "plain jax.numpy"):
            for name in (name for name in chosen[0] if name not in ("paper, NumPy", "plain jax.numpy")):
                if rival in chosen[0]:
                    ratios = [seconds[rival] / seconds[name] for seconds in chosen]
                    mean = np.exp(np.mean(np.log(ratios)))
                    print(f"  {claim:9} {name:26} than {rival:16} {mean:8.2f} ({min(ratios):.2f})")
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "claims.jsonl", "w") as out:
        for row in rows:
            out.write(json.dumps({**row, "cpu_devices": CORES, **environment()}) + "\n")


if __name__ == "__main__":
    main()
