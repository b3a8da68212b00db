"""How time and memory grow: with the map, the channels, the layers of a network and the devices.

    python -m benchmarks scaling [--quick]

map        64 channels: the spectrum grows with the number of pixels; norms less so, the bound for every size not at all
channels   16x16 maps
layers     1 to 16 layers alike under one optax transformation: one batched call, so compilation does not grow
methods    16x16 maps: the norm, and a clip at half of it, by each factorization
devices    256 channels on 16x16 maps, ``Execution(mesh=...)`` of 1, 2, ... devices: of cores on a CPU
memory     512 channels, all values reduced to the norm and a histogram inside one ``jit``: the peak of a new process
"""

import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks.measure import compile_seconds, interleaved, show

ROOT = Path(__file__).parent.parent


def normal(channels):
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, channels, channels)), jnp.float32)


def times(channels, n, repeats):
    kernel = normal(channels)
    functions = {"spectrum": functools.partial(oj.singular_values, conv=(n, n))}
    functions["norm"] = functools.partial(oj.operator_norm, conv=(n, n))
    same = oj.Conv((n, n), padding="SAME")
    functions["upper bound, zero padding"] = lambda kernel: oj.operator_norm_bounds(kernel, same).upper
    functions["bound for every size"] = oj.operator_norm_upper_bound
    return interleaved({name: functools.partial(jax.jit(f), kernel) for name, f in functions.items()}, repeats)


def layers(count, repeats):
    """The constraint on so many layers alike."""
    params = {f"layer{n}": normal(32) * (1 + n) for n in range(count)}
    tx = oj.constrain_operator_norm(1.0, {name: oj.Conv((16, 16), padding="SAME") for name in params})
    update, arguments = jax.jit(tx.update), (jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    seconds = interleaved({"constraint": lambda: update(*arguments)}, repeats)
    return {"seconds": seconds, "compile_seconds": {"constraint": compile_seconds(update, *arguments)}}


def devices(count, channels, repeats):
    mesh = jax.make_mesh((count,), ("f",), devices=jax.devices()[:count], axis_types=(jax.sharding.AxisType.Auto,))
    spectrum = jax.jit(functools.partial(oj.singular_values, conv=(16, 16), execution=oj.Execution(mesh=mesh)))
    kernel = normal(channels)
    return interleaved({"spectrum": lambda: spectrum(kernel)}, repeats)


def methods(channels, repeats):
    kernel, size = normal(channels), (16, 16)
    bound = oj.operator_norm(kernel, size) / 2
    functions = {}
    for name in ("decompose", "products"):
        execution = oj.Execution(factorization=name)
        functions[f"norm, {name}"] = jax.jit(functools.partial(oj.operator_norm, conv=size, execution=execution))
        clip = functools.partial(oj.clip_operator_norm, conv=size, max_norm=bound, execution=execution)
        functions[f"clip, {name}"] = jax.jit(clip)
    return interleaved({name: functools.partial(function, kernel) for name, function in functions.items()}, repeats)


def peak_memory(channels, n):
    """In a new process, as peaks do not go down."""
    command = [sys.executable, "-m", "benchmarks.scaling", str(channels), str(n)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=dict(os.environ))
    return json.loads(out.stdout.splitlines()[-1])


def gib():
    """The peak so far. Linux's own count, as getrusage's begins with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "linux" else 30)


def reduced_spectrum(channels, n):
    """The child: its peak before and after."""
    kernel = jax.block_until_ready(normal(channels))

    @jax.jit
    def reduce(kernel):
        values = oj.singular_values(kernel, (n, n))
        return jnp.max(values), jnp.histogram(values, bins=64)[0]

    before = gib()
    jax.block_until_ready(reduce(kernel))
    print(json.dumps({"GiB before": before, "GiB at most": gib(), "GiB of all blocks": channels**2 * n**2 * 8 / 2**30}))


def run(options):
    """All rows."""
    repeats, quick = min(options.repeats, 3), options.quick
    rows = []

    def add(row):
        rows.append(row)
        show(row)

    for n in (8, 16) if quick else (8, 16, 32, 64, 128, 224):
        add(
            {"claim": "map", "channels": 8 if quick else 64, "map": n, "seconds": times(8 if quick else 64, n, repeats)}
        )
    for channels in (4, 8) if quick else (8, 16, 32, 64, 128, 256):
        add({"claim": "channels", "channels": channels, "map": 16, "seconds": times(channels, 16, repeats)})
    for channels in (8,) if quick else (16, 64, 128):
        add({"claim": "methods", "channels": channels, "map": 16, "seconds": methods(channels, repeats)})
    for count in (1, 2) if quick else (1, 2, 4, 8, 16):
        add({"claim": "layers", "layers": count, **layers(count, repeats)})
    for count in [2**n for n in range(10) if 2**n <= jax.device_count()]:
        channels = 8 if quick else 256
        add({"claim": "devices", "used": count, "channels": channels, "seconds": devices(count, channels, repeats)})
    for channels, n in ((8, 8),) if quick else ((512, 16), (512, 64)):
        add({"claim": "memory", "channels": channels, "map": n, **peak_memory(channels, n)})
    return rows


if __name__ == "__main__":
    reduced_spectrum(*map(int, sys.argv[1:]))
