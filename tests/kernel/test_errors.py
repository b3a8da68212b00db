"""Bad input: each wrong call raises, and its message says what was expected, what came, what to do."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opnorm_jax as oj

pytestmark = pytest.mark.quick

K = jnp.ones((3, 3, 2, 4))
KERNEL_CALLS = {
    "singular_values": oj.singular_values,
    "operator_norm": oj.operator_norm,
    "operator_norm_bounds": oj.operator_norm_bounds,
    "clip": functools.partial(oj.clip_operator_norm, max_norm=1.0),
    "project": functools.partial(oj.project_operator_norm, max_norm=1.0),
    "rescale": functools.partial(oj.rescale_operator_norm, max_norm=1.0),
}


# name: (call, error, message)
CONV = {
    "int shape": (lambda: oj.Conv(32), TypeError, "expected input_shape to be a tuple of ints.*got 32"),
    "float shape": (lambda: oj.Conv((32.0, 32)), TypeError, "input_shape to be made of ints, got 32.0"),
    "string shape": (lambda: oj.Conv("32"), TypeError, "expected input_shape to be a tuple of ints"),
    "bool shape": (lambda: oj.Conv((True, 4)), TypeError, "input_shape to be made of ints, got True"),
    "zero shape": (lambda: oj.Conv((0, 4)), ValueError, "input_shape to be at least 1, got 0"),
    "negative shape": (lambda: oj.Conv((4, -4)), ValueError, "input_shape to be at least 1, got -4"),
    "too many axes": (lambda: oj.Conv((4, 4, 4, 4)), ValueError, r"at most 3 axes.*got \(4, 4, 4, 4\)"),
    "with batch and channels": (lambda: oj.Conv((8, 32, 32, 3)), ValueError, "no batch, no channels"),
    "traced shape": (lambda: jax.jit(lambda n: oj.Conv((n, 4)).strides[0])(4), TypeError, "input_shape to be made"),
    "zero stride": (lambda: oj.Conv((4, 4), strides=0), ValueError, "strides to be at least 1, got 0"),
    "one stride of three": (
        lambda: oj.Conv((4, 4), strides=(1, 2, 3)),
        ValueError,
        "strides to be an int or 2 of them",
    ),
    "float stride": (lambda: oj.Conv((4, 4), strides=2.0), TypeError, "strides to be made of ints, got 2.0"),
    "string stride": (lambda: oj.Conv((4, 4), strides="2"), TypeError, "strides to be made of ints, got '2'"),
    "none stride": (lambda: oj.Conv((4, 4), strides=None), TypeError, "strides to be made of ints, got None"),
    "zero kernel dilation": (
        lambda: oj.Conv((4, 4), kernel_dilation=0),
        ValueError,
        "kernel_dilation to be at least 1",
    ),
    "negative input dilation": (
        lambda: oj.Conv((4, 4), input_dilation=-1),
        ValueError,
        "input_dilation to be at least 1",
    ),
    "zero groups": (lambda: oj.Conv((4, 4), feature_group_count=0), ValueError, "feature_group_count to be at least 1"),
    "tuple of groups": (
        lambda: oj.Conv((4, 4), feature_group_count=(1, 1)),
        TypeError,
        "feature_group_count to be made",
    ),
    "lower-case padding": (lambda: oj.Conv((4, 4), padding="same"), ValueError, "'SAME', 'VALID'.*'same'"),
    "unknown padding": (lambda: oj.Conv((4, 4), padding="MIRROR"), ValueError, "padding to be one of.*'MIRROR'"),
    "causal padding of an image": (lambda: oj.Conv((4, 4), padding="CAUSAL"), ValueError, "one spatial axis.*got 2"),
    "unknown padding of an axis": (lambda: oj.Conv((4, 4), padding=("SAME", "MIRROR")), ValueError, "one of.*'MIRROR'"),
    "edge pixels of a transposed axis": (
        lambda: oj.Conv((4,), padding="EDGE", input_dilation=2),
        ValueError,
        "pairs with input_dilation",
    ),
    "SAME on a transposed axis": (
        lambda: oj.Conv((4, 4), padding=("SAME", 1), input_dilation=(2, 1)),
        ValueError,
        "pairs with input_dilation",
    ),
    "too few pads": (lambda: oj.Conv((4, 4), padding=((1, 1),)), ValueError, "pair per spatial axis"),
    "triple pads": (lambda: oj.Conv((4, 4), padding=((1, 1, 1), (1, 1))), ValueError, r"\(low, high\) pairs, got"),
    "float pads": (
        lambda: oj.Conv((4, 4), padding=((0.5, 1), (1, 1))),
        TypeError,
        "padding to be made of ints, got 0.5",
    ),
    "none padding": (lambda: oj.Conv((4, 4), padding=None), TypeError, "padding to be made of ints, got None"),
    "SAME, transposed": (
        lambda: oj.Conv((4, 4), padding="SAME", input_dilation=2),
        ValueError,
        "explicit .low, high. pairs with input_dilation",
    ),
    "layout of another rank": (lambda: oj.Conv((4,), kernel_layout="HWIO"), ValueError, "permutation of 'WIO'"),
    "layout with a repeat": (
        lambda: oj.Conv((4, 4), kernel_layout="HHIO"),
        ValueError,
        "permutation of 'HWIO'.*'OIHW'",
    ),
    "layout in lower case": (lambda: oj.Conv((4, 4), kernel_layout="hwio"), ValueError, "permutation of 'HWIO'"),
    "layout of an activation": (lambda: oj.Conv((4, 4), kernel_layout="NHWC"), ValueError, "permutation of 'HWIO'"),
    "layout as a tuple": (lambda: oj.Conv((4, 4), kernel_layout=("H", "W", "I", "O")), TypeError, "to be a string"),
    "positional options": (lambda: oj.Conv((4, 4), 2), TypeError, "positional"),
}
OPTIONS = {
    "negative bound": (lambda: oj.clip_operator_norm(K, (8, 8), -1.0), ValueError, "max_norm to be positive, got -1.0"),
    "zero bound": (lambda: oj.rescale_operator_norm(K, (8, 8), 0), ValueError, "max_norm to be positive.*float..inf"),
    "nan bound": (lambda: oj.project_operator_norm(K, (8, 8), np.nan), ValueError, "max_norm to be positive, got nan"),
    "string bound": (lambda: oj.clip_operator_norm(K, (8, 8), "1.0"), TypeError, "positive number, got '1.0'"),
    "bool bound": (lambda: oj.clip_operator_norm(K, (8, 8), True), TypeError, "positive number, got True"),
    "none bound": (lambda: oj.clip_operator_norm(K, (8, 8), None), TypeError, "positive number, got None"),
    "vector bound": (
        lambda: oj.rescale_operator_norm(K, (8, 8), jnp.ones(3)),
        ValueError,
        r"scalar, got shape \(3,\).*vmap",
    ),
    "zero tolerance": (
        lambda: oj.project_operator_norm(K, (8, 8), 1.0, tolerance=0),
        ValueError,
        "tolerance to be pos",
    ),
    "traced tolerance": (
        lambda: jax.jit(lambda t: oj.project_operator_norm(K, (8, 8), 1.0, tolerance=t))(0.1),
        TypeError,
        "tolerance to be a number, static under jit",
    ),
    "float iterations": (
        lambda: oj.project_operator_norm(K, (8, 8), 1.0, max_iterations=10.5),
        TypeError,
        "max_iterations to be an int, static under jit, got 10.5",
    ),
    "no iterations": (
        lambda: oj.project_operator_norm(K, (8, 8), 1.0, max_iterations=0),
        ValueError,
        "max_iterations to be positive, got 0",
    ),
    "zero chunk": (lambda: oj.Execution(chunk_bytes=0), ValueError, "chunk_bytes to be positive"),
    "mesh of another kind": (
        lambda: oj.Execution(mesh=8),
        TypeError,
        "a jax.sharding.Mesh or None, got 8",
    ),
    "unknown way to factorise": (
        lambda: oj.Execution(factorization="qr"),
        ValueError,
        "'auto', 'decompose', 'products'.*got 'qr'",
    ),
    "values by products": (
        lambda: oj.singular_values(K, (8, 8), execution=oj.Execution(factorization="products")),
        ValueError,
        "'auto' or 'decompose', got 'products'.*operator_norm",
    ),
    "a string for an Execution": (
        lambda: oj.clip_operator_norm(K, (8, 8), 1.0, execution="products"),
        TypeError,
        r"opnorm_jax.Execution, got 'products'. Write execution=opnorm_jax.Execution\(",
    ),
    "float chunk": (lambda: oj.Execution(chunk_bytes=1e6), TypeError, "chunk_bytes to be an int"),
    "positional Execution": (lambda: oj.Execution("products"), TypeError, "positional"),
    "zero slack": (lambda: oj.operator_norm_upper_bound(K, slack=0.0), ValueError, "slack to be positive, got 0.0"),
    "endless slack": (lambda: oj.operator_norm_upper_bound(K, slack=math.inf), ValueError, "be positive, got inf"),
    "no output along one axis": (
        lambda: oj.operator_norm(K, oj.Conv((2, 8), padding="VALID")),
        ValueError,
        "at least one output pixel",
    ),
    "string slack": (lambda: oj.operator_norm_upper_bound(K, slack="1%"), TypeError, "slack to be a number"),
    "upper bound of a vector": (lambda: oj.operator_norm_upper_bound(jnp.ones(3)), ValueError, "2 to 5 axes"),
    "stacked below 0": (lambda: oj.Conv((8, 8), stacked=-1), ValueError, "stacked to be 0 or more, got -1"),
    "upper bound, wrong layout": (
        lambda: oj.operator_norm_upper_bound(K, kernel_layout="OI"),
        ValueError,
        "permutation of 'HWIO'",
    ),
    "upper bound, strides": (
        lambda: oj.operator_norm_upper_bound(K, strides=(1, 1, 2)),
        ValueError,
        "strides to be an",
    ),
    "upper bound, groups": (
        lambda: oj.operator_norm_upper_bound(K, feature_group_count=3),
        ValueError,
        "multiple of feature_group_count=3",
    ),
    "spectrum of a SAME layer": (
        lambda: oj.singular_values(K, oj.Conv((8, 8), padding="SAME")),
        ValueError,
        "operator_norm_bounds",
    ),
    "no output": (
        lambda: oj.operator_norm_bounds(K, oj.Conv((2, 2), padding="VALID")),
        ValueError,
        r"at least one output pixel, got output shape \(0, 0\)",
    ),
    "clip with no output": (
        lambda: oj.clip_operator_norm(K, oj.Conv((2, 2), padding="VALID"), 1.0),
        ValueError,
        "at least one output pixel",
    ),
}
CALLS = {**CONV, **OPTIONS}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


# name: (kernel, conv, error, message); each for every function of a kernel
KERNELS = {
    "wrong rank": (jnp.ones((3, 3, 2)), (8, 8), ValueError, r"4 axes \(HWIO\).*\(3, 3, 2\)"),
    "stacked": (jnp.ones((5, 3, 3, 2, 2)), (8, 8), ValueError, "jax.vmap"),
    "integers": (jnp.ones((3, 3, 2, 2), int), (8, 8), TypeError, "got int32.*integers times their scale"),
    "complex": (jnp.ones((3, 3, 2, 2), "complex64"), (8, 8), TypeError, r"got complex64.*\[\[Re, Im\], \[-Im, Re\]\]"),
    "list": ([[1.0]], (8, 8), TypeError, "kernel to be an array.*got list"),
    "none": (None, (8, 8), TypeError, "kernel to be an array.*got NoneType"),
    "zero channels": (jnp.ones((3, 3, 0, 2)), (8, 8), ValueError, r"at least 1, got kernel.shape=\(3, 3, 0, 2\)"),
    "groups": (K, oj.Conv((8, 8), feature_group_count=3), ValueError, "multiple of feature_group_count=3, got 4"),
    "conv is a string": (K, "SAME", TypeError, "an opnorm_jax.Conv or a tuple of ints"),
    "conv is an int": (K, 8, TypeError, "an opnorm_jax.Conv or a tuple of ints.*got 8"),
    "conv is None": (K, None, TypeError, "an opnorm_jax.Conv or a tuple of ints"),
    "1-D conv": (K, (8,), ValueError, "3 axes .WIO. for an input of 1 spatial axes"),
}


@pytest.mark.parametrize("function", KERNEL_CALLS)
@pytest.mark.parametrize("name", KERNELS)
def test_wrong_kernel(name, function):
    kernel, conv, error, message = KERNELS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        KERNEL_CALLS[function](kernel, conv)


def test_the_advice_for_complex_kernels_is_right():
    """The real kernel that the error recommends has the complex layer's norm."""
    rng = np.random.default_rng(0)
    re, im = rng.standard_normal((2, 3, 3, 2, 4)).astype(np.float32)
    symbol = np.fft.fft2(re.astype(np.float64) + 1j * im, (8, 8), axes=(0, 1))
    truth = np.linalg.svd(symbol, compute_uv=False).max()
    np.testing.assert_allclose(oj.operator_norm(jnp.block([[re, im], [-im, re]]), (8, 8)), truth, rtol=1e-5)


def test_there_are_enough_of_them():
    assert len(CALLS) + len(KERNELS) >= 70


def test_numpy_integers_and_lists_are_fine():
    conv = oj.Conv([np.int64(8), 8], strides=[2, np.int32(1)], padding=[1, (0, 1)])
    assert conv == oj.Conv((8, 8), strides=(2, 1), padding=((1, 1), (0, 1))) and hash(conv)
    assert jax.tree.leaves(conv) == [conv]
