"""A dense layer is the convolution of dimension 0: its spectrum is that of its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opnorm_jax as oj


@pytest.mark.parametrize("layout, groups", [("IO", 1), ("OI", 1), ("IO", 3)])
def test_against_the_matrix(layout, groups):
    kernel = jax.random.normal(jax.random.key(0), (5, 6))
    conv = oj.Conv((), kernel_layout=layout, feature_group_count=groups)
    canonical = np.asarray(kernel if layout == "IO" else kernel.T, np.float64)
    parts = np.split(canonical, groups, axis=1)
    truth = np.sort(np.concatenate([np.linalg.svd(part, compute_uv=False) for part in parts]))[::-1]
    values = oj.singular_values(kernel, conv)
    assert values.shape == (len(truth),)
    np.testing.assert_allclose(values, truth, rtol=1e-5)
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= truth[0] <= upper <= truth[0] * (1 + 2e-5)
    assert np.isclose(oj.operator_norm(kernel, conv), truth[0], rtol=1e-5)
    anywhere = oj.operator_norm_upper_bound(kernel, kernel_layout=layout, feature_group_count=groups)
    assert truth[0] <= anywhere <= truth[0] * (1 + 2e-5)


def test_projection_of_a_matrix_is_its_clipping():
    """For one matrix the paper's clip is the nearest point: both methods must find it."""
    kernel = jax.random.normal(jax.random.key(1), (7, 5))
    u, s, v = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    truth = u @ np.diag(np.minimum(s, 1)) @ v
    for method in ("clip", "project"):
        np.testing.assert_allclose(oj.constrain(kernel, 1.0, oj.Conv(()), constraint=method), truth, atol=1e-4)
    rescaled = oj.rescale_operator_norm(kernel, oj.Conv(()), 1.0)
    np.testing.assert_allclose(rescaled, np.asarray(kernel) / s[0], rtol=1e-4)


def test_padding_means_nothing_there():
    assert oj.Conv((), padding="SAME") == oj.Conv(()) == oj.Conv((), padding=())


def test_gradient():
    kernel = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    np.testing.assert_allclose(jax.grad(oj.operator_norm)(kernel, oj.Conv(())), np.diag([1.0, 0, 0]), atol=1e-6)
