"""Certified radii against distances to decision boundaries that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opnorm_jax as oj


def test_exact_for_two_opposite_classes():
    """Logits w.x and -w.x: the boundary is the plane w.x = 0, at distance |w.x| / |w|."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal(5), rng.standard_normal((100, 5))
    logits = jnp.asarray(np.stack([x @ w, -(x @ w)], -1), jnp.float32)
    distance = np.abs(x @ w) / np.linalg.norm(w)
    found = oj.certified_radius(logits, jnp.argmax(logits, -1), np.linalg.norm([w, -w], 2))
    assert (found <= distance * (1 + 1e-6)).all()
    np.testing.assert_allclose(found, distance, rtol=1e-5)


def test_never_beyond_the_boundary():
    """A linear classifier of four classes: no class changes inside of the radius."""
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((4, 6)), rng.standard_normal((50, 6))
    logits = x @ w.T
    labels = logits.argmax(-1)
    radius = np.asarray(
        oj.certified_radius(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), np.linalg.norm(w, 2))
    )
    for row, label, r in zip(logits, labels, radius):
        others = [k for k in range(4) if k != label]
        assert r <= min((row[label] - row[k]) / np.linalg.norm(w[label] - w[k]) for k in others)
    assert (radius > 0).all()


def test_what_has_no_radius():
    logits = jnp.array([[1.0, 2.0], [2.0, 2.0], [jnp.nan, 1.0], [3.0, 1.0]])
    found = np.asarray(oj.certified_radius(logits, jnp.array([0, 0, 0, 7]), 1.0))
    assert found[0] == found[1] == 0 and np.isnan(found[2]) and np.isnan(found[3])
    assert np.isnan(oj.certified_radius(logits[0], jnp.array(1), jnp.nan))
    assert oj.certified_radius(logits[0], jnp.array(1), 0.0) == jnp.inf
    assert oj.certified_radius(logits[1], jnp.array(0), 0.0) == 0


def test_under_transformations():
    logits, labels = jnp.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), jnp.array([0, 1])
    expected = oj.certified_radius(logits, labels, 2.0)
    one = lambda row, label: oj.certified_radius(row, label, 2.0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(logits, labels), expected)
    gradient = jax.grad(lambda row: one(row, labels[0]))(logits[0])
    np.testing.assert_allclose(gradient, np.array([1, -1, 0]) / (2 * np.sqrt(2)), rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((jnp.ones((2, 3), int), jnp.zeros(2, int), 1.0), TypeError, "logits of a floating"),
        ((jnp.ones((2, 3)), jnp.zeros(2), 1.0), TypeError, "numbers, integers"),
        ((jnp.ones((2, 3)), jnp.zeros(3, int), 1.0), ValueError, "labels of shape"),
        ((jnp.ones((2, 1)), jnp.zeros(2, int), 1.0), ValueError, "at least two classes"),
        ((jnp.ones((2, 3)), jnp.zeros(2, int), -1.0), ValueError, "at least 0"),
    ],
)
def test_wrong_calls(arguments, error, match):
    with pytest.raises(error, match=match):
        oj.certified_radius(*arguments)
