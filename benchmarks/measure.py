"""What every benchmark shares: timing in turns, the environment, and JSON lines."""

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Read when the libraries load. The matrices are small: more threads wait for each other; see docs/speed.md.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment():
    """Versions and hardware."""
    device = jax.devices()[0]
    found = {
        "device": f"{device.device_kind} ({device.platform})",
        "devices": jax.device_count(),
        "cores": CORES,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "libtpu", "opnorm-jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def interleaved(functions, repeats):
    """Median seconds of each of several functions of nothing, in turns; each is called twice before (compilation).

    Quick ones take more than ``repeats`` turns, for two seconds: where the system puts their threads varies.
    """
    for _ in range(2):
        began = time.perf_counter()
        for function in functions.values():
            jax.block_until_ready(function())
        turn = time.perf_counter() - began
    times = {name: [] for name in functions}
    for _ in range(max(repeats, min(int(2 / turn), 50))):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def compile_seconds(function, *args):
    """Seconds to trace and compile a jitted function."""
    began = time.perf_counter()
    function.lower(*args).compile()
    return time.perf_counter() - began


def geometric_mean(ratios):
    return float(np.exp(np.mean(np.log(ratios))))


def read(folder, name):
    """The rows that :func:`write` left, or none."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(rows, name, folder):
    """``rows`` as JSON lines, each with the environment, unless it was read and has that of its own measurement."""
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    with open(folder / f"{name}.jsonl", "w") as out:
        for row in rows:
            out.write(json.dumps(row if "jaxlib" in row else {**row, **where}) + "\n")


def show(row):
    """One line on the terminal."""
    label = " ".join(str(row[key]) for key in row if key not in ("seconds", "compile_seconds"))
    shown = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in row.get("seconds", {}).items())
    print(f"{label} | ms: {shown}", flush=True)
