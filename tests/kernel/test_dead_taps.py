"""Taps that meet no pixel: bounds are those of the layer without them, and constraints leave them as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import opnorm_jax as oj

CASES = {  # kernel, Conv, at most how much above the truth
    "atrous, rate 24 on 8x8": ((3, 3, 2, 3), oj.Conv((8, 8), kernel_dilation=24), 1 + 1e-5),
    "atrous, rate 18 on 14x14": ((3, 3, 2, 2), oj.Conv((14, 14), kernel_dilation=18), 1 + 1e-5),
    "dilation 32 on 20": ((3, 2, 3), oj.Conv((20,), kernel_dilation=32), 1 + 1e-5),
    "31x31 on 7x7": ((31, 31, 1, 1), oj.Conv((7, 7)), 2.2),
    "41 taps on 8": ((41, 2, 2), oj.Conv((8,)), 1.5),
    "7x7 on 3x3": ((7, 7, 2, 2), oj.Conv((3, 3)), 2.1),
    "outputs of padding alone": ((3, 2, 2), oj.Conv((6,), padding=((9, 7),)), 1.5),
    "one layout, one stride": ((2, 2, 9, 5), oj.Conv((4, 3), strides=(2, 1), kernel_layout="OIHW"), 2.2),
}


def dense(kernel, conv):
    order = [conv.kernel_layout.index(letter) for letter in "DHWIO" if letter in conv.kernel_layout]
    options = {"strides": conv.strides, "padding": conv.padding, "kernel_dilation": conv.kernel_dilation}
    return oracle.dense_singular_values(np.asarray(kernel, np.float64).transpose(order), conv.input_shape, **options)[0]


@pytest.mark.parametrize("name", CASES)
def test_dead_taps_do_not_count(name):
    shape, conv, above = CASES[name]
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    truth = dense(kernel, conv)
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= truth * (1 + 1e-6) and truth <= upper <= above * truth, (lower / truth, upper / truth)


@pytest.mark.parametrize("constraint", ["clip", "rescale", "project"])
def test_constraints_leave_dead_taps_as_they_are(constraint):
    conv = oj.Conv((8, 8), kernel_dilation=24)
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3)).astype(np.float32)
    out = np.asarray(getattr(oj, f"{constraint}_operator_norm")(kernel, conv, 0.5))
    dead = np.ones((3, 3), bool)
    dead[1, 1] = False
    assert (out[dead] == kernel[dead]).all() and (out[1, 1] != kernel[1, 1]).any()
    assert dense(out, conv) <= 0.5 * (1 + 1e-5)


def test_gradients_of_dead_taps_are_zero():
    conv = oj.Conv((4,), kernel_dilation=9)
    kernel = jnp.ones((3, 2, 2))
    gradient = jax.grad(lambda k: oj.operator_norm(k, conv))(kernel)
    assert (gradient[jnp.array([0, 2])] == 0).all() and jnp.abs(gradient[1]).max() > 0.1


def test_what_is_not_finite_in_a_dead_tap_is_not_ignored():
    """0 times NaN is NaN in the layer too."""
    conv = oj.Conv((4,), kernel_dilation=9)
    kernel = jnp.ones((3, 2, 2)).at[0, 0, 0].set(jnp.nan)
    assert jnp.isnan(oj.operator_norm_bounds(kernel, conv).upper)
    assert jnp.isnan(oj.rescale_operator_norm(kernel, conv, 1.0)).all()


def test_a_layer_of_padding_alone_is_zero():
    conv = oj.Conv((2,), padding=((5, 0),), strides=9)
    bounds = oj.operator_norm_bounds(jnp.ones((3, 1, 1)), conv)
    assert bounds.lower == bounds.upper == 0 == dense(np.ones((3, 1, 1)), conv)


def test_the_bound_for_every_size_counts_every_tap():
    kernel = np.ones((3, 1, 1), np.float32)
    assert oj.operator_norm_upper_bound(kernel, kernel_dilation=9) >= 3
