"""clip_singular_values: what it reaches against dense float64 matrices, and the exact answer where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import opnorm_jax as oj

# name: (kernel shape, Conv, whether the support is full)
LAYERS = {
    "full": ((4, 5, 2, 3), oj.Conv((4, 5), padding="CIRCULAR"), True),
    "1x1": ((1, 1, 3, 3), oj.Conv((4, 4), padding="SAME"), True),
    "patches": ((2, 2, 2, 6), oj.Conv((4, 6), strides=2, padding="VALID"), True),
    "groups": ((5, 2, 4), oj.Conv((5,), padding="CIRCULAR", feature_group_count=2), True),
    "3x3": ((3, 3, 3, 3), oj.Conv((6, 6), padding="CIRCULAR"), False),
    "stride": ((3, 3, 2, 4), oj.Conv((6, 6), strides=2, padding="CIRCULAR"), False),
    "transposed": ((3, 3, 4, 2), oj.Conv((4, 4), input_dilation=2, padding="CIRCULAR"), False),
}


def dense(kernel, conv):
    names = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count")
    return oracle.dense_matrix(kernel, conv.input_shape, **{name: getattr(conv, name) for name in names})


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_reached_is_told(name, x64):
    shape, conv, full = LAYERS[name]
    kernel = jax.random.normal(jax.random.key(1), shape)
    clipped, reached = oj.clip_singular_values(kernel, conv, 0.5, 1.5)
    values = np.linalg.svd(dense(clipped, conv), compute_uv=False)
    np.testing.assert_allclose(reached, [values.min(), values.max()], rtol=1e-10)
    if full:  # the dense matrix, clipped
        left, values, right = np.linalg.svd(dense(kernel, conv), full_matrices=False)
        expected = (left * np.clip(values, 0.5, 1.5)) @ right
        np.testing.assert_allclose(dense(clipped, conv), expected, atol=1e-12)
    else:
        before = np.linalg.svd(dense(kernel, conv), compute_uv=False)
        assert values.max() < before.max()


@pytest.mark.slow
def test_more_iterations_come_nearer():
    """Alternating projections: measured here, [0.057, 2.9], [0.18, 2.2], [0.47, 2.01], [0.4997, 2.0001]."""
    conv = oj.Conv((8, 8), padding="CIRCULAR")
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 4))
    outside = []
    for iterations in (1, 5, 50, 200):
        _, (smallest, largest) = oj.clip_singular_values(kernel, conv, 0.5, 2.0, iterations=iterations)
        outside.append(float(jnp.maximum(0.5 - smallest, largest - 2)))
    assert outside == sorted(outside, reverse=True)
    assert outside[-1] < 1e-2


@pytest.mark.slow
def test_a_kernel_inside_is_left_alone():
    conv = oj.Conv((8, 8), padding="CIRCULAR")
    kernel = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4)) + 0.01 * jax.random.normal(
        jax.random.key(0), (3, 3, 4, 4)
    )
    clipped, reached = oj.clip_singular_values(kernel, conv, 0.2, 2.0)
    np.testing.assert_array_equal(clipped, kernel)
    values = oj.singular_values(kernel, conv)
    np.testing.assert_allclose(reached, [values.min(), values.max()], rtol=1e-6)
    again, _ = oj.clip_singular_values(clipped, conv, 0.2, 2.0, iterations=3)
    np.testing.assert_array_equal(again, kernel)


def test_zero_values_are_raised(x64):
    """A kernel of rank one, and the zero kernel."""
    for kernel in (jnp.ones((4, 4, 3, 3)), jnp.zeros((4, 4, 3, 3))):
        clipped, reached = oj.clip_singular_values(kernel, (4, 4), 0.5, 2.0)
        values = np.linalg.svd(dense(clipped, oj.Conv((4, 4), padding="CIRCULAR")), compute_uv=False)
        np.testing.assert_allclose([values.min(), values.max()], reached, rtol=1e-9)
        np.testing.assert_allclose(reached[0], 0.5, rtol=1e-9)


@pytest.mark.slow
def test_transformations_and_dtypes():
    conv = oj.Conv((6, 6), padding="CIRCULAR")
    kernels = jax.random.normal(jax.random.key(0), (3, 3, 3, 2, 2))
    bounds = jnp.array([0.1, 0.5, 1.0])
    clip = lambda kernel, lower: oj.clip_singular_values(kernel, conv, lower, 2.0, iterations=2)
    together, reached = jax.jit(jax.vmap(clip))(kernels, bounds)
    for index in range(3):
        one, own = clip(kernels[index], bounds[index])
        np.testing.assert_allclose(together[index], one, atol=1e-5)
        np.testing.assert_allclose(reached[index], own, atol=1e-5)
    narrow, reached = oj.clip_singular_values(kernels[0].astype(jnp.bfloat16), conv, 0.5, 2.0)
    assert narrow.dtype == jnp.bfloat16 and reached.dtype == jnp.float32
    impossible, reached = jax.jit(lambda lower: oj.clip_singular_values(kernels[0], conv, lower, 2.0))(3.0)
    assert jnp.isnan(impossible).all() and jnp.isnan(reached).all()
    broken, reached = oj.clip_singular_values(kernels[0].at[0, 0].set(jnp.nan), conv, 0.5, 2.0)
    assert jnp.isnan(broken).all() and jnp.isnan(reached).all()


def test_it_has_no_derivative():
    with pytest.raises(NotImplementedError, match="clip_singular_values has no derivative"):
        jax.grad(lambda kernel: oj.clip_singular_values(kernel, (4, 4), 0.5, 2.0)[0].sum())(jnp.ones((3, 3, 2, 2)))


K = jnp.ones((3, 3, 2, 2))
WRONG = {
    "crossed": (lambda: oj.clip_singular_values(K, (4, 4), 2.0, 1.0), "0 <= lower <= upper"),
    "negative": (lambda: oj.clip_singular_values(K, (4, 4), -1.0, 1.0), "0 <= lower <= upper"),
    "both zero": (lambda: oj.clip_singular_values(K, (4, 4), 0.0, 0.0), "0 < upper"),
    "not a number": (lambda: oj.clip_singular_values(K, (4, 4), float("nan"), 1.0), "0 <= lower <= upper"),
    "a string": (lambda: oj.clip_singular_values(K, (4, 4), "0", 1.0), "expected lower to be a positive number"),
    "no iterations": (
        lambda: oj.clip_singular_values(K, (4, 4), 0.5, 1.0, iterations=0),
        "iterations to be a positive",
    ),
    "zero padding": (lambda: oj.clip_singular_values(K, oj.Conv((4, 4)), 0.5, 1.0), "expected a circular convolution"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
