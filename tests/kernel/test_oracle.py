"""The oracle itself, against lax, Flax and SciPy."""

import jax
import numpy as np
import pytest
from geometries import generate
from jax import lax
from oracle import dense_matrix, paper_clip, paper_singular_values, resolve_padding


def apply_matrix(matrix, x):
    return matrix @ x.reshape(-1)


@pytest.mark.parametrize("seed", range(12))
def test_matches_lax(seed, x64):
    geometry = generate(1000 + seed, exact=False)
    conv, rng = geometry.conv, np.random.default_rng(seed)
    if conv.padding == "CIRCULAR":
        pytest.skip("lax has no circular padding; Flax's is compared below")
    canonical, _ = geometry.kernels(rng, 1, np.float64)
    x = rng.standard_normal((*conv.input_shape, geometry.channels[0] * conv.feature_group_count))
    letters = "DHW"[3 - len(geometry.taps) :]
    want = lax.conv_general_dilated(
        x[None],
        canonical[0],
        conv.strides,
        resolve_padding(conv.padding, conv.input_shape, geometry.taps, conv.strides, conv.kernel_dilation),
        lhs_dilation=conv.input_dilation,
        rhs_dilation=conv.kernel_dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=conv.feature_group_count,
    )[0]
    got = apply_matrix(dense_matrix(canonical[0], conv.input_shape, **geometry.options), x)
    np.testing.assert_allclose(got, np.ravel(want), atol=1e-11 * np.abs(want).max() + 1e-300)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "CIRCULAR"},
        {"padding": "CIRCULAR", "strides": 2},
        {"padding": "CIRCULAR", "kernel_dilation": 2},
        {"padding": "SAME", "strides": 2},
        {"padding": "SAME", "feature_group_count": 2},
        {"padding": "VALID", "kernel_dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 5)], ids=str)
def test_matches_flax(options, size, x64):
    nn = pytest.importorskip("flax.linen")
    rng = np.random.default_rng(0)
    shape, groups = (8, 10), options.get("feature_group_count", 1)
    kernel, x = rng.standard_normal((*size, 4 // groups, 6)), rng.standard_normal((1, *shape, 4))
    module_options = {k: v for k, v in options.items()}
    layer = nn.Conv(6, size, use_bias=False, param_dtype=np.float64, dtype=np.float64, **module_options)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = layer.apply({"params": {"kernel": kernel}}, x)
    got = apply_matrix(dense_matrix(kernel, shape, **options), x[0])
    np.testing.assert_allclose(got, np.ravel(want), atol=1e-12)


def test_matches_scipy():
    signal = pytest.importorskip("scipy.signal")
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((3, 3)), rng.standard_normal((7, 9))
    for padding, mode, boundary in (("SAME", "same", "fill"), ("VALID", "valid", "fill"), ("CIRCULAR", "same", "wrap")):
        want = signal.correlate2d(x, kernel, mode, boundary)
        got = apply_matrix(dense_matrix(kernel[..., None, None], (7, 9), padding=padding), x)
        np.testing.assert_allclose(got, want.ravel(), atol=1e-12)


def test_paper_renderings_agree_with_the_dense_matrix():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3))
    values = np.sort(paper_singular_values(kernel, (5, 6)).ravel())[::-1]
    np.testing.assert_allclose(values, np.linalg.svd(dense_matrix(kernel, (5, 6)), compute_uv=False), atol=1e-12)
    np.testing.assert_allclose(paper_clip(kernel, (5, 6), 1e9), kernel, atol=1e-12)
