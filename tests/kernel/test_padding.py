"""Padding by name, axis by axis: bounds and constraints against dense float64 matrices, and Flax's own layers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from conftest import THOROUGH

import opnorm_jax as oj
from opnorm_jax._geometry import resolve
from opnorm_jax._tree.report import frobenius_norm


def mixture(seed):
    """Every axis with a padding of its own: a name, a number, or a pair; strides and dilation too."""
    rng = np.random.default_rng(seed)
    while True:
        rank = int(rng.integers(1, 4))
        names = ["SAME", "VALID", "CAUSAL", "CIRCULAR", "EDGE", "REFLECT", int(rng.integers(0, 3))]
        names.append(tuple(rng.integers(-1, 3, 2).tolist()))
        padding = [names[n] for n in rng.integers(0, len(names), rank)]
        shape, taps = rng.integers(3, 7 if rank < 3 else 5, rank).tolist(), rng.integers(1, 4, rank).tolist()
        strides = rng.integers(1, 3, rank).tolist()
        dilation = rng.integers(1, 3, rank).tolist() if rank < 3 else [1, 1, 1]
        conv = oj.Conv(shape, padding=padding, strides=strides, kernel_dilation=dilation)
        kernel = rng.standard_normal((*taps, 2, 3)).astype(np.float32)
        try:
            resolve(conv, kernel.shape)
        except ValueError:  # no output pixel
            continue
        return conv, kernel


def matrix_of(kernel, conv):
    options = {name: getattr(conv, name) for name in ("padding", "strides", "kernel_dilation")}
    return oracle.dense_matrix(kernel, conv.input_shape, **options)


@pytest.mark.parametrize("seed", range(400 if THOROUGH else 20))
def test_bounds_hold_for_any_mixture(seed):
    conv, kernel = mixture(seed)
    matrix = matrix_of(kernel, conv)
    truth = np.linalg.norm(matrix, 2)
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= truth * (1 + 1e-6) and truth <= upper
    assert oj.operator_norm(kernel, conv) == pytest.approx(truth, rel=1e-5)
    rescaled = np.asarray(oj.rescale_operator_norm(kernel, conv, 0.5))
    assert np.linalg.norm(matrix_of(rescaled, conv), 2) <= 0.5 * (1 + 1e-6)
    found = frobenius_norm(kernel, dataclasses.replace(conv, kernel_layout=None))
    np.testing.assert_allclose(found, np.linalg.norm(matrix), rtol=1e-6)


@pytest.mark.parametrize("seed", range(200 if THOROUGH else 4))
def test_all_constraints_hold_for_any_mixture(seed):
    conv, kernel = mixture(1000 + seed)
    projected, info = oj.project_operator_norm_info(kernel, conv, 0.5)
    assert np.linalg.norm(matrix_of(np.asarray(projected), conv), 2) <= 0.5 * (1 + 1e-6)
    assert info.norm == pytest.approx(float(oj.operator_norm_bounds(kernel, conv).upper), rel=1e-4)
    steepest = oj.steepest_direction(kernel, conv, exact=True)
    assert np.linalg.norm(matrix_of(np.asarray(steepest.direction), conv), 2) <= 1 + 1e-6
    update = oj.constrain_operator_norm(0.5, {"kernel": conv}, constraint="clip")
    params = {"kernel": jnp.asarray(kernel)}
    updates, _ = update.update({"kernel": jnp.zeros_like(kernel)}, update.init(params), params)
    clipped = np.asarray(optax.apply_updates(params, updates)["kernel"])
    assert np.linalg.norm(matrix_of(clipped, conv), 2) < np.linalg.norm(matrix_of(kernel, conv), 2)


@pytest.mark.parametrize("dtype, size", [("float32", 1e7), ("bfloat16", 200), ("float16", 1e3)])
@pytest.mark.parametrize("padding", ["EDGE", "REFLECT"])
def test_last_roundings_count_copies_of_pixels(padding, dtype, size):
    """Far outside the ball a step lands beside its target: by how much is bounded tap by tap, copies included.

    The first of seven taps meets one edge pixel of four at every output.
    """
    conv, rng = oj.Conv((4,), padding=padding), np.random.default_rng(0)
    tx = oj.constrain_operator_norm(1.0, {"kernel": conv})

    @jax.jit
    def step(params):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    for _ in range(60):
        taps = rng.choice([np.eye(7)[0], np.eye(7)[-1], rng.standard_normal(7)]) * size * rng.uniform(0.5, 2)
        landed = np.asarray(step({"kernel": jnp.asarray(taps.reshape(7, 1, 1)).astype(dtype)})["kernel"], np.float64)
        assert np.linalg.norm(matrix_of(landed, conv), 2) <= 1 + 4 * float(jnp.finfo(dtype).eps)


def test_axes_with_a_formula_are_exact():
    """Circular along one axis, and along the other patches that tile the image."""
    kernel = np.random.default_rng(0).standard_normal((3, 2, 2, 3)).astype(np.float32)
    conv = oj.Conv((6, 8), padding=("CIRCULAR", "VALID"), strides=(3, 2))
    truth = np.linalg.svd(matrix_of(kernel, conv), compute_uv=False)
    values = np.sort(np.asarray(oj.singular_values(kernel, conv)).ravel())[::-1]
    np.testing.assert_allclose(values, truth, rtol=1e-5)
    (row,) = oj.spectral_report({"kernel": kernel}, {"kernel": conv}).layers
    assert row.exact and row.smallest == pytest.approx(truth[-1], rel=1e-5)
    with pytest.raises(ValueError, match="padding 'CIRCULAR'"):
        oj.singular_values(kernel, oj.Conv((6, 8), padding=("CIRCULAR", "SAME")))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (1, 2)])
def test_flaxs_own_paddings(padding, strides, dilation):
    """The description that is found in Flax's program, by its name, has the norm of Flax's layer."""
    layer = nn.Conv(3, (3, 4), strides=strides, padding=padding, kernel_dilation=dilation, use_bias=False)
    x = jnp.zeros((1, 8, 9, 2))
    params = layer.init(jax.random.key(0), x)["params"]
    jacobian = np.asarray(jax.jacobian(lambda x: layer.apply({"params": params}, x))(x), np.float64).reshape(-1, x.size)
    conv = oj.Conv((8, 9), padding=padding, strides=strides, kernel_dilation=dilation)
    np.testing.assert_allclose(jacobian, matrix_of(np.asarray(params["kernel"]), conv), atol=1e-6)
    if padding == "REFLECT" or strides == 1:
        assert oj.find_convs(lambda p, x: layer.apply({"params": p}, x), params, x)["kernel"] == conv


@pytest.mark.parametrize("padding_mode", ["REFLECT", "REPLICATE"])
def test_equinoxs_own_paddings(padding_mode):
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode, use_bias=False, key=jax.random.key(0))
    conv = oj.find_convs(lambda layer, x: layer(x), layer, jnp.zeros((2, 6, 7))).weight
    assert conv.padding == {"REFLECT": "REFLECT", "REPLICATE": "EDGE"}[padding_mode]
    jacobian = np.asarray(jax.jacobian(layer)(jnp.zeros((2, 6, 7))), np.float64).reshape(3 * 42, 2 * 42)
    lower, upper = oj.operator_norm_bounds(layer.weight, conv)
    assert lower <= np.linalg.norm(jacobian, 2) * (1 + 1e-6) and np.linalg.norm(jacobian, 2) <= upper


def test_padding_written_by_hand():
    """jnp.pad before VALID: periodic in longitude, zero in latitude; wide enough for a map as the globe is."""

    def layer(kernel, x):
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="wrap")
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    kernel, x = jax.random.normal(jax.random.key(0), (3, 3, 2, 3)), jnp.zeros((1, 5, 7, 2))
    conv = oj.find_convs(lambda p, x: layer(p["k"], x), {"k": kernel}, x)["k"]
    assert conv.padding == ((1, 1), "CIRCULAR")
    jacobian = np.asarray(jax.jacobian(lambda x: layer(kernel, x))(x), np.float64).reshape(105, 70)
    np.testing.assert_allclose(jacobian, matrix_of(np.asarray(kernel), conv), atol=1e-6)
    true = np.linalg.norm(jacobian, 2)
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= true * (1 + 1e-6) and true <= upper
    bound = oj.lipschitz_bound(lambda p, x: layer(p["k"], x), {"k": kernel}, x)
    assert true <= bound <= float(upper) * (1 + 1e-5)
    assert "5x7 pad 1xCIRCULAR" in str(oj.spectral_report({"k": kernel}, {"k": conv}))


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
