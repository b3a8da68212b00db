"""Against PyTorch's own layers, as float64 matrices of their Jacobians: conventions are theirs, not our reading of them.

Skipped where torch is not installed; ``pip install torch`` (a CPU build is enough) runs it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import torch_jacobian

import opnorm_jax as oj

torch = pytest.importorskip("torch", reason="torch is not installed: an optional rival, see the module's docstring")

CONVS = {1: "Conv1d", 2: "Conv2d", 3: "Conv3d"}
LAYOUTS = {1: "OIW", 2: "OIHW", 3: "OIDHW"}
TRANSPOSED_LAYOUTS = {1: "IOW", 2: "IOHW", 3: "IODHW"}


FORWARD = [  # size, in, out, options of torch, options of Conv
    ((7, 6), 2, 3, {"padding": 1}, {"padding": ((1, 1), (1, 1))}),
    ((7, 6), 3, 2, {"padding": "same"}, {"padding": "SAME"}),
    ((8, 7), 2, 3, {"padding": "valid", "stride": 2}, {"padding": "VALID", "strides": 2}),
    ((8, 8), 2, 4, {"padding": 1, "stride": 2}, {"padding": ((1, 1), (1, 1)), "strides": 2}),
    ((9, 8), 2, 2, {"padding": 2, "dilation": 2}, {"padding": ((2, 2), (2, 2)), "kernel_dilation": 2}),
    ((6, 6), 4, 6, {"padding": 1, "groups": 2}, {"padding": ((1, 1), (1, 1)), "feature_group_count": 2}),
    ((6, 5), 4, 4, {"padding": 1, "groups": 4}, {"padding": ((1, 1), (1, 1)), "feature_group_count": 4}),
    ((6, 5), 2, 3, {"padding": 1, "padding_mode": "circular"}, {}),
    ((6, 8), 2, 3, {"padding": 1, "padding_mode": "circular", "stride": 2}, {"strides": 2}),
    ((7, 7), 2, 2, {"padding": 2, "padding_mode": "circular", "dilation": 2}, {"kernel_dilation": 2}),
    ((11,), 3, 4, {"padding": 1}, {"padding": ((1, 1),)}),
    ((12,), 3, 4, {"padding": 1, "padding_mode": "circular", "stride": 3}, {"strides": 3}),
    ((4, 5, 3), 2, 2, {"padding": 1}, {"padding": ((1, 1),) * 3}),
    ((3, 4, 4), 2, 3, {"padding": 1, "padding_mode": "circular"}, {}),
]


@pytest.mark.parametrize("size, i, o, theirs, options", FORWARD, ids=str)
def test_conv(size, i, o, theirs, options, x64):
    layer = getattr(torch.nn, CONVS[len(size)])(i, o, 3, bias=False, dtype=torch.float64, **theirs)
    kernel = jnp.asarray(layer.weight.detach().numpy())
    check(kernel, oj.Conv(size, kernel_layout=LAYOUTS[len(size)], **options), torch_jacobian(layer, i, size))


TRANSPOSED = [  # size, in, out, kernel, options of torch
    ((4, 5), 3, 2, 3, {"stride": 2}),
    ((4, 4), 2, 3, 4, {"stride": 2, "padding": 1}),
    ((4, 3), 2, 3, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
    ((5, 5), 2, 2, 3, {"stride": 1, "padding": 1, "dilation": 2}),
    ((3, 4), 2, 2, 3, {"stride": 3, "dilation": 2, "padding": 1, "output_padding": 2}),
    ((4, 4), 4, 6, 3, {"stride": 2, "padding": 1, "groups": 2}),
    ((6,), 3, 2, 5, {"stride": 2, "padding": 2}),
    ((3, 3, 2), 2, 2, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
]


@pytest.mark.parametrize("size, i, o, k, theirs", TRANSPOSED, ids=str)
def test_conv_transpose(size, i, o, k, theirs, x64):
    """A convolution of the dilated input with the flipped kernel, padded by d (k - 1) - p."""
    name = CONVS[len(size)].replace("Conv", "ConvTranspose")
    layer = getattr(torch.nn, name)(i, o, k, bias=False, dtype=torch.float64, **theirs)
    rank, groups = len(size), theirs.get("groups", 1)
    dilation = theirs.get("dilation", 1)
    low = dilation * (k - 1) - theirs.get("padding", 0)
    conv = oj.Conv(
        size,
        padding=((low, low + theirs.get("output_padding", 0)),) * rank,
        input_dilation=theirs["stride"],
        kernel_dilation=dilation,
        feature_group_count=groups,
        kernel_layout=TRANSPOSED_LAYOUTS[rank],
    )
    weight = np.flip(layer.weight.detach().numpy(), tuple(range(2, 2 + rank)))
    # PyTorch keeps (groups x I) x O / groups; Conv, as lax, I x (groups x O / groups).
    weight = weight.reshape(groups, i // groups, o // groups, *weight.shape[2:])
    weight = np.moveaxis(weight, 0, 1).reshape(i // groups, o, *weight.shape[3:])
    check(jnp.asarray(weight), conv, torch_jacobian(layer, i, size))


def check(kernel, conv, matrix):
    true = np.linalg.svd(matrix, compute_uv=False)
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= true[0] <= upper
    np.testing.assert_allclose(oj.operator_norm(kernel, conv), true[0], rtol=1e-7)
    if conv.padding == "CIRCULAR":
        values = np.sort(np.ravel(oj.singular_values(kernel, conv)))[::-1]
        np.testing.assert_allclose(values, true[: len(values)], atol=1e-10)


def test_spectral_norm_of_torch_is_not_the_layers():
    """PyTorch's ``spectral_norm`` divides by the norm of the kernel as a matrix: the layer's is something else."""
    layer = torch.nn.utils.parametrizations.spectral_norm(
        torch.nn.Conv2d(4, 8, 3, padding=1, bias=False), n_power_iterations=200
    )
    layer(torch.zeros(1, 4, 6, 6))
    kernel = jnp.asarray(layer.weight.detach().numpy())
    matrix = np.asarray(kernel).reshape(8, -1)
    np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, rtol=1e-4)
    conv = oj.Conv((6, 6), padding=((1, 1), (1, 1)), kernel_layout="OIHW")
    true = np.linalg.norm(torch_jacobian(layer, 4, (6, 6)), 2)
    np.testing.assert_allclose(oj.operator_norm(kernel, conv), true, rtol=1e-4)
    assert abs(true - 1) > 0.05
    assert jax.device_get(oj.operator_norm_bounds(kernel, conv).upper) >= true * (1 - 1e-6)
