"""operator_norm_bounds(tight=True): certified, and within 2e-4 of the norm of a dense float64 matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import generate

import opnorm_jax as oj
from opnorm_jax._rounding import dense_rounding

CASES = {  # kernel, Conv
    "SAME on 8x8": ((3, 3, 8, 8), oj.Conv((8, 8))),
    "SAME, stride 2": ((3, 3, 3, 5), oj.Conv((7, 6), strides=2)),
    "groups": ((3, 3, 2, 6), oj.Conv((5, 5), feature_group_count=3)),
    "VALID, 1-D": ((5, 3, 2), oj.Conv((11,), padding="VALID")),
    "transposed": ((4, 4, 2, 3), oj.Conv((4, 4), padding=2, input_dilation=2)),
    "circular, a stride that does not divide": ((3, 3, 3, 3), oj.Conv((7, 7), strides=2, padding="CIRCULAR")),
    "dead taps": ((7, 7, 2, 2), oj.Conv((3, 3))),
}


def truth_of(kernel, conv):
    options = {name: getattr(conv, name) for name in ("strides", "padding", "input_dilation", "kernel_dilation")}
    options["feature_group_count"] = conv.feature_group_count
    return oracle.dense_singular_values(np.asarray(kernel, np.float64), conv.input_shape, **options)[0]


@pytest.mark.parametrize("name", CASES)
def test_tight_bounds(name):
    shape, conv = CASES[name]
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    truth = truth_of(kernel, conv)
    lower, upper = oj.operator_norm_bounds(kernel, conv, tight=True)
    assert lower <= truth <= upper <= truth * 1.0002, (lower / truth, upper / truth)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < 4 else pytest.mark.slow) for seed in range(24)])
def test_tight_bounds_of_random_layers(seed):
    geometry = generate(seed, exact=False)
    canonical, kernels = geometry.kernels(np.random.default_rng(seed), 2)
    for one, kernel in zip(canonical, kernels):
        truth = geometry.oracle(one)[0]
        lower, upper = oj.operator_norm_bounds(kernel, geometry.conv, tight=True)
        assert lower <= truth * (1 + 1e-6) and truth <= upper <= truth * 1.0002, (lower / truth, upper / truth)


@pytest.mark.slow
def test_by_products_and_under_vmap():
    kernels = np.random.default_rng(1).standard_normal((2, 3, 3, 2, 2)).astype(np.float32)
    conv = oj.Conv((5, 4))
    execution = oj.Execution(factorization="products")
    alone = [oj.operator_norm_bounds(kernel, conv, tight=True, execution=execution).upper for kernel in kernels]
    batch = jax.vmap(lambda k: oj.operator_norm_bounds(k, conv, tight=True).upper)(kernels)
    for kernel, one, other in zip(kernels, alone, batch):
        truth = truth_of(kernel, conv)
        assert truth <= one <= truth * 1.0002 and truth <= other <= truth * 1.0002


def test_gradient_is_that_of_the_norm():
    conv = oj.Conv((5, 4))
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 2, 2)), jnp.float32)
    tight = jax.grad(lambda k: oj.operator_norm_bounds(k, conv, tight=True).upper)(kernel)
    np.testing.assert_allclose(tight, jax.grad(lambda k: oj.operator_norm(k, conv))(kernel), rtol=3e-4, atol=1e-4)


def test_special_kernels():
    conv = oj.Conv((4, 4))
    zero = oj.operator_norm_bounds(jnp.zeros((3, 3, 2, 2)), conv, tight=True)
    assert zero.lower == zero.upper == 0
    assert jnp.isnan(oj.operator_norm_bounds(jnp.full((3, 3, 2, 2), jnp.nan), conv, tight=True).upper)


def test_errors():
    with pytest.raises(ValueError, match="at most 8192 inputs or outputs .*got 65536. Leave tight out"):
        oj.operator_norm_bounds(jnp.ones((3, 3, 64, 64)), oj.Conv((32, 32)), tight=True)
    with pytest.raises(TypeError, match="tight to be True or False"):
        oj.operator_norm_bounds(jnp.ones((3, 3, 1, 1)), oj.Conv((4, 4)), tight="yes")


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_a_tight_bound_scales_with_the_kernel(scale):
    shape, conv = CASES["SAME on 8x8"]
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    one, other = (oj.operator_norm_bounds(k, conv, tight=True) for k in (kernel, np.float32(scale) * kernel))
    assert other == (scale * one.lower, scale * one.upper)


def test_a_tight_bound_allows_for_rounding_twice():
    """Once where the search starts, once for the factorisation: seen where the norm, 2, is computed almost exactly."""
    kernel = np.zeros((3, 4, 4), np.float32)
    kernel[:] = np.eye(4)
    upper = oj.operator_norm_bounds(kernel, oj.Conv((2,)), tight=True).upper
    allowance = dense_rounding(8, 3 * 16, np.float32)
    assert 2 * (1 + 1.9 * allowance) < upper < 2 * (1 + 2.5 * allowance)
