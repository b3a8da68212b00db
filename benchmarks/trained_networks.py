"""The paper's section 4.4: spectra of trained networks' convolutions, with their padding and strides.

    python -m benchmarks trained_networks --weights FOLDER

FOLDER holds trained networks, which are no part of the repository: folders that train/cifar.py left, and ``.npz`` files
of PyTorch's OIHW kernels under the names of a CIFAR-10 ResNet (layer2.0.conv1.weight, ...: stages two and three begin
with a stride of 2) or of any plain stack of stride-1 layers, with PyTorch's padding of (taps - 1) / 2 and images of
32x32 pixels. 1x1 kernels are left out, as in the paper.

Of each layer: certified bounds on its norm, the converged norm, the share of all singular values that are above a half
and above a hundredth of the largest (of the circulant embedding: a zero-padded layer's own have no formula), and what
one clip at half of the norm leaves of it, over that bound. Seconds are for all of this, with what it compiles.
"""

import dataclasses
import re
import time

import jax
import numpy as np

import opnorm_jax as oj
from benchmarks.measure import show
from benchmarks.networks import ResNet
from opnorm_jax._tree.plot import layer_values

import checkpoint  # isort: skip  (of train/, which benchmarks.networks makes importable)
import report  # isort: skip

SIZES = {"digits": 8, "cifar10": 32}  # of the trainer's images


def describe(name, taps, size):
    """The ``Conv`` of a PyTorch layer, from its name."""
    stage, first = 1, False
    if found := re.match(r"layer(\d)\.(\d+)\.conv(\d)", name):
        stage, first = int(found[1]), found[2] == "0" and found[3] == "1" and found[1] != "1"
    n = size // 2 ** (stage - 1) * (2 if first else 1)
    pads = tuple(((k - 1) // 2, (k - 1) // 2) for k in taps)
    return oj.Conv((n, n), strides=2 if first else 1, padding=pads, kernel_layout="OIHW")


def of_pytorch(path):
    """(layer, HWIO kernel, description) of the convolutions in a file."""
    with np.load(path, allow_pickle=False) as weights:
        for name in weights.files:
            if weights[name].ndim == 4 and weights[name].shape[2] > 1:
                kernel = weights[name].astype(np.float32).transpose(2, 3, 1, 0)
                conv = describe(name, kernel.shape[:2], 32)
                yield name.removesuffix(".weight"), kernel, dataclasses.replace(conv, kernel_layout=None)


def load_run(folder):
    """What train/cifar.py left: a name, the model, its variables, and the size of its images."""
    config = report.load_json(folder / "config.json")
    variables, _ = checkpoint.load_weights(folder / "params.safetensors")
    model = ResNet(config["depth"], config["width"], batch_norm=config["batch_norm"])
    arm = config["constraint"] + f" {config['max_norm']:g}" * (config["constraint"] != "none")
    epochs = f"{config['epochs']} epoch" + "s" * (config["epochs"] != 1)
    return f"ResNet-{config['depth']} of train/, {epochs}, {arm}", model, variables, SIZES[config["dataset"]]


def of_run(model, variables, size):
    """(layer, HWIO kernel, description) of the convolutions of a run."""
    fn = lambda params, x: model.apply({**variables, "params": params}, x, train=False)
    channels = variables["params"]["stem"]["kernel"].shape[2]
    convs = oj.find_convs(fn, variables["params"], jax.ShapeDtypeStruct((1, size, size, channels), np.float32))
    for name, kernel, conv in report.layers(variables["params"], convs):
        if kernel.shape[0] > 1:
            yield name, kernel, conv


def networks(folder):
    """(name, layers) of each network of a folder."""
    for path in sorted(folder.glob("*/params.safetensors")):
        name, *trained = load_run(path.parent)
        yield name, of_run(*trained)
    for path in sorted(folder.glob("*.npz")):
        yield path.stem, of_pytorch(path)


def figures(kernel, conv):
    """Certified bounds, the converged norm, and bounds on what one clip leaves, over its bound."""
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    bound = upper / 2
    left = oj.operator_norm_bounds(oj.clip_operator_norm(kernel, conv, bound), conv)
    return lower, oj.operator_norm(kernel, conv), upper, left.lower / bound, left.upper / bound


def run(options):
    """All rows."""
    if options.weights is None:
        raise SystemExit("trained_networks needs --weights FOLDER, a folder of trained networks.")
    rows, compute = [], jax.jit(figures, static_argnums=1)
    for network, layers in networks(options.weights):
        for name, kernel, conv in list(layers)[: 2 if options.quick else None]:
            began = time.perf_counter()
            lower, norm, upper, left_lower, left_upper = map(float, compute(kernel, conv))
            values = layer_values(kernel, conv)
            row = {"network": network, "layer": name, "taps": kernel.shape[0], "map": conv.input_shape[0]}
            row |= {"stride": conv.strides[0], "channels": kernel.shape[2:]}
            row |= {"norm": norm, "lower": lower, "upper": upper, "after a clip": [left_lower, left_upper]}
            row |= {f"above {share}": float((values > share * values[0]).mean()) for share in (0.5, 0.01)}
            rows.append(row | {"seconds": {"all": time.perf_counter() - began}})
            show(rows[-1])
    return rows
