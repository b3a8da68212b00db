"""How fast the trainer is: ResNet-32 on images of CIFAR-10's size, one network and several at once.

    python -m benchmarks throughput [--quick]

Each row: milliseconds a step and images/s of all networks, the share of the time in which the device was at work, the
kernels it ran for a step and what kinds of them took the time (from a profile of one call), compile time, memory. The
images are random: the speed does not depend on them. A stack of arms is what train/headline.py trains: a third of its
networks without a bound, the others clipped every 100 steps.
"""

import collections
import functools
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.measure import show

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
import cifar  # noqa: E402
import datasets  # noqa: E402
import loop  # noqa: E402
import options  # noqa: E402

CASES = [  # networks, bfloat16, constraint
    (1, True, "none"),
    (9, True, "clip"),
    (1, False, "none"),
    (4, False, "none"),
    (4, True, "none"),
]
QUICK = [(1, False, "none"), (3, True, "clip")]
STEPS = 390


@functools.cache
def random_images(count):
    """Random images and labels in the shape of CIFAR-10."""
    rng = np.random.default_rng(0)
    images = lambda n: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    labels = lambda n: rng.integers(0, 10, n).astype(np.int32)
    return datasets.Dataset(images(count), labels(count), images(count // 5), labels(count // 5))


def measure(networks, bf16, constraint, quick):
    """Trains for some steps and returns one row of the table."""
    data, depth, steps = (random_images(1280), 8, 4) if quick else (random_images(50_000), 32, STEPS)
    config = options.Config(dataset="cifar10", depth=depth, seeds=networks, bf16=bf16, constraint=constraint)
    config = options.resolve(config)
    hyper = None
    if constraint != "none":
        bounds = np.resize([np.inf, 0.5, 1.0], networks)
        hyper = {"learning_rate": np.full(networks, config.learning_rate), "max_norm": np.sort(bounds)[::-1]}
    run, state = cifar.prepare(config, data, hyper)
    length = loop.call_ends(run.per_epoch, jax.default_backend())[0]
    began = time.perf_counter()
    call = run.call.lower(state, *run.train_set, steps=length).compile()
    compiling = time.perf_counter() - began
    memory = call.memory_analysis()
    state, loss, _ = jax.block_until_ready(call(state, *run.train_set))
    calls = max(1, steps // length)
    began = time.perf_counter()
    for _ in range(calls):
        state, loss, _ = call(state, *run.train_set)
    jax.block_until_ready(loss)
    seconds = (time.perf_counter() - began) / (calls * length)
    row = {
        "claim": "throughput",
        "network": f"ResNet-{depth}",
        "networks": networks,
        "computed in": "bfloat16" if bf16 else "float32",
        "constraint": constraint,
        "batch": config.batch_size,
        "images per second": networks * config.batch_size / seconds,
        "minutes for 250 epochs": seconds * 250 * 390 / 60,
        "seconds": {"step": seconds},
        "compile_seconds": {"step": compiling},
    }
    if memory is not None:
        row["GiB of temporaries"] = memory.temp_size_in_bytes / 2**30
    if jax.default_backend() != "cpu":
        row["profile"] = profile(lambda: jax.block_until_ready(call(state, *run.train_set)), length)
    show({key: value for key, value in row.items() if key != "profile"})
    return row


def profile(function, steps):
    """What one call runs on the device, for each step: kernels, milliseconds at work, and those by kind of kernel."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with jax.profiler.trace(folder):
            function()
        elapsed = time.perf_counter() - began
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.name, event.start_ns, event.duration_ns)
            for plane in data.planes
            if plane.name.startswith("/device:")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    by_kind, first, last = collections.Counter(), min(e[1] for e in events), max(e[1] + e[2] for e in events)
    for name, _, duration in events:
        kind = re.sub(r"[._]?\d+$", "", name)
        by_kind[kind if len(kind) < 60 else kind[:60]] += duration
    busy = sum(by_kind.values())
    return {
        "kernels a step": len(events) / steps,
        "ms a step at work": busy / steps / 1e6,
        "ms a step from first to last": (last - first) / steps / 1e6,
        "seconds with profiling": elapsed,
        "ms by kind": {kind: duration / steps / 1e6 for kind, duration in by_kind.most_common(14)},
    }


def run(options):
    """All rows."""
    return [measure(*case, options.quick) for case in (QUICK if options.quick else CASES)]
