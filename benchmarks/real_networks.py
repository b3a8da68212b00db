"""Bounds on networks of real sizes: the product, the semidefinite bound, and the largest Jacobian that was seen.

    python -m benchmarks real_networks [--weights FOLDER] [--sizes 32 ...] [--inputs IMAGES.npy] [--quick]

Without FOLDER: ResNet-18 for ImageNet on 224x224 pixels, with random weights. FOLDER holds trained networks, which are
no part of the repository:

*.npz        PyTorch state dicts, one array a key. Two kinds are recognised by their keys: ResNets of two convolutions a
             block (``layer1.0.conv1.weight``), for CIFAR or as torchvision has them, and DnCNN without batch
             normalisation (``model.0.weight``), as the noise that it predicts
RUN          folders that train/cifar.py left, with config.json and params.safetensors

Each network is measured in a process of its own, at each of the sizes; a run at that of its own images. ``seen`` is the
largest norm of a Jacobian by power iteration at 8 random inputs, or at the first 8 of IMAGES (n, height, width,
channels) where they fit. Seconds are wall time of one call, with what it compiles; the product comes first. GiB are the
process' peak after both bounds, before that of the Jacobians. Rows that are there already are not measured again.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import read, show, write

import jax  # isort: skip  (after benchmarks.measure, which sets what is read when the libraries load)
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks.networks import largest_jacobian
from benchmarks.scaling import gib
from benchmarks.trained_networks import load_run

ROOT = Path(__file__).parent.parent
RANDOM = "ResNet-18, random weights"


def conv(x, kernel, stride=1):
    pads = [((taps - 1) // 2,) * 2 for taps in kernel.shape[2:]]
    numbers = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=numbers)


def batch_norm(params, name, x):
    gain, bias, mean, variance = (params[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var"))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * gain + bias


def resnet(params, x):
    """A ResNet, whose shortcuts are 1x1 convolutions, or else strided slices with channels of zeros around."""
    found = (re.match(r"layer(\d+)\.(\d+)\.conv1", key) for key in params)
    blocks = [f"layer{stage}.{n}" for stage, n in sorted(tuple(map(int, match.groups())) for match in found if match)]
    large = params["conv1.weight"].shape[2] == 7  # for ImageNet
    x = jax.nn.relu(batch_norm(params, "bn1", conv(x, params["conv1.weight"], 2 if large else 1)))
    if large:
        pads = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    head = "fc" if "fc.weight" in params else "linear"
    for name in blocks:
        stride = 2 if name.endswith(".0") and name != "layer1.0" else 1
        y = jax.nn.relu(batch_norm(params, f"{name}.bn1", conv(x, params[f"{name}.conv1.weight"], stride)))
        y = batch_norm(params, f"{name}.bn2", conv(y, params[f"{name}.conv2.weight"]))
        if (projection := params.get(f"{name}.downsample.0.weight")) is not None:
            x = batch_norm(params, f"{name}.downsample.1", conv(x, projection, stride))
        else:
            missing = (y.shape[-1] - x.shape[-1]) // 2
            x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing, missing)))
        x = jax.nn.relu(y + x)
    return jnp.mean(x, (1, 2)) @ params[f"{head}.weight"].T + params[f"{head}.bias"]


def dncnn(params, x):
    """Convolutions with ReLU between them."""
    names = sorted((key for key in params if key.endswith(".weight")), key=lambda key: int(key.split(".")[1]))
    for n, name in enumerate(names):
        x = conv(jax.nn.relu(x) if n else x, params[name]) + params[name.replace("weight", "bias")]
    return x


def random_resnet18():
    """The state dict of torchvision's ResNet-18, with random kernels as it initialises them."""
    rng = np.random.default_rng(0)
    kernel = lambda o, i, taps: (rng.standard_normal((o, i, taps, taps)) * np.sqrt(2 / (o * taps**2))).astype("f4")
    layers = {"conv1": kernel(64, 3, 7)}
    for stage in range(4):
        for block in range(2):
            name, width, before = f"layer{stage + 1}.{block}", 64 * 2**stage, 64 * 2 ** max(stage - (block == 0), 0)
            layers[f"{name}.conv1"], layers[f"{name}.conv2"] = kernel(width, before, 3), kernel(width, width, 3)
            if before < width:
                layers[f"{name}.downsample.0"] = kernel(width, before, 1)
    params = {"fc.weight": rng.uniform(-1, 1, (1000, 512)).astype("f4") / 512**0.5, "fc.bias": np.zeros(1000, "f4")}
    for name, weight in layers.items():
        params[f"{name}.weight"], norm = weight, name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        initial = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
        params |= {f"{norm}.{key}": np.full(len(weight), value, "f4") for key, value in initial.items()}
    return params


def load(path):
    """A network: its name, a function, its parameters, the channels of its input, and their size if it is known."""
    if str(path) == RANDOM:
        return RANDOM, resnet, random_resnet18(), 3, 224
    if path.is_dir():
        name, model, variables, size = load_run(path)
        fn = lambda variables, x: model.apply(variables, x, train=False)
        return name, fn, variables, variables["params"]["stem"]["kernel"].shape[2], size
    with np.load(path, allow_pickle=False) as arrays:
        params = {name: arrays[name] for name in arrays.files}
    heads = {"linear.weight", "fc.weight"}
    if {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight"} <= params.keys() and heads & params.keys():
        return path.stem, resnet, params, params["conv1.weight"].shape[1], None
    if {"model.0.weight", "model.0.bias"} <= params.keys() and not any("running" in key for key in params):
        return path.stem, dncnn, params, params["model.0.weight"].shape[1], None
    raise SystemExit(f"{path} is no network that is known here; its first keys are {list(params)[:3]}.")


def measure(path, size, inputs):
    """The child: one row."""
    name, fn, params, channels, _ = load(path)
    row = {"network": name, "size": size, "inputs": "random"}
    for method in ("product", "sdp"):
        began = time.perf_counter()
        x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        row[method] = float(oj.lipschitz_bound(fn, params, x, method=method))
        row[f"{method}_seconds"] = time.perf_counter() - began
    row["GiB at most"] = gib()
    points = jax.random.normal(jax.random.key(0), (8, size, size, channels))
    if inputs and (given := np.load(inputs, mmap_mode="r")).shape[1:] == points.shape[1:]:
        row["inputs"], points = inputs.name, jnp.asarray(given[:8], jnp.float32)
    row["seen"] = largest_jacobian(fn, params, points, 100)
    return row


def run(options):
    """All rows."""
    paths, quick = [Path(RANDOM)], 32
    if folder := options.weights:
        quick = 8
        paths = sorted([*folder.glob("*.npz"), *(path.parent for path in folder.glob("*/params.safetensors"))])
        if not paths:
            raise SystemExit(f"{folder} holds no .npz files of networks and no folders that train/cifar.py left.")
    rows = [] if options.quick else read(options.out, "real_networks")
    there, cases = {(row["network"], row["size"]) for row in rows}, []
    for path in paths[:1] if options.quick else paths:
        name, *_, own = load(path)
        sizes = [quick] if options.quick else [own] if own else options.sizes
        cases += [(path, size) for size in sizes if (name, size) not in there]
    for path, size in cases:
        command = [sys.executable, "-m", "benchmarks.real_networks", str(path), str(size)]
        command += ["--inputs", str(options.inputs.resolve())] if options.inputs else []
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{path} at {size} pixels failed; its own message is above.")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if not options.quick:
            write(rows, "real_networks", options.out)  # as they come
        show(rows[-1])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("--inputs", type=Path)
    options = parser.parse_args()
    print(json.dumps(measure(options.path, options.size, options.inputs)))
