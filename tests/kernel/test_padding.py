"""Padding by name, axis by axis: bounds and constraints against dense float64 matrices, and Flax's own layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import THOROUGH

import opnorm_jax as oj


@pytest.mark.parametrize("seed", range(200 if THOROUGH else 25))
def test_bounds_hold_for_any_mixture(seed):
    """Every axis with a padding of its own: a name, a number, or a pair; strides and dilation too."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    names = ["SAME", "VALID", "CAUSAL", int(rng.integers(0, 3)), tuple(rng.integers(-1, 3, 2).tolist())]
    padding = [names[n] for n in rng.integers(0, 5, rank)]
    shape, taps = rng.integers(4, 7, rank).tolist(), rng.integers(1, 4, rank).tolist()
    conv = oj.Conv(shape, padding=padding, strides=rng.integers(1, 3, rank).tolist(), kernel_dilation=1)
    kernel = rng.standard_normal((*taps, 2, 3)).astype(np.float32)
    pairs = [(entry, entry) if isinstance(entry, int) else entry for entry in padding]
    matrix = oracle.dense_matrix(kernel, shape, padding=pairs, strides=conv.strides)
    truth = np.linalg.norm(matrix, 2)
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= truth * (1 + 1e-6) and truth <= upper
    assert oj.operator_norm(kernel, conv) == pytest.approx(truth, rel=1e-5)
    rescaled = np.asarray(oj.rescale_operator_norm(kernel, conv, 0.5))
    assert np.linalg.norm(oracle.dense_matrix(rescaled, shape, padding=pairs, strides=conv.strides), 2) <= 0.5 * (
        1 + 1e-6
    )


def test_causal_is_flaxs():
    layer = nn.Conv(3, (4,), padding="CAUSAL", kernel_dilation=2)
    x = jnp.zeros((1, 9, 2))
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    conv = oj.Conv((9,), padding="CAUSAL", kernel_dilation=2)
    jacobian = jax.jacobian(lambda x: layer.apply(variables, x))(x).reshape(27, 18)
    np.testing.assert_allclose(
        jacobian, oracle.dense_matrix(kernel, (9,), padding="CAUSAL", kernel_dilation=2), atol=1e-7
    )
    found = oj.find_convs(lambda p, x: layer.apply({"params": p}, x), variables["params"], x)["kernel"]
    assert found.padding == ((6, 0),)
    np.testing.assert_allclose(oj.operator_norm(kernel, conv), oj.operator_norm(kernel, found), rtol=1e-6)


def test_one_name_for_one_padding():
    assert oj.Conv((4, 4), padding=("SAME", "SAME")) == oj.Conv((4, 4))
    assert oj.Conv((4, 4), padding=("CIRCULAR", "CIRCULAR")).padding == "CIRCULAR"
    assert oj.Conv((4,), padding=("CAUSAL",)).padding == "CAUSAL"
    report = oj.spectral_report({"k": jnp.ones((3, 3, 1, 1))}, {"k": oj.Conv((4, 4), padding=("CAUSAL", (0, 1)))})
    assert "pad CAUSALx0:1" in str(report)
