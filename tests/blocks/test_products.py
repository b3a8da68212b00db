"""Norms, clips and projections by matrix products alone, against float64 factorisations by NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import THOROUGH
from geometries import generate

import opnorm_jax as oj
from opnorm_jax._blocks import products

KERNEL = np.random.default_rng(0).standard_normal((3, 3, 5, 7)).astype(np.float32)
SAME = oj.Conv((9, 8), padding="SAME")
PRODUCTS = oj.Execution(factorization="products")


def blocks(side, times, seed=0):
    """Random, rank one, nearly tied, tiny, zero, with one large value, and decaying over nine decades."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    stack = np.stack([normal(side * times, side) for _ in range(7)])
    stack[1] = stack[1, :, :1] * stack[1, :1]
    bases = [np.linalg.qr(stack[n])[0] for n in range(7)]
    stack[2] = bases[2] * np.where(rng.random(side) < 0.5, 1, 1 + 1e-5)
    stack[3] *= 1e-3
    stack[4] = 0
    stack[5] = bases[5] * np.where(np.arange(side) == 0, 7, 1)
    stack[6] = bases[6] * np.logspace(0, -9, side) @ np.linalg.qr(normal(side, side))[0]
    return stack


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("side, times", [(1, 3), (5, 1), (16, 2), (64, 1)])
def test_excess_against_svd(side, times, share, wide):
    stack = blocks(side, times)
    if wide:
        stack = stack.swapaxes(1, 2)
    u, s, v = np.linalg.svd(stack, full_matrices=False)
    bound = share * s.max()
    over = np.maximum(s - bound, 0)
    part, nuclear, largest = jax.jit(products.excess)(jnp.asarray(stack, jnp.complex64), jnp.float32(bound))
    assert np.abs(part - np.matmul(u * over[:, None], v)).max() < 2e-6 * s.max()
    np.testing.assert_allclose(nuclear, over.sum(1), atol=1e-6 * s.max() * side**0.5)
    np.testing.assert_allclose(largest, s[:, 0], rtol=1e-6)
    assert not np.asarray(part)[s[:, 0] < bound].any()


def test_excess_in_double_precision(x64):
    stack = blocks(16, 1)
    u, s, v = np.linalg.svd(stack, full_matrices=False)
    part, nuclear, largest = products.excess(jnp.asarray(stack), jnp.asarray(0.4 * s.max()))
    over = np.maximum(s - 0.4 * s.max(), 0)
    assert np.abs(part - np.matmul(u * over[:, None], v)).max() < 1e-14 * s.max()
    np.testing.assert_allclose(nuclear, over.sum(1), atol=1e-14 * s.max())
    np.testing.assert_allclose(largest, s[:, 0], rtol=1e-14)


@pytest.mark.parametrize("squarings", [1, 3, 6])
def test_few_squarings_bound_from_above(squarings):
    stack = blocks(16, 2)
    truth = np.linalg.svd(stack, compute_uv=False)[:, 0]
    norms = np.asarray(products.norms(jnp.asarray(stack, jnp.complex64), squarings))
    assert (norms >= truth * (1 - 1e-6)).all()
    assert (norms <= truth * 16**0.5 ** (squarings + 1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_gives_nan(bad):
    """And ends."""
    for function in (oj.clip_operator_norm, oj.rescale_operator_norm, oj.project_operator_norm):
        assert np.isnan(function(KERNEL * np.float32(bad), SAME, 1.0, execution=PRODUCTS)).all()
    assert np.isnan(oj.operator_norm(KERNEL * np.float32(bad), (6, 6), execution=PRODUCTS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "rescale", "project"])
def test_constraints_are_the_other_methods(name):
    function = getattr(oj, f"{name}_operator_norm")
    for bound in (0.5, 5.0, 12.0):
        found, usual = (function(KERNEL, SAME, bound, execution=execution) for execution in (PRODUCTS, oj.Execution()))
        if name == "project":  # what is so near to nearest is no further from the nearest, as the ball is convex
            infos = [
                oj.project_operator_norm_info(KERNEL, SAME, bound, execution=e)[1] for e in (PRODUCTS, oj.Execution())
            ]
            allowed = sum(float(jnp.sqrt(2 * info.gap * info.distance)) for info in infos)
            assert np.linalg.norm(found - usual) <= allowed < 0.1 * infos[0].distance
        else:
            np.testing.assert_allclose(found, usual, atol=2e-6 * np.abs(KERNEL).max(), err_msg=str(bound))
    inside = KERNEL / 100
    assert (function(inside, SAME, 5.0, execution=PRODUCTS) == inside).all()
    norm = float(oj.operator_norm_bounds(KERNEL, SAME).upper)
    near = KERNEL * np.float32(0.999 / norm)  # inside, but not so far that the coarse certificate says so
    assert (function(near, SAME, 1.0, execution=PRODUCTS) == near).all()


def test_project_is_certified():
    found, info = oj.project_operator_norm_info(KERNEL, SAME, 2.0, execution=PRODUCTS)
    assert oracle.dense_singular_values(found, (9, 8), padding="SAME")[0] <= 2 * (1 + 1e-6)
    assert 0 <= info.gap <= 1.1e-3 * info.distance
    again = oj.project_operator_norm(found, SAME, 2.0, execution=PRODUCTS)
    assert (again == found).all()


@pytest.mark.parametrize("seed", range(40 if THOROUGH else 3))
def test_every_geometry(seed):
    geometry = generate(seed)
    canonical, kernels = geometry.kernels(np.random.default_rng(seed), 3)
    for one, kernel in zip(canonical, kernels):
        truth = geometry.oracle(one)[0]
        lower, upper = oj.operator_norm_bounds(kernel, geometry.conv, execution=PRODUCTS)
        assert lower <= truth * (1 + 1e-6) and truth <= upper
        small = oj.rescale_operator_norm(kernel, geometry.conv, 0.5 * truth, execution=PRODUCTS)
        assert oj.operator_norm_bounds(small, geometry.conv).upper <= 0.5 * truth * (1 + 1e-5)


def test_nothing_is_factorised():
    """Nor under ``vmap``, nor in the certificate."""
    for function in (
        lambda k: oj.operator_norm(k, (16, 16), execution=PRODUCTS),
        lambda k: oj.clip_operator_norm(k, (16, 16), 1.0, execution=PRODUCTS),
        lambda k: oj.project_operator_norm(k, (16, 16), 1.0, execution=PRODUCTS),
        lambda k: oj.operator_norm_upper_bound(k, execution=PRODUCTS),
    ):
        for program in (jax.make_jaxpr(function)(KERNEL), jax.make_jaxpr(jax.vmap(function))(KERNEL[None])):
            assert not re.search(r"= (eigh|svd|cholesky|geqrf|qr)\b", str(program))


def test_vmap_is_a_loop():
    stack = np.stack([KERNEL, 3 * KERNEL, KERNEL / 100])
    clip = lambda k: oj.clip_operator_norm(k, (12, 12), 2.0, execution=PRODUCTS)
    np.testing.assert_allclose(jax.vmap(clip)(stack), np.stack([clip(k) for k in stack]), atol=1e-5)


def test_derivatives():
    """Of the clip and of the norm: as by the other methods."""
    functions = {
        "norm": lambda k, execution: oj.operator_norm(k, (6, 6), execution=execution),
        "clip": lambda k, execution: jnp.sum(oj.clip_operator_norm(k, (6, 6), 3.0, execution=execution) ** 2),
    }
    for name, function in functions.items():
        one, other = jax.grad(function)(KERNEL, PRODUCTS), jax.grad(function)(KERNEL, oj.Execution())
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), err_msg=name)


def test_stretched_steps_are_fewer():
    """23, where Newton and Schulz's are 40: those take a value of 4 eps to 1 by factors of 1.5 at most."""
    taken = []

    def square(x):
        jax.debug.callback(lambda: taken.append(1))
        return x * x

    tiny = 4 * jnp.finfo(jnp.float32).eps
    value = products._sign(jnp.full((1, 1, 1), tiny), 0, square)
    jax.effects_barrier()
    x, plain = float(tiny), 0
    while 1 - x > 1e-7:
        x, plain = x * (3 - x * x) / 2, plain + 1
    assert abs(value - 1).item() < 2e-7 and (len(taken), plain) == (23, 40), (value, len(taken), plain)
