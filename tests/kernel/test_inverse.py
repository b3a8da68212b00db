"""log_abs_det and solve against the dense float64 matrix: NumPy's slogdet and solve, and finite differences."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from conftest import THOROUGH

import opnorm_jax as oj
from opnorm_jax._geometry import resolve

CIRCULAR = {"padding": "CIRCULAR"}
# name: (input shape, taps, inputs per group, outputs, options); square layers
LAYERS = {
    "3x3": ((6, 5), (3, 3), 2, 2, CIRCULAR),
    "one channel": ((6, 4), (3, 3), 1, 1, CIRCULAR),
    "depthwise": ((6, 5), (3, 3), 1, 4, CIRCULAR | {"feature_group_count": 4}),
    "groups": ((6,), (3,), 2, 4, CIRCULAR | {"feature_group_count": 2, "kernel_dilation": 2}),
    "even kernel": ((5, 6), (2, 4), 2, 2, CIRCULAR),
    "larger than the image": ((3, 3), (5, 5), 2, 2, CIRCULAR),
    "three axes": ((4, 3, 2), (3, 2, 1), 2, 2, CIRCULAR),
    "one axis of one tap": ((6, 6), (3, 1), 3, 3, CIRCULAR),
    "dilated": ((6, 7), (3, 2), 2, 2, CIRCULAR | {"kernel_dilation": (2, 3)}),
    "stride": ((6, 4), (3, 3), 2, 8, CIRCULAR | {"strides": 2}),
    "stride on one axis": ((4, 6), (3, 3), 2, 4, CIRCULAR | {"strides": (1, 2)}),
    "stride, groups": ((4, 6), (3, 3), 1, 8, CIRCULAR | {"strides": 2, "feature_group_count": 2}),
    "patches": ((6, 4), (2, 2), 2, 8, {"strides": 2, "padding": "VALID"}),
    "circular patches": ((6, 4), (2, 2), 2, 8, CIRCULAR | {"strides": 2}),
    "1x1": ((6, 4), (1, 1), 3, 3, {"padding": "SAME"}),
    "transposed": ((6, 4), (3, 3), 8, 2, CIRCULAR | {"input_dilation": 2}),
    "transposed, no overlap": ((6, 4), (2, 2), 8, 2, CIRCULAR | {"input_dilation": 2}),
    "strided and transposed": ((6, 8), (4, 3), 4, 4, CIRCULAR | {"strides": 2, "input_dilation": 2}),
}


def make(name, dtype=np.float64, seed=0):
    """A layer's Conv, a random kernel, the dense matrix and the shape of the output."""
    shape, taps, i, o, options = LAYERS[name]
    conv = oj.Conv(shape, **options)
    kernel = np.random.default_rng(seed).standard_normal((*taps, i, o)).astype(dtype)
    geometry = {field: getattr(conv, field) for field in ("strides", "input_dilation", "kernel_dilation")}
    geometry |= {"padding": conv.padding, "feature_group_count": conv.feature_group_count}
    matrix = oracle.dense_matrix(kernel, shape, **geometry)
    return conv, jnp.asarray(kernel), matrix, (*resolve(conv, kernel.shape).output_shape, o)


@pytest.mark.parametrize("name", LAYERS)
def test_determinant_and_inverse_are_exact(name, x64):
    conv, kernel, matrix, output = make(name)
    np.testing.assert_allclose(oj.log_abs_det(kernel, conv), np.linalg.slogdet(matrix)[1], rtol=1e-11, atol=1e-11)
    y = np.random.default_rng(1).standard_normal((2, *output))
    x = oj.solve(kernel, conv, jnp.asarray(y))
    expected = np.linalg.solve(matrix, y.reshape(2, -1).T).T
    np.testing.assert_allclose(x, expected.reshape(x.shape), atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(200 if THOROUGH else 20))
def test_random_layers(seed, x64):
    """Geometries at random, until one is square; several batch axes."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    strides = rng.integers(1, 3, rank)
    dilation = rng.integers(1, 3, rank) if rng.random() < 0.4 else np.ones(rank, int)
    shape = tuple(int(n * s) for n, s in zip(rng.integers(1, 5 if rank < 3 else 3, rank), strides))
    taps = tuple(int(k) for k in rng.integers(1, 5, rank))
    groups, share = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    # as many outputs as inputs: pixels grow by prod(dilation / strides)
    i, o = share * int(np.prod(dilation)), share * int(np.prod(strides)) * groups
    conv = oj.Conv(
        shape,
        strides=strides.tolist(),
        padding="CIRCULAR",
        input_dilation=dilation.tolist(),
        kernel_dilation=rng.integers(1, 3, rank).tolist(),
        feature_group_count=groups,
    )
    kernel = rng.standard_normal((*taps, i, o))
    options = {"strides": conv.strides, "input_dilation": conv.input_dilation, "kernel_dilation": conv.kernel_dilation}
    matrix = oracle.dense_matrix(kernel, shape, padding="CIRCULAR", feature_group_count=groups, **options)
    condition = np.linalg.cond(matrix)
    got = oj.log_abs_det(jnp.asarray(kernel), conv)
    if condition > 1e12:  # taps at one stride only reach some of the pixels
        assert np.isneginf(got) or condition < 1e16
        return
    np.testing.assert_allclose(got, np.linalg.slogdet(matrix)[1], rtol=1e-9, atol=1e-9)
    x = rng.standard_normal((2, 3, *shape, i * groups))
    y = (x.reshape(6, -1) @ matrix.T).reshape(2, 3, *resolve(conv, kernel.shape).output_shape, o)
    np.testing.assert_allclose(oj.solve(jnp.asarray(kernel), conv, jnp.asarray(y)), x, atol=1e-13 * condition)


def test_dense_layers(x64):
    matrix = jax.random.normal(jax.random.key(0), (4, 4))
    np.testing.assert_allclose(oj.log_abs_det(matrix, oj.Conv(())), np.linalg.slogdet(matrix)[1], rtol=1e-12)
    y = jax.random.normal(jax.random.key(1), (3, 4))
    np.testing.assert_allclose(oj.solve(matrix, oj.Conv(()), y) @ matrix, y, atol=1e-12)
    np.testing.assert_allclose(oj.singular_values(matrix, oj.Conv(())), np.linalg.svd(matrix)[1], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["3x3", "stride", "transposed"])
def test_derivatives_of_both_orders(name, x64):
    conv, kernel, _, output = make(name)
    y = jnp.asarray(np.random.default_rng(1).standard_normal(output))
    kernel, _ = oj.clip_singular_values(
        kernel, conv, 0.5, 1.5, iterations=50
    )  # differences need small condition numbers
    check = functools.partial(jax.test_util.check_grads, order=2, rtol=1e-4, atol=1e-4)
    check(lambda kernel: oj.log_abs_det(kernel, conv) / 10, (kernel,))
    check(lambda kernel, y: jnp.tanh(oj.solve(kernel, conv, y)), (kernel, y), modes=["rev"])


def test_the_gradient_is_the_inverse_transposed(x64):
    """The formula of the literature, by hand: the sum over frequencies of the inverse's phases."""
    conv, kernel, matrix, _ = make("3x3")
    gradient = jax.grad(lambda kernel: oj.log_abs_det(kernel, conv))(kernel)
    inverse = np.linalg.inv(matrix)
    unit = np.zeros(kernel.shape)
    for index in ((0, 0, 0, 1), (2, 1, 1, 1)):
        unit[index] = 1
        expected = np.trace(inverse @ oracle.dense_matrix(unit, conv.input_shape))
        np.testing.assert_allclose(gradient[index], expected, rtol=1e-9)
        unit[index] = 0


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [2**10, 2**28])
def test_chunks_and_transformations_change_nothing(chunk_bytes):
    conv = oj.Conv((7, 6), padding="CIRCULAR")
    kernels = jax.random.normal(jax.random.key(0), (3, 3, 3, 4, 4))
    y = jax.random.normal(jax.random.key(1), (3, 2, 7, 6, 4))
    execution = oj.Execution(chunk_bytes=chunk_bytes)
    determinant = functools.partial(oj.log_abs_det, conv=conv, execution=execution)
    solve = lambda kernel, y: oj.solve(kernel, conv, y, execution=execution)
    one_by_one = jnp.stack([determinant(kernel) for kernel in kernels])
    np.testing.assert_allclose(jax.jit(jax.vmap(determinant))(kernels), one_by_one, rtol=1e-6)
    solutions = jnp.stack([solve(*pair) for pair in zip(kernels, y)])
    np.testing.assert_allclose(jax.jit(jax.vmap(solve))(kernels, y), solutions, rtol=1e-3, atol=1e-4)
    gradients = jax.vmap(jax.grad(determinant))(kernels)
    np.testing.assert_allclose(gradients[1], jax.grad(determinant)(kernels[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["HWIO", "OIHW", "IHOW"])
def test_layouts(layout):
    conv, kernel, _, output = make("stride", np.float32)
    given = kernel.transpose(["HWIO".index(letter) for letter in layout])
    conv_given = oj.Conv((6, 4), strides=2, padding="CIRCULAR", kernel_layout=layout)
    y = jax.random.normal(jax.random.key(1), output)
    np.testing.assert_array_equal(oj.log_abs_det(given, conv_given), oj.log_abs_det(kernel, conv))
    np.testing.assert_array_equal(oj.solve(given, conv_given, y), oj.solve(kernel, conv, y))


def test_dtypes_and_extreme_scales():
    conv, kernel, matrix, output = make("3x3", np.float32)
    for scale in (1e-30, 1.0, 1e30):
        expected = np.linalg.slogdet(matrix.astype(np.float64) * scale)[1]
        np.testing.assert_allclose(oj.log_abs_det(kernel * scale, conv), expected, rtol=1e-5)
    y = jnp.ones(output, jnp.bfloat16)
    chex.assert_type(oj.solve(kernel, conv, y), jnp.bfloat16)
    chex.assert_type(oj.log_abs_det(kernel.astype(jnp.bfloat16), conv), jnp.float32)


def test_singular_layers_have_no_inverse(x64):
    difference = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2)).at[1, 2].set(-jnp.eye(2))  # its values sum to zero
    mean = jnp.full((2, 2, 1, 1), 0.25)
    hidden = jnp.zeros((3, 1, 1, 1)).at[:, 0, 0, 0].set(jnp.array([1.0, -2 * np.cos(2 * np.pi / 7), 1.0]))
    for kernel, shape in ((difference, (5, 4)), (mean, (4, 4)), (hidden, (7, 3)), (0 * mean, (4, 4))):
        assert oj.log_abs_det(kernel, shape) == -jnp.inf
        assert jnp.isnan(oj.solve(kernel, shape, jnp.ones((*shape, kernel.shape[-1])))).all()
    # nearly singular, but for certain not: rows of very different size
    small = jnp.diag(jnp.array([1.0, 1e-13, 1e-200]))[None, None]
    np.testing.assert_allclose(oj.log_abs_det(small, (2, 3)), 6 * np.log(1e-213), rtol=1e-12)
    np.testing.assert_allclose(oj.solve(small, (2, 3), jnp.ones((2, 3, 3)))[0, 0], [1, 1e13, 1e200], rtol=1e-12)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_not_a_number_is_told(bad):
    conv, kernel, _, output = make("3x3", np.float32)
    kernel, y = kernel.at[0, 0, 0, 0].set(bad), jnp.ones(output)
    assert jnp.isnan(oj.log_abs_det(kernel, conv))
    assert jnp.isnan(oj.solve(kernel, conv, y)).all()
    assert jnp.isnan(oj.solve(jnp.ones_like(kernel), conv, y.at[0].set(bad))).all()


K = jnp.ones((3, 3, 2, 2))
WRONG = {
    "zero padding": (lambda: oj.log_abs_det(K, oj.Conv((4, 4))), "circular convolution whose strides divide"),
    "stride does not divide": (
        lambda: oj.log_abs_det(K, oj.Conv((5, 5), strides=2, padding="CIRCULAR")),
        "circular convolution whose strides divide",
    ),
    "not square": (lambda: oj.log_abs_det(jnp.ones((3, 3, 2, 3)), (4, 4)), "32 inputs .* and 48 outputs"),
    "stride": (lambda: oj.log_abs_det(K, oj.Conv((4, 4), strides=2, padding="CIRCULAR")), "32 inputs .* and 8 outputs"),
    "shape of y": (lambda: oj.solve(K, (4, 4), jnp.ones((4, 5, 2))), r"\(\*batch, 4, 4, 2\).*got \(4, 5, 2\)"),
    "channels first": (lambda: oj.solve(K, (4, 4), jnp.ones((2, 4, 4))), "channels last"),
    "no y": (lambda: oj.solve(K, (4, 4), None), "expected y to be an array, got NoneType"),
    "integers": (lambda: oj.solve(K, (4, 4), jnp.ones((4, 4, 2), int)), "y to have a real floating dtype, got int"),
    "products": (
        lambda: oj.log_abs_det(K, (4, 4), execution=oj.Execution(factorization="products")),
        "got 'products': log_abs_det takes factorisations",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
