"""The search over large grids finds the value that looking at every frequency finds, and looks at few."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import THOROUGH

import opnorm_jax as oj
from opnorm_jax._blocks import factor, largest
from opnorm_jax._geometry import resolve

GEOMETRIES = [
    ((3, 3, 6, 5), oj.Conv((33, 32), padding="SAME")),
    ((3, 3, 5, 8), oj.Conv((71, 64), padding="SAME", strides=2)),
    ((5, 3, 8, 6), oj.Conv((90, 33), padding="VALID", kernel_dilation=(1, 2))),
    ((4, 4, 5, 5), oj.Conv((66, 99), padding="SAME", strides=(2, 3))),
    ((3, 3, 5, 6), oj.Conv((40, 40), padding=((2, 2), (2, 2)), input_dilation=2)),
    ((3, 3, 5, 10), oj.Conv((37, 40), feature_group_count=2, padding="CIRCULAR")),
    ((3, 3, 1, 8), oj.Conv((64, 48), feature_group_count=8, padding="SAME")),
    ((9, 6, 7), oj.Conv((1000,), padding="SAME")),
    ((7, 1, 6, 6), oj.Conv((196, 50), padding="CIRCULAR")),
    ((3, 3, 3, 5, 5), oj.Conv((32, 33, 34), padding="CIRCULAR")),
    ((5, 5, 5, 5), oj.Conv((40, 40), padding=((4, 4), (4, 4)), input_dilation=2, strides=2)),
]


def grid_norms(kernel, size):
    """In float64, of every frequency, by NumPy's FFT; for stride 1."""
    axes = tuple(range(len(size)))
    return np.linalg.norm(np.fft.fftn(np.asarray(kernel, np.float64), size, axes), 2, axis=(-2, -1))


def kernels(shape, rng):
    """Flat spectra, steep ones, a peak away from zero, ties at every frequency, one frequency on top, nothing."""
    normal = rng.standard_normal(shape)
    yield normal
    yield normal + 3 * rng.standard_normal((*(1,) * (len(shape) - 2), *shape[-2:]))
    waves = [np.cos(rng.uniform(0, 2 * np.pi) * np.arange(n)) for n in shape[:-2]]
    yield functools.reduce(np.multiply.outer, waves)[..., None, None] * normal + 0.01 * rng.standard_normal(shape)
    same = np.zeros(shape)
    same[tuple(n // 2 for n in shape[:-2])] = np.eye(*shape[-2:])
    yield same
    yield np.broadcast_to(rng.standard_normal(shape[-2:]), shape)
    yield np.zeros(shape)


@pytest.mark.parametrize("shape, conv", GEOMETRIES[:: 1 if THOROUGH else 2], ids=str)
def test_the_same_as_every_frequency(shape, conv, monkeypatch):
    """Bit for bit but for rounding, with its derivative, one by one and in a batch."""
    plan = resolve(conv, shape).plan
    assert largest.pays(plan, 1)
    stack = jnp.asarray(np.stack([*kernels(shape, np.random.default_rng(0))]), jnp.float32)
    upper = lambda k: oj.operator_norm_bounds(k, conv).upper
    both = jax.value_and_grad(upper)
    alone = [both(k) for k in stack]
    together = jax.vmap(both)(stack)
    jax.clear_caches()
    monkeypatch.setattr(largest, "pays", lambda *_: False)
    for n, k in enumerate(stack):
        norm, slope = both(k)
        np.testing.assert_allclose(alone[n][0], norm, rtol=1e-6)
        np.testing.assert_allclose(together[0][n], norm, rtol=1e-6)
        np.testing.assert_allclose(alone[n][1], together[1][n], atol=1e-5)
        # At ties any of the tied frequencies' derivatives will do; along the kernel all give the norm.
        np.testing.assert_allclose(jnp.sum(alone[n][1] * k), norm, rtol=1e-5)
        if n < 2:
            np.testing.assert_allclose(alone[n][1], slope, atol=1e-4)
    jax.clear_caches()


@pytest.mark.parametrize("seed", range(200 if THOROUGH else 12))
def test_against_the_fourier_transform(seed, x64):
    rng = np.random.default_rng(seed)
    rank = int(rng.choice([1, 2, 2, 3]))
    size = tuple(rng.integers(16 if rank == 3 else 30, {1: 3000, 2: 80, 3: 24}[rank], rank).tolist())
    shape = (*rng.integers(1, 1 + min(5, 2 + 3 // rank), rank).tolist(), *rng.integers(1, 9, 2).tolist())
    for k in kernels(shape, rng):
        truth = grid_norms(k, size).max()
        np.testing.assert_allclose(oj.operator_norm(k, size), truth, rtol=1e-13, atol=1e-300)
        np.testing.assert_allclose(oj.operator_norm(k.astype(np.float32), size), truth, rtol=1e-5, atol=1e-30)


def turn(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def wave(angle):
    """Taps of the symbol whose singular values are |cos(w - angle)| and |cos(w + angle)|."""
    return np.stack([turn(angle) / 2, np.zeros((2, 2)), turn(-angle) / 2])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("n", [64, 65, 66, 67, 70, 100, 127] if THOROUGH else [64, 66, 127])
@pytest.mark.parametrize("far", [False, True])
def test_where_the_inequality_is_an_equality(rank, n, far):
    """The largest value is at the corner of a cell, 0.4 points beyond which is the steepest peak that there is; a value
    hardly lower stands at the centre of another cell. With blocks for Jacobi's rotations, and with larger ones."""
    side = int(largest.levels(resolve(oj.Conv((n,) * rank, padding="CIRCULAR"), (*(3,) * rank, 1, 1)).plan).sides[0, 0])
    angle = 2 * np.pi / n * (side // 2 + 2 * side * far - 0.4)
    lower = 0.9998 * np.cos(2 * np.pi / n * 0.4) ** rank
    peak = lambda angle: functools.reduce(np.kron, [wave(angle)[:, None]] * rank).reshape(*[3] * rank, *[2**rank] * 2)
    for count in range(1, 3):
        scales = [1, lower, 0.3, 0.2][: 2 * count]
        blocks = [scale * peak(angle if scale == 1 else 0) for scale in scales]
        kernel = sum(np.kron(np.diag(np.eye(2 * count)[m]), block) for m, block in enumerate(blocks))
        kernel = np.asarray(kernel, np.float32)
        value = float(oj.operator_norm(kernel, (n,) * rank))
        np.testing.assert_allclose(value, grid_norms(kernel, (n,) * rank).max(), rtol=2e-6)


@pytest.fixture
def looks(monkeypatch):
    """Counts the Cholesky factorisations at run time."""
    counts = [0]
    is_below = factor.is_below

    def counting(matrix, limit):
        jax.debug.callback(lambda: counts.__setitem__(0, counts[0] + 1))
        return is_below(matrix, limit)

    jax.clear_caches()
    monkeypatch.setattr(factor, "is_below", counting)

    def count(function, *args):
        counts[0] = 0
        jax.block_until_ready(jax.jit(function)(*args))
        jax.effects_barrier()
        return counts[0]

    yield count
    jax.clear_caches()


def test_few_frequencies_are_looked_at(looks):
    """Of 5,102; at most twice each. Where no frequency has more than another: all, once."""
    random, steep, _, same, _, zero = (k.astype(np.float32) for k in kernels((3, 3, 6, 6), np.random.default_rng(0)))
    norm = lambda k: oj.operator_norm(k, (101, 101))
    assert looks(norm, random) < 1000
    assert looks(norm, steep) < 600
    assert looks(norm, zero) < 400
    assert looks(norm, same) > 5000
    bad = random.copy()
    bad[0, 0, 0, 0] = np.nan
    assert looks(norm, bad) < 100
    assert np.isnan(norm(bad))


def test_chunks_and_devices():
    """Of any size; a mesh of many devices divides all the frequencies instead."""
    k = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    norm = oj.operator_norm(k, (64, 64))
    np.testing.assert_allclose(oj.operator_norm(k, (64, 64), execution=oj.Execution(chunk_bytes=1000)), norm, rtol=1e-6)
    plan = resolve(oj.Conv((32, 32), padding="CIRCULAR"), (3, 3, 1, 1)).plan
    assert largest.pays(plan, 1) and not largest.pays(plan, 8)
    assert not largest.pays(resolve(oj.Conv((12, 12), padding="CIRCULAR"), (3, 3, 1, 1)).plan, 1)
