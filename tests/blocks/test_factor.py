"""The route of GPU and TPU (Gram matrix and batched eigh), forced on a CPU; and the structure of the CPU's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import opnorm_jax as oj
from opnorm_jax._blocks import factor, largest


@pytest.fixture
def accelerator_route(monkeypatch):
    jax.clear_caches()  # of functions traced for the CPU's own route
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **branches: default(*args))
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("kernel_shape", [(3, 3, 5, 7), (3, 3, 7, 5), (3, 3, 2, 4)], ids=str)
def test_accelerator_route_agrees(accelerator_route, kernel_shape):
    kernel = np.random.default_rng(0).standard_normal(kernel_shape).astype(np.float32)
    true = oracle.dense_singular_values(kernel, (6, 6))
    values = np.sort(np.ravel(oj.singular_values(kernel, (6, 6))))[::-1]
    large = true > 3e-3 * true[0]
    np.testing.assert_allclose(values[large], true[large], rtol=1e-3, atol=1e-5 * true[0])
    np.testing.assert_allclose(oj.operator_norm(kernel, (6, 6)), true[0], rtol=1e-5)
    lower, upper = oj.operator_norm_bounds(kernel, oj.Conv((6, 6), padding="SAME"))
    assert lower <= oracle.dense_singular_values(kernel, (6, 6), padding="SAME")[0] <= upper
    bound = 0.5 * true[0]
    np.testing.assert_allclose(
        oj.clip_operator_norm(kernel, (6, 6), bound), oracle.paper_clip(kernel, (6, 6), bound), atol=1e-5
    )
    projected = oj.project_operator_norm(kernel, (6, 6), bound)
    assert oracle.dense_singular_values(projected, (6, 6))[0] <= bound * (1 + 1e-6)
    gradient = jax.grad(lambda k: oj.operator_norm(k, (6, 6)))(kernel)
    np.testing.assert_allclose(jnp.sum(gradient * kernel), true[0], rtol=1e-4)


def test_accelerator_route_uses_no_svd(accelerator_route):
    text = str(jax.make_jaxpr(lambda k: oj.singular_values(k, (6, 6)))(jnp.ones((3, 3, 5, 6))))
    assert "svd" not in text and "eigh" in text


@pytest.mark.parametrize(
    "function",
    [
        oj.singular_values,
        oj.operator_norm,
        functools.partial(oj.clip_operator_norm, max_norm=1.0),
        functools.partial(oj.rescale_operator_norm, max_norm=1.0),
    ],
    ids=["singular_values", "operator_norm", "clip", "rescale"],
)
def test_one_matrix_a_call_on_a_cpu_even_under_vmap(function):
    """Batched LAPACK calls are what can deadlock: every CPU call in the compiled program takes a single matrix."""
    batched = jax.vmap(jax.vmap(lambda k: function(k, (9, 9))))
    compiled = jax.jit(batched).lower(jnp.ones((2, 3, 3, 3, 5, 6))).compile().as_text()
    assert compiled
    calls = [line for line in compiled.splitlines() if "custom-call" in line and "lapack" in line]
    assert calls
    for line in calls:
        assert any(f"c64[{shape}]" in line for shape in ("1,5,6", "5,6", "1,6,5", "5,5", "1,5,5")), line


@pytest.mark.parametrize("shape", [(2, 2), (5, 2), (3, 3), (3, 7), (4, 4), (4, 9)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(np.complex64, 1e-6), (np.complex128, 2e-15)], ids=["single", "double"])
def test_jacobi_against_lapack(x64, shape, dtype, tolerance):
    """Small blocks: random, nearly parallel columns, equal values, zeros, columns far apart in size."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((1000, *shape)) + 1j * rng.standard_normal((1000, *shape))
    blocks[100:300] *= 10.0 ** rng.uniform(-9, 0, (200, 1, shape[1]))
    blocks[300:500, :, 1] = blocks[300:500, :, 0] * (1 + 1e-6 * rng.standard_normal((200, 1)))
    blocks[500:600] = np.eye(*shape)
    blocks[600:700, :, 0] = 0
    blocks[700:800] = 0
    blocks = blocks.astype(dtype)
    truth = np.linalg.svd(blocks.astype(np.complex128), compute_uv=False)
    values = factor.singular_values(jnp.asarray(blocks))
    assert values.dtype == np.finfo(dtype).dtype
    assert (np.abs(np.asarray(values) - truth) <= tolerance * truth[:, :1]).all()


def test_jacobi_spreads_what_is_not_finite():
    blocks = np.ones((3, 2, 2), np.complex64)
    blocks[0, 1, 1], blocks[1, 0, 0] = np.nan, np.inf
    values = factor.singular_values(jnp.asarray(blocks))
    assert np.isnan(values[:2]).all() and np.isfinite(values[2]).all()


def test_eigh_above_leaves_out_only_what_is_below():
    rng = np.random.default_rng(0)
    blocks = (rng.standard_normal((40, 5, 5)) + 1j * rng.standard_normal((40, 5, 5))).astype(np.complex64)
    gram = factor.gram(jnp.asarray(blocks * rng.uniform(0, 1, (40, 1, 1)).astype(np.float32)))
    values, vectors = factor.eigh(gram)
    limit = jnp.median(values[:, -1])
    for function in (factor.eigh_above, jax.vmap(factor.eigh_above, (0, None))):
        batched = function is not factor.eigh_above
        some, their = function(gram[None] if batched else gram, limit)
        some, their = (some[0], their[0]) if batched else (some, their)
        above = np.asarray(values[:, -1] > limit)
        assert 15 < above.sum() < 25
        np.testing.assert_allclose(some[above], values[above], rtol=1e-5)
        np.testing.assert_allclose(their[above], vectors[above], atol=1e-4)
        assert not np.asarray(some[~above]).any()


def _blocks(kind):
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((60, 6, 8)) + 1j * rng.standard_normal((60, 6, 8))
    if kind == "all tied":
        blocks = np.linalg.svd(blocks, full_matrices=False)[2]
    elif kind == "ties of the largest":
        blocks[40] = blocks[20] = blocks[3] = 3 * blocks[7]
    elif kind == "rank one":
        blocks = blocks[:, :, :1] * blocks[:, :1, :]
    elif kind == "zero":
        blocks[:] = 0
    elif kind == "one not zero":
        blocks[np.arange(60) != 33] = 0
    elif kind == "rising":
        blocks = blocks[:1] * (1 + 1e-5 * np.arange(60))[:, None, None]
    return blocks


_KINDS = ["random", "all tied", "ties of the largest", "rank one", "zero", "one not zero", "rising"]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_elimination_finds_the_largest(x64, kind, dtype):
    """By itself, for a batch, and as accelerators do it; NumPy's in float64 is the truth."""
    blocks = _blocks(kind).astype(dtype)
    truth = np.linalg.svd(blocks.astype(np.complex128), compute_uv=False)[:, 0].max()
    tolerance = 20 * np.finfo(dtype).eps * truth
    alone = np.asarray(largest.largest_singular_values(jnp.asarray(blocks)))
    assert abs(alone.max() - truth) <= tolerance
    batch = jax.vmap(largest.largest_singular_values)(jnp.stack([blocks, np.roll(blocks, 5, 0) / 4]))
    np.testing.assert_allclose(np.max(batch, axis=1), [truth, truth / 4], atol=tolerance)
    together = largest._largest_together(jnp.stack([blocks, np.roll(blocks, 5, 0) / 4]))
    np.testing.assert_allclose(np.max(together, axis=1), [truth, truth / 4], atol=2 * tolerance)


@pytest.mark.parametrize("route", ["cpu", "accelerator"])
@pytest.mark.parametrize("spread", [1e-6, 1e-5, 1e-4])
def test_norm_at_near_ties(spread, route, request):
    """What projections make. LAPACK's values-only SVD is up to 35 eps off here, more than a certificate allows for."""
    if route == "accelerator":
        request.getfixturevalue("accelerator_route")
    rng = np.random.default_rng(0)
    left, values, right = np.linalg.svd(rng.standard_normal((100, 5, 6)) + 1j * rng.standard_normal((100, 5, 6)), False)
    blocks = ((left * (1 - spread * rng.random((100, 1, 5)))) @ right).astype(np.complex64)
    truth = np.linalg.svd(blocks.astype(np.complex128), compute_uv=False)[:, 0]
    each = jax.vmap(lambda block: largest.largest_singular_values(block[None])[0])(jnp.asarray(blocks))
    np.testing.assert_allclose(each, truth, rtol=10 * float(jnp.finfo(jnp.float32).eps))


@pytest.mark.parametrize("route", [largest.largest_singular_values, lambda x: largest._largest_together(x[None])[0]])
def test_elimination_keeps_what_is_not_finite(route):
    blocks = _blocks("random").astype(np.complex64)
    blocks[50, 0, 0] = np.nan
    assert np.isnan(route(jnp.asarray(blocks))).any()
