"""What constraints of one kernel cost: the nearest projection, and kernels inside the ball that are near its surface.

    python -m benchmarks projection [--quick] [--repeats 7]

cold    a random 3x3 kernel for SAME padding whose norm is twice the bound
drift   its projection, changed by 1 % in Frobenius norm: the way a training step moves a kernel
inside  the random kernel, with a norm of 0.5 to 0.99 of the bound: a clip and a rescaling against the paper's clip in
        NumPy, which does not ask whether there is anything to clip

The first two are given in units of one clip of the same kernel. Each row has the medians of interleaved runs in one
process, on one device, and what does not depend on the machine's load: the iterations (each decomposes the blocks
that are not certified to be inside), the distance, the relative gap, and the floor that rounding puts under it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks.measure import compile_seconds, geometric_mean, interleaved, show
from benchmarks.renderings import paper_clip

SIZES = [(16, 32), (32, 16), (64, 8), (64, 16)]  # channels, map
QUICK = [(16, 8)]
INSIDE = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def measure(channels, n, repeats):
    """Rows of one size."""
    conv = oj.Conv((n, n), padding="SAME")
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, channels, channels)), jnp.float32)
    kernel = 2.01 / oj.operator_norm_bounds(kernel, conv).upper * kernel
    functions = {
        name: jax.jit(functools.partial(function, conv=conv, max_norm=1.0))
        for name, function in (
            ("clip", oj.clip_operator_norm),
            ("rescale", oj.rescale_operator_norm),
            ("project", oj.project_operator_norm),
        )
    }
    compiled = {name: compile_seconds(function, kernel) for name, function in functions.items()}
    for share in INSIDE:
        smaller = share / 2.01 * kernel
        numpy = functools.partial(paper_clip, np.asarray(smaller), (n, n), 1.0)
        ours = {name: functools.partial(f, smaller) for name, f in functions.items()}
        row = {"start": "inside", "channels": channels, "map": n, "norm": share}
        row["seconds"] = interleaved({"NumPy": numpy, **ours}, repeats)
        show(row)
        yield row
    projected = functions["project"](kernel)
    change = jnp.asarray(np.random.default_rng(1).standard_normal(kernel.shape), jnp.float32)
    moved = projected + 0.01 * jnp.linalg.norm(projected) / jnp.linalg.norm(change) * change
    for start, given in (("cold", kernel), ("drift", moved)):
        info = oj.project_operator_norm_info(given, conv, 1.0)[1]
        seconds = interleaved({name: functools.partial(f, given) for name, f in functions.items()}, repeats)
        row = {
            "start": start,
            "channels": channels,
            "map": n,
            "norm": float(info.norm),
            "distance": float(info.distance),
            "relative_gap": float(info.gap / info.distance),
            "relative_floor": float(info.floor / info.distance),
            "iterations": int(info.iterations),
            "clips": seconds["project"] / seconds["clip"],
            "seconds": seconds,
            "compile_seconds": compiled,
        }
        show(row)
        yield row


def inside(rows):
    """Times faster than the paper's clip: (norm, function, geometric mean, least)."""
    for norm in INSIDE:
        chosen = [row["seconds"] for row in rows if row["start"] == "inside" and row["norm"] == norm]
        for name in ("clip", "rescale"):
            ratios = [seconds["NumPy"] / seconds[name] for seconds in chosen]
            yield norm, name, geometric_mean(ratios), min(ratios)


def run(options):
    """All rows."""
    sizes = QUICK if options.quick else SIZES
    rows = [row for channels, n in sizes for row in measure(channels, n, options.repeats)]
    for start in ("cold", "drift"):
        chosen = [row["clips"] for row in rows if row["start"] == start]
        print(f"  {start}: {geometric_mean(chosen):.1f} clips (geometric mean), {max(chosen):.1f} at most")
    for norm, name, mean, least in inside(rows):
        print(f"  inside, norm {norm}: {name} {mean:.1f} times faster than NumPy's clip (at least {least:.1f})")
    return rows
