"""steepest_direction: certified steps, and duality gaps that are true."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import THOROUGH
from geometries import generate

import opnorm_jax as oj
from opnorm_jax._rounding import rounding


def norm(kernel, conv):
    return float(oj.operator_norm_bounds(kernel, conv).upper)


def gradients(seed, shape=(3, 3, 8, 8)):
    """A Gaussian gradient, and one of low rank."""
    rng = np.random.default_rng(seed)
    k1, k2, i, o = shape
    low = np.einsum("abr,ri,ro->abio", *(rng.standard_normal(s) for s in ((k1, k2, 2), (2, i), (2, o))))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32), jnp.asarray(low, jnp.float32)


def flattened(gradient):
    left, _, right = np.linalg.svd(
        np.asarray(gradient, np.float64).reshape(-1, gradient.shape[-1]), full_matrices=False
    )
    return jnp.asarray((left @ right).reshape(gradient.shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize("kind", [0, 1])
def test_descent_beats_what_muon_does_to_the_flattened_kernel(kind, padding):
    conv = oj.Conv((10, 10), padding=padding)
    gradient = gradients(3)[kind]
    best = oj.steepest_direction(gradient, conv, exact=True)
    cheap = oj.steepest_direction(gradient, conv)
    descent = lambda x: float(jnp.sum(gradient * x)) / norm(x, conv)
    assert descent(best.direction) == pytest.approx(float(best.descent), rel=1e-4)
    assert best.gap < 0.15 * best.descent
    assert cheap.descent >= 0.85 * best.descent
    assert cheap.gap == np.inf
    # ours, then Muon's on the flattened kernel, then the gradient itself
    assert best.descent > 1.2 * max(descent(flattened(gradient)), descent(gradient))
    assert cheap.descent > 1.05 * max(descent(flattened(gradient)), descent(gradient))


@pytest.mark.parametrize("seed", range(100 if THOROUGH else 8))
def test_the_step_is_certified_and_the_gap_is_true(seed):
    """In any geometry: the dense norm is at most 1, and no other kernel of norm 1 has more than descent + gap."""
    geometry = generate(900 + seed)
    rng = np.random.default_rng(seed)
    canonical, given = geometry.kernels(rng, 1)
    one = oj.steepest_direction(jnp.asarray(given[0]), geometry.conv)
    exact = oj.steepest_direction(jnp.asarray(given[0]), geometry.conv, exact=True)
    letters = [{1: "W", 2: "HW", 3: "DHW"}[len(geometry.taps)] + "IO"][0]
    order = [geometry.conv.kernel_layout.index(letter) for letter in letters]
    back = lambda kernel: np.asarray(kernel, np.float64).transpose(order)
    for found in (one, exact):
        assert geometry.oracle(back(found.direction)).max() <= 1 + 1e-5
        assert found.descent == pytest.approx((canonical[0].astype(np.float64) * back(found.direction)).sum(), rel=1e-4)
        assert 0 <= found.gap
    live = back(exact.direction) != 0  # no bound holds for what the layer never uses
    limit = float(exact.descent + exact.gap) * (1 + 1e-4)
    rivals = [one.direction, jnp.asarray(given[0]), *jnp.asarray(geometry.kernels(rng, 4)[1])]
    rivals += [
        oj.project_operator_norm(scale * jnp.asarray(given[0]) / float(one.descent), geometry.conv, 1.0)
        for scale in (3.0, 50.0)
    ]
    conv = geometry.conv
    sizes = zip(geometry.taps, conv.kernel_dilation, conv.input_shape, conv.input_dilation)
    folded = conv.padding == "CIRCULAR" and any(d * (k - 1) >= n * e for k, d, n, e in sizes)
    for rival in rivals[:1] if folded else rivals:  # of folded taps only the sum is used: see test_folded_taps
        rival = jnp.where(live.transpose(np.argsort(order)), rival, 0)
        # of zero padding the ball is that of the circulant embedding
        size = geometry.oracle(back(rival)).max() if geometry.exact else norm(rival, geometry.conv)
        assert size == 0 or abs((canonical[0] * back(rival)).sum()) / size <= limit


@pytest.mark.parametrize("products", [False, True])
def test_the_gap_counts_values_that_are_hidden_by_rounding(products):
    """A dense layer with many tiny values: their sum is part of the dual norm, though their directions are noise."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
    values = np.concatenate([[1.0], np.full(63, 2e-4)])
    gradient = (left * values) @ right.T
    execution = oj.Execution(factorization="products" if products else "auto")
    found = oj.steepest_direction(jnp.asarray(gradient, jnp.float32), oj.Conv(()), execution=execution)
    assert values.sum() <= (found.descent + found.gap) * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_folded_taps(exact, x64):
    """A kernel larger than the circle: what no output sees is neither moved nor counted."""
    conv = oj.Conv((3, 2), padding="CIRCULAR")
    gradient = jax.random.normal(jax.random.key(0), (4, 5, 2, 2))
    found = oj.steepest_direction(gradient, conv, exact=exact)
    matrix = oracle.dense_matrix(found.direction, conv.input_shape)
    assert np.linalg.norm(matrix, 2) <= 1 + 1e-9
    assert jnp.abs(found.direction).max() <= 1  # without the part of the gradient that no bound holds for
    np.testing.assert_allclose(found.direction[0], found.direction[3], atol=1e-9)  # three pixels on
    assert found.descent == pytest.approx(float(jnp.sum(gradient * found.direction)), rel=1e-9)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["dense", "1x1", "full support"])
def test_where_the_support_is_full_it_is_the_matrix_sign(name, exact, x64):
    shape, conv = {
        "dense": ((5, 7), oj.Conv(())),
        "1x1": ((1, 1, 5, 4), oj.Conv((6, 6))),
        "full support": ((4, 5, 2, 3), oj.Conv((4, 5), padding="CIRCULAR")),
    }[name]
    gradient = jax.random.normal(jax.random.key(0), shape)
    found = oj.steepest_direction(gradient, conv, exact=exact)
    dense = (
        (lambda kernel: np.asarray(kernel))
        if name == "dense"
        else functools.partial(oracle.dense_matrix, input_shape=conv.input_shape)
    )
    left, values, right = np.linalg.svd(dense(gradient), full_matrices=False)
    np.testing.assert_allclose(dense(found.direction), left @ right, atol=1e-8)
    pixels = int(np.prod(conv.input_shape))
    assert found.descent == pytest.approx(values.sum() / pixels, rel=1e-8)  # the dual norm
    assert found.gap <= 1e-7 * found.descent


@pytest.mark.slow
def test_extremes():
    conv = oj.Conv((6, 6))
    gradient = gradients(0)[0]
    for exact in (False, True):
        find = functools.partial(oj.steepest_direction, conv=conv, exact=exact)
        assert not find(0 * gradient).direction.any() and find(0 * gradient).gap == 0
        for scale in (1e-30, 1e30):
            np.testing.assert_allclose(find(scale * gradient).direction, find(gradient).direction, atol=1e-3)
        for bad in (jnp.nan, jnp.inf):
            assert jnp.isnan(find(gradient.at[0, 0, 0, 0].set(bad)).direction).all()
        assert find(gradient.astype(jnp.bfloat16)).direction.dtype == jnp.bfloat16
    both = jax.jit(jax.vmap(lambda g: oj.steepest_direction(g, conv).direction))(jnp.stack(gradients(0)))
    np.testing.assert_allclose(both[1], oj.steepest_direction(gradients(0)[1], conv).direction, atol=1e-4)
    products = oj.steepest_direction(gradient, conv, execution=oj.Execution(factorization="products"))
    np.testing.assert_allclose(products.direction, oj.steepest_direction(gradient, conv).direction, atol=1e-3)
    with pytest.raises(NotImplementedError, match="steepest_direction has no derivative"):
        jax.grad(lambda g: oj.steepest_direction(g, conv).direction.sum())(gradient)
    with pytest.raises(TypeError, match="exact to be True or False"):
        oj.steepest_direction(gradient, conv, exact=1)


K = jnp.ones((3, 3, 2, 2))
WRONG = {
    "exact": (lambda: oj.steepest_direction(K, (8, 8), exact=1), "expected exact to be True or False, got 1"),
    "a list": (lambda: oj.steepest_direction([1.0], (8, 8)), r"an array of 4 axes \(HWIO\), got list"),
    "rank": (lambda: oj.steepest_direction(jnp.ones((3, 2, 2)), (8, 8)), r"4 axes .*got kernel.shape=\(3, 2, 2\)"),
    "integers": (lambda: oj.steepest_direction(jnp.ones((3, 3, 2, 2), int), (8, 8)), "real floating dtype, got int"),
    "complex": (lambda: oj.steepest_direction(K.astype(complex), (8, 8)), "real floating dtype, got complex"),
    "groups": (lambda: oj.steepest_direction(K, oj.Conv((8, 8), feature_group_count=3)), "multiple of .*=3, got 2"),
    "no conv": (lambda: oj.steepest_direction(K, None), "expected an opnorm_jax.Conv or a tuple of ints .* got None"),
    "execution": (lambda: oj.steepest_direction(K, (8, 8), execution="products"), "an opnorm_jax.Execution, got 'prod"),
    "empty": (lambda: oj.steepest_direction(jnp.ones((0, 3, 2, 2)), (8, 8)), r"at least 1, got kernel.shape=\(0, 3"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_step_and_gap_allow_for_rounding(exact, padding):
    """The step's norm is below 1 by the allowance; where the dual norm is known the gap is at least as large."""
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 6, 6), (3, 3, 6, 6)):
        gradient = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        conv, allowed = oj.Conv((8, 8), padding=padding), rounding(shape, np.float32)
        found = oj.steepest_direction(gradient, conv, exact=exact)
        grid = (
            (1, 1) if shape[0] == 1 else (8, 8) if padding == "CIRCULAR" else (9, 9)
        )  # the layer's, or its embedding's
        size = oracle.paper_singular_values(np.asarray(found.direction, np.float64), grid).max()
        assert size <= 1 - allowed / 2
        if shape[0] == 1:
            assert found.gap >= 1.5 * allowed * found.descent
