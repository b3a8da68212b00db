"""Second derivatives in float64 against central differences of gradients from dense SVDs by NumPy; or an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import opnorm_jax as oj

SHAPE = (3, 3, 2, 3)
SIZE = (5, 6)
SAME = oj.Conv(SIZE)
rng = np.random.default_rng(0)
KERNEL, FIRST, SECOND = rng.standard_normal((3, *SHAPE))


@functools.cache
def basis(shape, size, **options):
    """The layer's matrix for each entry of the kernel alone."""
    entries = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.stack([oracle.dense_matrix(entry, size, **options) for entry in entries])


def dense_norm(kernel, size=SIZE, **options):
    """The norm and its gradient."""
    maps = basis(kernel.shape, size, **options)
    left, values, right = np.linalg.svd(np.tensordot(kernel.ravel(), maps, 1))
    return values[0], np.einsum("kab,a,b->k", maps, left[:, 0], right[0]).reshape(kernel.shape)


def dense_penalty(kernel, **options):
    norm, gradient = dense_norm(kernel, **options)
    return 2 * (norm - 1) * gradient


def dense_rescaled(kernel):
    """The gradient of the sum of cubes of k c / |k|, c = 1."""
    norm, gradient = dense_norm(kernel)
    cubes = np.sum(kernel**3)
    return 3 * kernel**2 / norm**3 - 3 * cubes / norm**4 * gradient


def dense_cubes(kernel):
    """The gradient of the sum of the cubes of all singular values."""
    maps = basis(kernel.shape, SIZE)
    left, values, right = np.linalg.svd(np.tensordot(kernel.ravel(), maps, 1), full_matrices=False)
    return 3 * np.einsum("kab,as,s,sb->k", maps, left, values**2, right).reshape(kernel.shape)


def difference(gradient, direction, step=1e-5):
    return (gradient(KERNEL + step * direction) - gradient(KERNEL - step * direction)) / (2 * step)


squared = lambda function: lambda kernel: (function(kernel) - 1) ** 2
STRIDED = oj.Conv((6, 6), strides=2)
CASES = {  # function, the gradient by NumPy
    "norm, circular": (squared(lambda k: oj.operator_norm(k, SIZE)), dense_penalty),
    "norm, SAME": (squared(lambda k: oj.operator_norm(k, SAME)), functools.partial(dense_penalty, padding="SAME")),
    "norm, SAME, stride 2": (
        squared(lambda k: oj.operator_norm(k, STRIDED)),
        functools.partial(dense_penalty, size=(6, 6), padding="SAME", strides=(2, 2)),
    ),
    "lower bound": (
        squared(lambda k: oj.operator_norm_bounds(k, SAME).lower),
        functools.partial(dense_penalty, padding="SAME"),
    ),
    "upper bound": (squared(lambda k: oj.operator_norm_bounds(k, SIZE).upper), dense_penalty),
    "rescale": (lambda k: jnp.sum(oj.rescale_operator_norm(k, SIZE, 1.0) ** 3), dense_rescaled),
    "singular values": (lambda k: jnp.sum(oj.singular_values(k, SIZE) ** 3), dense_cubes),
    "norm, by products": (
        squared(lambda k: oj.operator_norm(k, SIZE, execution=oj.Execution(factorization="products"))),
        dense_penalty,
    ),
}
NESTINGS = {
    "forward over reverse": lambda f, k, v: jax.jvp(jax.grad(f), (k,), (v,))[1],
    "reverse over forward": lambda f, k, v: jax.grad(lambda k: jax.jvp(f, (k,), (v,))[1])(k),
    "reverse over reverse": lambda f, k, v: jax.grad(lambda k: jnp.vdot(jax.grad(f)(k), v))(k),
    "under vmap": lambda f, k, v: jax.vmap(lambda k, v: jax.jvp(jax.grad(f), (k,), (v,))[1])(
        jnp.stack([2 * k, k]), jnp.stack([2 * v, v])
    )[1],
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_products(name, nesting, x64):
    if nesting not in ("forward over reverse", "reverse over forward") and name not in ("norm, circular", "norm, SAME"):
        pytest.skip("the nestings are tested with the norms")
    function, gradient = CASES[name]
    want = difference(gradient, FIRST)
    found = jax.jit(functools.partial(NESTINGS[nesting], function))(jnp.asarray(KERNEL), jnp.asarray(FIRST))
    np.testing.assert_allclose(found, want, atol=2e-6 * np.abs(want).max())


def test_the_bound_for_every_size(x64):
    """Its grid is its own: against differences of its own first derivative, which other tests compare with the truth."""
    function = lambda k: oj.operator_norm_upper_bound(k, slack=0.1) ** 2
    want = difference(jax.jit(jax.grad(function)), FIRST)
    found = jax.jit(lambda k: jax.jvp(jax.grad(function), (k,), (jnp.asarray(FIRST),))[1])(jnp.asarray(KERNEL))
    np.testing.assert_allclose(found, want, atol=1e-6 * np.abs(want).max())


def test_hessian_of_a_penalty(x64):
    """By jax.hessian: symmetric, and right along two directions; zero inside the ball."""
    penalty = lambda k: jax.nn.relu(oj.operator_norm(k, SIZE) - 1) ** 2
    hessian = jax.jit(jax.hessian(penalty))(jnp.asarray(KERNEL)).reshape(2 * (KERNEL.size,))
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-9 * np.abs(hessian).max())
    want = difference(dense_penalty, FIRST).ravel()
    np.testing.assert_allclose(hessian @ FIRST.ravel(), want, atol=2e-6 * np.abs(want).max())
    assert (jax.hessian(penalty)(jnp.asarray(KERNEL / 100)) == 0).all()


def test_a_mirrored_frequency_is_no_tie(x64):
    """omega and -omega have the same value for every real kernel: here the largest is at such a pair."""
    kernel = np.zeros((3, 1, 1))
    kernel[:, 0, 0] = -1.0, 0.3, -0.8
    size = (5,)
    function = squared(lambda k: oj.operator_norm(k, size))
    at = lambda k: dense_penalty(k, size=size)
    step, direction = 1e-5, np.ones((3, 1, 1)) * np.array([1.0, -2.0, 0.5])[:, None, None]
    want = [_pair(kernel + sign * step * direction) for sign in (1, -1)]
    found = jax.jvp(jax.grad(function), (jnp.asarray(kernel),), (jnp.asarray(direction),))[1]
    np.testing.assert_allclose(found, (want[0] - want[1]) / (2 * step), atol=1e-6 * np.abs(found).max())
    np.testing.assert_allclose(jax.grad(function)(jnp.asarray(kernel)), _pair(kernel), atol=1e-9)
    assert np.isfinite(at(kernel)).all()


def _pair(kernel):
    """The gradient of (max |F| - 1)² on five points, by hand."""
    taps = kernel.ravel()
    phases = np.exp(2j * np.pi * np.outer(np.arange(5), np.arange(3)) / 5)
    symbol = phases @ taps
    at = np.argmax(np.abs(symbol))
    slope = (phases[at].conj() * symbol[at]).real / np.abs(symbol[at])
    return (2 * (np.abs(symbol[at]) - 1) * slope).reshape(kernel.shape)


@pytest.mark.parametrize("conv", [SIZE, SAME], ids=["circular", "SAME"])
def test_never_a_wrong_number_at_ties(conv, x64):
    """Two equal channels: the top value is twice there, and the norm has no second derivative."""
    kernel = np.zeros((3, 3, 2, 2))
    kernel[..., 0, 0] = kernel[..., 1, 1] = rng.standard_normal((3, 3))
    norm = lambda k: oj.operator_norm(k, conv)
    direction = jnp.asarray(rng.standard_normal(kernel.shape))
    assert np.isfinite(jax.grad(norm)(jnp.asarray(kernel))).all()
    assert np.isnan(jax.jvp(jax.grad(norm), (jnp.asarray(kernel),), (direction,))[1]).any()


@pytest.mark.parametrize("conv", [SIZE, SAME], ids=["circular", "SAME"])
def test_the_zero_kernel(conv, x64):
    """The gradient is zero there by convention; a second derivative, where there is none, is no finite lie."""
    norm = lambda k: oj.operator_norm(k, conv)
    zero = jnp.zeros(SHAPE)
    assert (jax.grad(norm)(zero) == 0).all()
    second = jax.jvp(jax.grad(norm), (zero,), (jnp.asarray(FIRST),))[1]
    assert ((second == 0) | np.isnan(second)).all()


REFUSED = {
    "clip": (
        lambda k: jnp.sum(oj.clip_operator_norm(k, SIZE, 2.0) ** 3),
        "clip_operator_norm has no second deriv.*resc",
    ),
    "project": (lambda k: jnp.sum(oj.project_operator_norm(k, SIZE, 2.0)), "project_operator_norm has no derivative"),
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, nesting):
    function, message = REFUSED[name]
    for wrapped in (function, jax.jit(function)):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(functools.partial(NESTINGS[nesting], wrapped), *jnp.asarray([KERNEL, FIRST], jnp.float32))


@pytest.mark.parametrize("conv", [SIZE, SAME], ids=["circular", "SAME"])
def test_third_derivatives_are_refused(conv):
    norm = lambda k: oj.operator_norm(k, conv)
    third = jax.grad(lambda k: jnp.sum(jax.grad(lambda k: jnp.sum(jax.grad(norm)(k) ** 2))(k)))
    with pytest.raises(NotImplementedError, match="no third derivative"):
        jax.eval_shape(third, jnp.asarray(KERNEL, jnp.float32))
