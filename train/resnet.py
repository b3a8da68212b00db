"""The ResNet v2 of TensorFlow's official CIFAR-10 model (spring 2018), which the paper trained; and its convolutions.

6n + 2 layers, three stages of n blocks, widths 16, 32, 64. Depth 32 has 466,970 parameters.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import opnorm_jax as oj

CONV_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
HEAD_INIT = nn.initializers.glorot_uniform()  # TensorFlow's default; Flax's is another
EXPLICIT = ((1, 1), (1, 1))


class Block(nn.Module):
    """BN-ReLU, 3x3 (strided), BN-ReLU, 3x3, plus the shortcut; no ReLU after the sum."""

    width: int
    stride: int
    projects: bool
    norm: Callable[..., Any]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        activated = nn.relu(self.norm()(x))
        shortcut = x
        if self.projects:  # fed by the activation, not by the raw input
            shortcut = conv(self.width, 1, self.stride, self.dtype, "projection")(activated)
        y = conv(self.width, 3, self.stride, self.dtype, "conv1")(activated)
        y = conv(self.width, 3, 1, self.dtype, "conv2")(nn.relu(self.norm()(y)))
        return y + shortcut


class ResNet(nn.Module):
    """Images (N, H, W, C) to logits (N, classes), float32 whatever ``dtype`` it computes in; so are its parameters."""

    depth: int
    width: int = 16
    classes: int = 10
    batch_norm: bool = True
    batch_norm_momentum: float = 0.997
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def norm():
            if not self.batch_norm:
                return lambda y: y
            options = {"momentum": self.batch_norm_momentum, "epsilon": 1e-5, "dtype": self.dtype}
            return nn.BatchNorm(use_running_average=not train, **options)  # its statistics are taken in float32

        x = conv(self.width, 3, 1, self.dtype, "stem")(x)
        for stage, block, width, stride in blocks(self.depth, self.width):
            x = Block(width, stride, block == 0, norm, self.dtype, name=f"stage{stage}_block{block}")(x)
        x = nn.relu(norm()(x)).astype(jnp.float32).mean(axis=(1, 2))
        return nn.Dense(self.classes, kernel_init=HEAD_INIT, name="head")(x)


def conv(width: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """SAME at stride 1; at stride 2 pads (1, 1) explicitly, as TensorFlow's model does (Flax's SAME pads (0, 1))."""
    padding = "SAME" if stride == 1 else EXPLICIT if size == 3 else "VALID"
    options = {"use_bias": False, "kernel_init": CONV_INIT, "dtype": dtype, "name": name}
    return nn.Conv(width, (size, size), stride, padding=padding, **options)


def blocks(depth: int, width: int) -> list[tuple[int, int, int, int]]:
    """(stage, block, width, stride) of each residual block."""
    per_stage, rest = divmod(depth - 2, 6)
    if rest or per_stage < 1:
        raise ValueError(f"expected depth to be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, ...), got {depth}.")
    return [(s, b, width * 2**s, 2 if s > 0 and b == 0 else 1) for s in range(3) for b in range(per_stage)]


def convolutions(model: ResNet, variables: Any, image: tuple[int, ...], norm_of: str) -> Any:
    """A tree shaped like the parameters with the ``Conv`` of each kernel, None elsewhere; ``image`` is (H, W, C).

    ``norm_of="layer"``: strides and padding as they are, so that bounds hold for the layers really used.
    ``norm_of="circular"``: the paper's convention, a circular convolution at the layer's input size, stride ignored.
    """

    def apply(params, variables, x):
        return model.apply({**variables, "params": params}, x, train=False)

    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    convs = oj.find_convs(apply, variables["params"], variables, x)
    return (
        convs if norm_of == "layer" else jax.tree.map(lambda conv: oj.Conv(conv.input_shape, padding="CIRCULAR"), convs)
    )


def count_parameters(params: Any) -> int:
    """Total number of trainable numbers."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
