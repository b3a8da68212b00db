"""The route of GPU and TPU (Gram matrix and batched eigh), forced on a CPU; and the structure of the CPU's own."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import opnorm_jax as oj


@pytest.fixture
def accelerator_route(monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **branches: default(*args))


@pytest.mark.parametrize("kernel_shape", [(3, 3, 3, 5), (3, 3, 5, 3), (3, 3, 4, 4), (3, 3, 1, 4)], ids=str)
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
    text = str(jax.make_jaxpr(lambda k: oj.singular_values(k, (6, 6)))(jnp.ones((3, 3, 2, 3))))
    assert "svd" not in text and "eigh" in text


@pytest.mark.parametrize("function", [oj.singular_values, oj.operator_norm])
def test_one_matrix_a_call_on_a_cpu_even_under_vmap(function):
    """Batched LAPACK calls are what can deadlock: every CPU call in the compiled program takes a single matrix."""
    batched = jax.vmap(jax.vmap(lambda k: function(k, (5, 5))))
    compiled = jax.jit(batched).lower(jnp.ones((2, 3, 3, 3, 2, 4))).compile().as_text()
    calls = [line for line in compiled.splitlines() if "custom-call" in line and "lapack" in line]
    assert calls
    for line in calls:
        assert "c64[1,2,4]" in line or "c64[2,4]" in line or "c64[1,4,2]" in line, line
