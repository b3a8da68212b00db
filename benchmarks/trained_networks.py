"""Norms of a trained network's convolutions: certified bounds, the converged value, and what one clip leaves.

    python benchmarks/trained_networks.py WEIGHTS.npz [--size 32]

WEIGHTS.npz holds PyTorch's OIHW kernels under the names of a CIFAR-10 ResNet (layer2.0.conv1.weight, ...: stages two
and three begin with a stride of 2), or of any plain stack of stride-1 layers. All are taken with PyTorch's padding of
(taps - 1) / 2. The last two columns clip once at half of the layer's certified norm: what remains, over that bound.
"""

import argparse
import re
import time

import jax
import numpy as np

import opnorm_jax as oj


def describe(name, taps, size):
    """The ``Conv`` of a layer, from its name."""
    stage, first = 1, False
    if found := re.match(r"layer(\d)\.(\d+)\.conv(\d)", name):
        stage, first = int(found[1]), found[2] == "0" and found[3] == "1" and found[1] != "1"
    n = size // 2 ** (stage - 1) * (2 if first else 1)
    pads = tuple(((k - 1) // 2, (k - 1) // 2) for k in taps)
    return oj.Conv((n, n), strides=2 if first else 1, padding=pads, kernel_layout="OIHW")


def figures(kernel, conv):
    """lower, converged, upper, the circular norm at the layer's own size, one clip's remainder over its bound."""
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    own = oj.operator_norm(
        kernel, oj.Conv(conv.input_shape, strides=conv.strides, kernel_layout="OIHW", padding="CIRCULAR")
    )
    bound = upper / 2
    left = oj.operator_norm_bounds(oj.clip_operator_norm(kernel, conv, bound), conv)
    return lower, oj.operator_norm(kernel, conv), upper, own, left.lower / bound, left.upper / bound


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("--size", type=int, default=32, help="height and width of the network's input")
    options = parser.parse_args()
    compute = jax.jit(figures, static_argnums=1)
    began, slack, left = time.perf_counter(), [], []
    print(f"{'layer':24} {'stride':>6} {'lower':>9} {'norm':>9} {'upper':>9} {'own circle':>10} {'after one clip':>16}")
    with np.load(options.weights, allow_pickle=False) as weights:
        for name in weights.files:
            if weights[name].ndim != 4:
                continue
            kernel = weights[name].astype(np.float32)
            conv = describe(name, kernel.shape[2:], options.size)
            lower, norm, upper, own, left_lower, left_upper = map(float, compute(kernel, conv))
            slack.append(upper / norm - 1)
            left.append(left_lower)
            print(
                f"{name.removesuffix('.weight'):24} {conv.strides[0]:>6} {lower:9.4f} {norm:9.4f} {upper:9.4f} "
                f"{own:10.4f} {left_lower:8.3f}-{left_upper:.3f}",
                flush=True,
            )
    seconds = time.perf_counter() - began
    print(
        f"{len(slack)} layers in {seconds:.0f} s; upper over norm: median {100 * np.median(slack):.2f} %, "
        f"most {100 * max(slack):.2f} %; one clip leaves {min(left):.2f} to {max(left):.2f} times its bound"
    )


if __name__ == "__main__":
    main()
