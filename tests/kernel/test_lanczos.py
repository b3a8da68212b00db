"""Large layers, against float64 Lanczos."""

import jax
import jax.numpy as jnp
import lanczos
import numpy as np
import optax
import oracle
import pytest
import scipy.signal
from conftest import THOROUGH
from geometries import generate

import opnorm_jax as oj


@pytest.mark.parametrize("seed", range(30 if THOROUGH else 10))
def test_is_the_dense_matrix(seed):
    """The oracle itself: forwards, backwards, and the norm."""
    geometry, rng = generate(seed), np.random.default_rng(seed)
    kernel = rng.standard_normal((*geometry.taps, *geometry.channels))
    matrix = oracle.dense_matrix(kernel, geometry.conv.input_shape, **geometry.options)
    layer = lanczos.operator(kernel, geometry.conv.input_shape, **geometry.options)
    assert layer.shape == matrix.shape
    x, y = (rng.standard_normal(n) for n in reversed(matrix.shape))
    np.testing.assert_allclose(layer.matvec(x), matrix @ x, atol=1e-12)
    np.testing.assert_allclose(layer.rmatvec(y), matrix.T @ y, atol=1e-12)
    if min(matrix.shape) > 2:
        true = np.linalg.svd(matrix, compute_uv=False)[0]
        np.testing.assert_allclose(lanczos.norm(kernel, geometry.conv.input_shape, **geometry.options), true, rtol=1e-9)


def test_is_scipys_convolution():
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((3, 5, 2, 3)), rng.standard_normal((9, 8, 2))
    layer = lanczos.operator(kernel, (9, 8), padding=((1, 1), (2, 2)))
    expected = [
        sum(scipy.signal.correlate2d(x[..., i], kernel[..., i, o], mode="same") for i in range(2)) for o in range(3)
    ]
    np.testing.assert_allclose(layer.matvec(x.ravel()).reshape(9, 8, 3), np.stack(expected, -1), atol=1e-12)


LARGE = {  # kernel, input, geometry
    "64 to 64, circular": ((3, 3, 64, 64), (32, 32), {"padding": "CIRCULAR"}),
    "64 to 64, SAME": ((3, 3, 64, 64), (32, 32), {"padding": "SAME"}),
    "32 to 64, stride 2": ((3, 3, 32, 64), (32, 32), {"padding": ((1, 1), (1, 1)), "strides": 2}),
    "64 to 32, transposed": ((4, 4, 64, 32), (16, 16), {"padding": ((2, 2), (2, 2)), "input_dilation": 2}),
    "depthwise": ((5, 5, 1, 256), (28, 28), {"padding": "SAME", "feature_group_count": 256}),
    "dilated": ((3, 3, 48, 48), (33, 31), {"padding": "SAME", "kernel_dilation": 4}),
    "stem": ((7, 7, 3, 64), (112, 112), {"padding": ((3, 3), (3, 3)), "strides": 2}),
    "1-D": ((9, 64, 64), (1024,), {"padding": "VALID"}),
    "3-D": ((3, 3, 3, 16, 16), (12, 12, 12), {"padding": "SAME"}),
}


@pytest.mark.parametrize("name", LARGE if THOROUGH else ["64 to 64, SAME", "32 to 64, stride 2", "depthwise"])
@pytest.mark.parametrize("kind", ["random", "trained-like"] if THOROUGH else ["trained-like"])
def test_large_layers(name, kind):
    """Bounds on the right side, the norm to 1e-5, and inside the ball after rescaling and after a constrained step."""
    shape, size, geometry = LARGE[name]
    rng = np.random.default_rng(len(name))
    kernel = rng.standard_normal(shape)
    if kind == "trained-like":  # a few directions well above the rest, smooth in space
        kernel = 0.1 * kernel + rng.standard_normal((*(1 for _ in size), shape[-2], 1)) * rng.standard_normal(shape[-1])
    kernel = (0.05 * kernel).astype(np.float32)
    conv = oj.Conv(size, kernel_layout="DHWIO"[-len(shape) :], **geometry)
    true = lanczos.norm(kernel, size, **geometry)
    lower, upper = jax.jit(lambda k: oj.operator_norm_bounds(k, conv))(kernel)
    assert lower <= true <= upper, (lower / true, upper / true)
    np.testing.assert_allclose(jax.jit(lambda k: oj.operator_norm(k, conv))(kernel), true, rtol=1e-5)
    bound = 0.7 * true
    tx = oj.constrain_operator_norm(bound, {"kernel": conv})
    params = {"kernel": jnp.asarray(kernel)}
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = lanczos.norm(np.asarray(optax.apply_updates(params, updates)["kernel"]), size, **geometry)
    assert 0.9 * bound * true / upper <= after <= bound * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["64 to 64, SAME", "32 to 64, stride 2"] if THOROUGH else ["depthwise"])
def test_projection_of_a_large_layer(name):
    shape, size, geometry = LARGE[name]
    kernel = 0.05 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    conv = oj.Conv(size, **geometry)
    bound = 0.8 * lanczos.norm(kernel, size, **geometry)
    projected, info = jax.jit(lambda k: oj.project_operator_norm_info(k, conv, bound, max_iterations=20))(kernel)
    assert lanczos.norm(np.asarray(projected), size, **geometry) <= bound * (1 + 1e-6)
    distance = np.linalg.norm(np.asarray(projected, np.float64) - kernel)
    rescaled = np.asarray(oj.rescale_operator_norm(kernel, conv, bound), np.float64)
    np.testing.assert_allclose(info.distance, distance, rtol=1e-4)
    assert distance < np.linalg.norm(rescaled - kernel)
