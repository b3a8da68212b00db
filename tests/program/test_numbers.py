"""Arithmetic of bounds against exact fractions: no result is below the exact one, and none is far above."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opnorm_jax._program import numbers

pytestmark = pytest.mark.quick


def draw(seed, count):
    rng = np.random.default_rng(seed)
    return [float(x) for x in np.float32(rng.uniform(0.1, 10, count) * 10.0 ** rng.integers(-3, 4, count))]


def computed(function, terms, traced):
    """The result as an exact fraction: of floats, or in single precision under ``jit``."""
    if not traced:
        return Fraction(float(function(terms)))
    found = jax.jit(lambda array: function(list(array)))(jnp.asarray(terms, jnp.float32))
    assert found.dtype == jnp.float32
    return Fraction(float(found))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_rounded_upwards(seed, traced):
    terms = draw(seed, 2 + seed % 4)
    slack = 1 + Fraction(1, 2**18 if traced else 2**46)
    product = math.prod(map(Fraction, terms))
    assert product <= computed(lambda terms: numbers.times(*terms), terms, traced) <= product * slack
    total = sum(map(Fraction, terms))
    assert total <= computed(numbers.plus, terms, traced) <= total * slack
    squares = sum(Fraction(term) ** 2 for term in terms)
    assert squares <= computed(numbers.hypot, terms, traced) ** 2 <= squares * slack**2
    assert computed(numbers.maximum, terms, traced) == Fraction(max(terms))
    assert computed(numbers.minimum, terms, traced) == Fraction(min(terms))


def test_small_products_do_not_vanish():
    """An underflow gives the smallest normal number; zero stays zero."""
    assert numbers.times(1e-200, 1e-200) == np.finfo(np.float64).tiny
    assert numbers.times(0.0, 1e-200) == numbers.times(1e-200, 0.0) == 0
    times = jax.jit(numbers.times)
    assert times(jnp.float32(1e-30), jnp.float32(1e-30)) == np.finfo(np.float32).tiny
    assert times(jnp.float32(0), jnp.float32(1e-30)) == 0


def test_what_is_no_number_is_no_bound():
    assert numbers.times(math.nan, 2.0) == numbers.times(math.inf, 2.0) == numbers.times(1e200, 1e200) == math.inf
    assert jax.jit(numbers.times)(jnp.float32(np.nan), jnp.float32(2)) == math.inf
    assert numbers.minimum([None, math.nan, 3.0, 2.0]) == 2
    assert jax.jit(lambda x: numbers.minimum([None, x, jnp.float32(2)]))(jnp.float32(np.nan)) == 2


def test_casts_round_upwards():
    for value in (0.1, 1 / 3, 1e-50, 3.0):
        assert Fraction(value) <= Fraction(float(numbers.rounded_up(value, np.float32)))
    assert numbers.rounded_up(3.0, np.float32) == 3
    assert numbers.rounded_up(1e39, np.float32) == math.inf
