"""Bounds on published, trained networks: the product, the semidefinite bound, and the largest Jacobian that was seen.

    python -m benchmarks real_networks --weights FOLDER [--sizes 32 ...] [--inputs IMAGES.npy] [--quick]

FOLDER holds ``.npz`` files of PyTorch state dicts, one array a key; they are no part of the repository. Two kinds are
recognised by their keys: CIFAR ResNets with option-A shortcuts (``layer1.0.conv1.weight``, ``linear.weight``) and DnCNN
without batch normalisation (``model.0.weight``), as the noise that it predicts. Each network is measured in a process
of its own, at each size of images. ``seen`` is the largest norm of a Jacobian by power iteration at 8 random inputs, or
at the first 8 of IMAGES (n, height, width, channels) where they fit. Seconds are wall time of one call, with what it
compiles; the product comes first. GiB are the process' peak after both bounds, before that of the Jacobians.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import show

import jax  # isort: skip  (after benchmarks.measure, which sets what is read when the libraries load)
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks.scaling import gib

ROOT = Path(__file__).parent.parent


def conv(x, kernel, stride=1):
    pads = [((taps - 1) // 2,) * 2 for taps in kernel.shape[2:]]
    numbers = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=numbers)


def batch_norm(params, name, x):
    gain, bias, mean, variance = (params[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var"))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * gain + bias


def resnet(params, x):
    """A CIFAR ResNet whose shortcuts are strided slices with channels of zeros around."""
    found = (re.match(r"layer(\d+)\.(\d+)\.conv1", key) for key in params)
    blocks = [f"layer{stage}.{n}" for stage, n in sorted(tuple(map(int, match.groups())) for match in found if match)]
    x = jax.nn.relu(batch_norm(params, "bn1", conv(x, params["conv1.weight"])))
    for name in blocks:
        stride = 2 if name.endswith(".0") and name != "layer1.0" else 1
        y = jax.nn.relu(batch_norm(params, f"{name}.bn1", conv(x, params[f"{name}.conv1.weight"], stride)))
        y = batch_norm(params, f"{name}.bn2", conv(y, params[f"{name}.conv2.weight"]))
        missing = (y.shape[-1] - x.shape[-1]) // 2
        x = jax.nn.relu(y + jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing, missing))))
    return jnp.mean(x, (1, 2)) @ params["linear.weight"].T + params["linear.bias"]


def dncnn(params, x):
    """Convolutions with ReLU between them."""
    names = sorted((key for key in params if key.endswith(".weight")), key=lambda key: int(key.split(".")[1]))
    for n, name in enumerate(names):
        x = conv(jax.nn.relu(x) if n else x, params[name]) + params[name.replace("weight", "bias")]
    return x


def load(path):
    """The network of a file: a function, its parameters, and the channels of its input."""
    with np.load(path, allow_pickle=False) as arrays:
        params = {name: arrays[name] for name in arrays.files}
    if {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "linear.weight"} <= params.keys():
        return resnet, params, params["conv1.weight"].shape[1]
    if {"model.0.weight", "model.0.bias"} <= params.keys() and not any("running" in key for key in params):
        return dncnn, params, params["model.0.weight"].shape[1]
    raise SystemExit(f"{path} is no network that is known here; its first keys are {list(params)[:3]}.")


def seen(fn, params, points):
    """The largest norm of the Jacobian at the points, by 100 steps of power iteration each."""

    @jax.jit
    def at(point, key):
        vector = jax.random.normal(key, point.shape, point.dtype)
        out, forward = jax.linearize(lambda x: fn(params, x), point)
        backward = jax.linear_transpose(forward, point)
        unit = lambda v: v / jnp.linalg.norm(v.ravel())
        vector = jax.lax.fori_loop(0, 100, lambda _, v: unit(backward(forward(v))[0]), unit(vector))
        return jnp.linalg.norm(forward(vector).ravel())

    keys = jax.random.split(jax.random.key(1), len(points))
    return max(float(at(point[None], key)) for point, key in zip(points, keys))


def measure(path, size, inputs):
    """The child: one row."""
    fn, params, channels = load(path)
    row = {"network": path.stem, "size": size, "inputs": "random"}
    for method in ("product", "sdp"):
        began = time.perf_counter()
        x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        row[method] = float(oj.lipschitz_bound(fn, params, x, method=method))
        row[f"{method}_seconds"] = time.perf_counter() - began
    row["GiB at most"] = gib()
    points = jax.random.normal(jax.random.key(0), (8, size, size, channels))
    if inputs and (given := np.load(inputs, mmap_mode="r")).shape[1:] == points.shape[1:]:
        row["inputs"], points = inputs.name, jnp.asarray(given[:8], jnp.float32)
    row["seen"] = seen(fn, params, points)
    return row


def run(options):
    """All rows."""
    if options.weights is None or not (paths := sorted(options.weights.glob("*.npz"))):
        raise SystemExit("real_networks needs --weights FOLDER, a folder of .npz files of published networks.")
    rows = []
    for path in paths[:1] if options.quick else paths:
        for size in (8,) if options.quick else options.sizes:
            command = [sys.executable, "-m", "benchmarks.real_networks", str(path.resolve()), str(size)]
            command += ["--inputs", str(options.inputs.resolve())] if options.inputs else []
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{path} at {size} pixels failed; its own message is above.")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            show(rows[-1])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("--inputs", type=Path)
    options = parser.parse_args()
    print(json.dumps(measure(options.path, options.size, options.inputs)))
