"""singular_values and operator_norm of circular convolutions, against the dense float64 matrix."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from conftest import THOROUGH
from geometries import generate
from hypothesis import given
from hypothesis import strategies as st

import opnorm_jax as oj

# name: (input shape, kernel shape HWIO); plain circular, stride 1
PLAIN = {
    "1x1": ((4, 4), (1, 1, 3, 3)),
    "1x1 wide": ((4, 4), (1, 1, 2, 5)),
    "1x1 tall": ((4, 4), (1, 1, 5, 2)),
    "one pixel": ((1, 1), (3, 3, 2, 2)),
    "one row": ((1, 6), (3, 3, 2, 3)),
    "one column": ((6, 1), (3, 3, 3, 2)),
    "3x3 square": ((6, 6), (3, 3, 3, 3)),
    "3x3 i<o": ((6, 6), (3, 3, 2, 5)),
    "3x3 i>o": ((6, 6), (3, 3, 5, 2)),
    "3x3 odd image": ((5, 7), (3, 3, 2, 2)),
    "3x3 tall image": ((9, 4), (3, 3, 2, 3)),
    "3x3 wide image": ((4, 9), (3, 3, 3, 2)),
    "3x3 exact fit": ((3, 3), (3, 3, 2, 2)),
    "3x3 prime image": ((7, 11), (3, 3, 2, 2)),
    "2x2 even": ((6, 6), (2, 2, 3, 3)),
    "4x4 even": ((6, 6), (4, 4, 2, 2)),
    "2x2 odd image": ((5, 5), (2, 2, 2, 3)),
    "4x2": ((6, 5), (4, 2, 2, 2)),
    "2x3 of the authors": ((8, 8), (2, 3, 2, 3)),
    "3x4 of the authors": ((8, 8), (3, 4, 3, 4)),
    "1x5": ((6, 8), (1, 5, 2, 2)),
    "5x1": ((8, 6), (5, 1, 2, 2)),
    "5x5": ((8, 8), (5, 5, 2, 2)),
    "7x7": ((9, 9), (7, 7, 1, 2)),
    "larger than the image": ((3, 3), (5, 5, 2, 2)),
    "much larger than the image": ((2, 3), (7, 8, 2, 3)),
    "larger one way": ((2, 8), (5, 3, 2, 2)),
    "even, larger": ((3, 3), (4, 4, 2, 2)),
    "twice the image": ((4, 4), (8, 8, 1, 2)),
    "one channel": ((6, 6), (3, 3, 1, 1)),
    "one in": ((6, 6), (3, 3, 1, 4)),
    "one out": ((6, 6), (3, 3, 4, 1)),
    "one channel, even": ((6, 4), (2, 4, 1, 1)),
    "two pixels": ((2, 2), (3, 3, 2, 2)),
    "16 channels": ((4, 4), (3, 3, 16, 16)),
    "8 to 24": ((4, 4), (3, 3, 8, 24)),
    "24 to 8": ((4, 4), (3, 3, 24, 8)),
    "11x11": ((12, 12), (11, 11, 1, 2)),
    "long": ((2, 32), (3, 3, 2, 2)),
    "1-D": ((9,), (3, 2, 3)),
    "1-D even": ((8,), (4, 3, 2)),
    "1-D larger": ((3,), (5, 2, 2)),
    "3-D": ((3, 4, 5), (2, 3, 3, 2, 2)),
    "3-D larger": ((2, 2, 3), (3, 3, 3, 1, 2)),
}


def descending(values):
    return np.sort(np.ravel(values))[::-1]


def check(values, want, tolerance):
    """All values, to ``tolerance`` of the largest. A rank-deficient matrix may list further zeros."""
    values, length = descending(values), max(np.size(values), len(want))
    pad = lambda a: np.pad(np.asarray(a, np.float64), (0, length - len(a)))
    np.testing.assert_allclose(pad(values), pad(want), atol=tolerance * want[0], rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_against_dense_float32(name):
    shape, kernel_shape = PLAIN[name]
    kernel = np.random.default_rng(0).standard_normal(kernel_shape).astype(np.float32)
    values = jax.jit(functools.partial(oj.singular_values, conv=shape))(kernel)
    assert values.shape == (*shape, min(kernel_shape[-2:])) and values.dtype == jnp.float32
    want = oracle.dense_singular_values(kernel, shape)
    check(values, want, 1e-5)
    np.testing.assert_allclose(oj.operator_norm(kernel, shape), want[0], rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_against_dense_float64(name, x64):
    shape, kernel_shape = PLAIN[name]
    kernel = np.random.default_rng(0).standard_normal(kernel_shape)
    values = jax.jit(functools.partial(oj.singular_values, conv=shape))(kernel)
    assert values.dtype == jnp.float64
    check(values, oracle.dense_singular_values(kernel, shape), 1e-12)


@pytest.mark.parametrize("seed", range(300 if THOROUGH else 30))
def test_every_circular_geometry(seed, x64):
    geometry = generate(seed, exact=True)
    canonical, kernels = geometry.kernels(np.random.default_rng(seed), 2, np.float64)
    f = jax.jit(lambda kernel: oj.singular_values(kernel, geometry.conv))
    for k, kernel in zip(canonical, kernels):
        check(f(kernel), geometry.oracle(k), 1e-11)
        check(f(kernel.astype(np.float32)), geometry.oracle(k.astype(np.float32)), 1e-5)


@pytest.mark.slow
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2**31),
)
def test_hypothesis_sweep(shape, kernel_shape, seed):
    kernel = np.random.default_rng(seed).standard_normal(kernel_shape).astype(np.float32)
    check(
        jax.jit(oj.singular_values, static_argnums=1)(kernel, shape), oracle.dense_singular_values(kernel, shape), 1e-5
    )


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("c", [1, 4])
def test_all_ones(k, c):
    np.testing.assert_allclose(oj.operator_norm(jnp.ones((k, k, c, c)), (8, 8)), c * k * k, rtol=1e-6)


def test_identity_kernel_has_all_ones():
    kernel = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    np.testing.assert_allclose(oj.singular_values(kernel, (6, 5)), np.ones((6, 5, 4)), rtol=1e-6)


def test_same_array_as_the_paper():
    """Frequency by frequency, not only as a set."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(
        oj.singular_values(kernel, (5, 6)), oracle.paper_singular_values(kernel, (5, 6)), atol=1e-5
    )


@pytest.mark.parametrize("layout", ["HWIO", "OIHW", "HWOI", "IOHW", "OHWI", "WHIO"])
def test_layouts(layout):
    kernel = np.random.default_rng(0).standard_normal((3, 2, 2, 4)).astype(np.float32)
    moved = kernel.transpose(["HWIO".index(letter) for letter in layout])
    got = oj.singular_values(moved, oj.Conv((5, 6), kernel_layout=layout, padding="CIRCULAR"))
    np.testing.assert_allclose(got, oj.singular_values(kernel, (5, 6)), atol=1e-5)


@pytest.mark.slow
def test_chunks_do_not_matter():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 4, 5)).astype(np.float32)
    whole = oj.singular_values(kernel, (6, 7))
    for chunk_bytes in (1, 1000, 3000):
        execution = oj.Execution(chunk_bytes=chunk_bytes)
        np.testing.assert_allclose(oj.singular_values(kernel, (6, 7), execution=execution), whole, atol=1e-5)
        np.testing.assert_allclose(oj.operator_norm(kernel, (6, 7), execution=execution), whole.max(), rtol=1e-6)


@pytest.mark.slow
def test_vmap_is_a_loop_and_jit_changes_nothing():
    kernels = jax.random.normal(jax.random.key(0), (3, 3, 3, 2, 4))
    for f in (oj.singular_values, oj.operator_norm):
        f = functools.partial(f, conv=(5, 4))
        loop = jnp.stack([f(kernel) for kernel in kernels])
        chex.assert_trees_all_close(jax.vmap(f)(kernels), loop, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(jax.jit(jax.vmap(f))(kernels), loop, rtol=1e-5, atol=1e-5)
        nested = jax.vmap(jax.vmap(f))(kernels[None])
        chex.assert_trees_all_close(nested[0], loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype):
    kernel = jnp.ones((3, 3, 2, 2), dtype)
    for f in (oj.singular_values, oj.operator_norm):
        out = f(kernel, (4, 4))
        assert out.dtype == jnp.float32 and not out.weak_type
        np.testing.assert_allclose(out.max(), 18, rtol=1e-5)


@pytest.mark.parametrize("exponent", [-33, -30, -10, 10, 30, 36])
def test_scale_free(exponent):
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3)).astype(np.float32)
    scaled = (kernel.astype(np.float64) * 10.0**exponent).astype(np.float32)
    want = oracle.dense_singular_values(scaled, (4, 4))[0]
    np.testing.assert_allclose(oj.operator_norm(scaled, (4, 4)), want, rtol=1e-5)
    depthwise = oj.Conv((4, 4), feature_group_count=3, padding="CIRCULAR")
    assert np.isfinite(oj.singular_values(scaled[:, :, :1], depthwise)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_gives_nan(value):
    kernel = jnp.ones((3, 3, 2, 2)).at[0, 0, 0, 0].set(value)
    assert np.isnan(jax.jit(lambda k: oj.operator_norm(k, (4, 4)))(kernel))


@pytest.mark.slow
def test_gradients(x64):
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3))
    for conv in (
        oj.Conv((4, 5), padding="CIRCULAR"),
        oj.Conv((4, 6), strides=2, padding="CIRCULAR"),
        oj.Conv((4, 4), kernel_dilation=2, padding="CIRCULAR"),
    ):
        check_first = functools.partial(
            jax.test_util.check_grads, order=1, modes=("fwd", "rev"), eps=1e-6, atol=1e-6, rtol=1e-6
        )
        check_first(jax.jit(lambda k, conv=conv: oj.operator_norm(k, conv)), (kernel,))
        check_first(jax.jit(lambda k, conv=conv: oj.singular_values(k, conv)), (kernel,))
    groups = oj.Conv((4, 4), feature_group_count=2, padding="CIRCULAR")
    check_first(lambda k: oj.operator_norm(k, groups), (np.random.default_rng(0).standard_normal((3, 3, 2, 4)),))


@pytest.mark.slow
def test_gradient_at_ties_and_at_zero():
    identity = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    gradient = jax.grad(lambda k: oj.operator_norm(k, (5, 5)))(identity)
    # A subgradient g of the norm at K: <g, K> = |K|, and its own dual norm is 1, so |g|_F <= 1 on a torus.
    np.testing.assert_allclose(jnp.sum(gradient * identity), 1, rtol=1e-5)
    zero = jnp.zeros((3, 3, 2, 2))
    for mode in (jax.grad, jax.jacfwd):
        assert (mode(lambda k: oj.operator_norm(k, (5, 5)))(zero) == 0).all()
        assert jnp.isfinite(mode(lambda k: oj.singular_values(k, (3, 3)).sum())(zero)).all()
    batch = jax.vmap(jax.grad(lambda k: oj.operator_norm(k, (5, 5))))(jnp.stack([identity, identity * 0]))
    np.testing.assert_allclose(batch[0], gradient, atol=1e-6)
    assert (batch[1] == 0).all()


def test_depthwise_and_vectors_need_no_factorisation():
    for kernel_shape, conv in (
        ((3, 3, 1, 6), oj.Conv((8, 8), feature_group_count=6, padding="CIRCULAR")),
        ((3, 3, 4, 1), oj.Conv((8, 8), padding="CIRCULAR")),
    ):
        text = str(jax.make_jaxpr(lambda k, conv=conv: oj.singular_values(k, conv))(jnp.ones(kernel_shape)))
        assert "svd" not in text and "eigh" not in text
    assert "svd" in str(jax.make_jaxpr(lambda k: oj.singular_values(k, (8, 8)))(jnp.ones((3, 3, 5, 5))))


def test_no_fft_anywhere():
    text = str(jax.make_jaxpr(lambda k: oj.clip_operator_norm(k, (8, 8), 1.0))(jnp.ones((3, 3, 2, 2))))
    assert "fft" not in text


@pytest.mark.parametrize(
    "shape, conv, distinct",
    [
        ((1, 1, 6, 5), oj.Conv((9, 8), padding="CIRCULAR"), 1),
        ((1, 3, 6, 5), oj.Conv((9, 8), padding="CIRCULAR"), 5),  # half of 1 x 8
        ((3, 3, 6, 5), oj.Conv((8, 8), kernel_dilation=2, padding="CIRCULAR"), 10),  # half of 4 x 4
        ((3, 3, 6, 5), oj.Conv((9, 12), kernel_dilation=(2, 8), padding="CIRCULAR"), 14),  # half of 9 x 3
        ((2, 2, 6, 5), oj.Conv((8, 8), strides=2, padding="CIRCULAR"), 1),
        ((3, 6, 5), oj.Conv((12,), kernel_dilation=4, padding="CIRCULAR"), 2),  # three taps on three points
        ((4, 6, 5), oj.Conv((12,), kernel_dilation=4, padding="CIRCULAR"), 2),  # folded
        ((2, 2, 6, 5), oj.Conv((4, 5), input_dilation=2, padding="CIRCULAR"), 1),
        (
            (4, 4, 6, 5),
            oj.Conv((4, 5), input_dilation=2, padding="CIRCULAR"),
            11,
        ),  # half of 4 x 5: nothing repeats itself
    ],
    ids=str,
)
def test_frequencies_that_repeat_one_another_are_taken_once(shape, conv, distinct, x64):
    """Where each stands is right too: at each grid point, the values of that point's block."""
    kernel = np.random.default_rng(0).standard_normal(shape)
    values = oj.singular_values(kernel, conv)
    options = {name: getattr(conv, name) for name in ("strides", "input_dilation", "kernel_dilation")}
    dense = oracle.dense_singular_values(kernel, conv.input_shape, **options)
    found = np.sort(np.ravel(values))[::-1]
    np.testing.assert_allclose(found[: len(dense)], dense, atol=1e-12 * dense[0])
    if set(conv.strides + conv.input_dilation) == {1}:
        for at in np.ndindex(conv.input_shape):
            taps = np.indices(shape[:-2]).reshape(len(at), -1).T * conv.kernel_dilation
            phase = np.exp(2j * np.pi * taps @ (np.array(at) / conv.input_shape)).reshape(*shape[:-2], 1, 1)
            block = np.sum(phase * kernel, axis=tuple(range(len(at))))
            np.testing.assert_allclose(values[at], np.linalg.svd(block, compute_uv=False), atol=1e-12 * dense[0])
    for function in (oj.singular_values, functools.partial(oj.clip_operator_norm, max_norm=0.5 * float(dense[0]))):
        program = str(jax.make_jaxpr(functools.partial(function, conv=conv))(kernel))
        assert max(map(int, re.findall(r"c128\[(\d+),\d+,\d+\]", program))) == distinct
