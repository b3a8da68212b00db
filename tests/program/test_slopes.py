"""Every activation of the table against a fine grid in float64, and what only looks like one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobian import Program
from jax import lax

import opnorm_jax as oj
from opnorm_jax._program.slopes import ACTIVATIONS, INTERVALS

pytestmark = pytest.mark.quick

PARAMETERS = [-3.0, -1.0, -0.25, 0.0, 0.1, 1.0, 2.5]


def steepest(function, *parameters):
    """The lowest difference quotient and the largest modulus of one, on a grid finer where most activations bend."""
    lowest, largest = np.inf, 0.0
    with jax.enable_x64(True):
        for x in (np.linspace(-12, 12, 400_001), np.linspace(-200, 200, 40_001)):
            y = np.asarray(function(jnp.asarray(x), *map(jnp.float64, parameters)))
            assert np.isfinite(y).all()
            quotients = np.diff(y) / np.diff(x)
            lowest, largest = min(lowest, np.min(quotients)), max(largest, np.max(np.abs(quotients)))
    return lowest, largest


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_slopes_are_the_largest(activation):
    for parameter in PARAMETERS if activation.parameters else [None]:
        given = () if parameter is None else (parameter,)
        slope = float(activation.slope(*given))
        if np.isfinite(slope):
            low, found = steepest(activation.function, *given)
            lowest = activation.lowest(*given) if callable(activation.lowest) else activation.lowest
            assert low >= float(lowest) - 1e-7 * abs(float(lowest)) - 1e-10
            assert found <= slope * (1 + 1e-7)
            assert found >= slope * (1 - 1e-4) or parameter not in (None, 1.0, 2.5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_expressions_are_recognised(activation, dtype):
    given = (jnp.asarray(0.5, dtype),) * activation.parameters
    fn = lambda _, x: jax.jit(jax.vmap(lambda row: activation.function(3 * row, *given)))(x)
    with jax.numpy_dtype_promotion("standard"):
        found = float(oj.lipschitz_bound(fn, None, jax.ShapeDtypeStruct((2, 3), dtype)))
    slope = 3 * float(activation.slope(*(0.5,) * activation.parameters))
    slope += 3 * activation.rounded * (dtype == jnp.bfloat16)
    assert slope * (1 - 1e-6) <= found <= slope * (1 + 1e-5)


@pytest.mark.parametrize("activation", [one for one in ACTIVATIONS if not one.parameters], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_slopes_hold_for_constants_in_16_bits(activation, dtype):
    """The functions' own constants are rounded then; what they compute with them is in float64 here."""
    x = np.linspace(-12, 12, 40_001)
    with jax.numpy_dtype_promotion("standard"):
        fn = lambda _, x: activation.function(x)
        y = Program(fn, {}, jax.ShapeDtypeStruct(x.shape, dtype), as_it_is=True)(x)
    quotients = np.diff(y) / np.diff(x)
    assert quotients.max() <= (float(activation.slope()) + activation.rounded) * (1 + 1e-7)
    assert quotients.min() >= activation.lowest - activation.rounded - 1e-7


OPERATIONS = {
    "abs": lax.abs,
    "asinh": lax.asinh,
    "atan": lax.atan,
    "clamp": lambda x: lax.clamp(-0.5, x, 1.0),
    "cos": lax.cos,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "logistic": lax.logistic,
    "max": lambda x: lax.max(x, 0.3),
    "min": lambda x: lax.min(x, 0.3),
    "sin": lax.sin,
    "tanh": lax.tanh,
}


@pytest.mark.parametrize("name", INTERVALS)
def test_slopes_of_operations(name):
    low, found = steepest(jax.vmap(OPERATIONS[name]))
    lowest, highest = INTERVALS[name]
    assert lowest - 1e-9 <= low and found <= max(-lowest, highest) + 1e-7


LOOKALIKES = {
    "another constant": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.0447 * x**3))),
    "two arguments": lambda x: x * jax.nn.sigmoid(x[::-1]),
    "a jump": lambda x: jnp.where(x >= 1, x, 0.1 * x),
    "branches exchanged by a mask": lambda x: jnp.where(x[::-1] >= 0, x, 0.1 * x),
    "a sum along another axis": lambda x: jnp.exp(x) / jnp.exp(x).sum(0, keepdims=True).T,
    "a shift along the axis": lambda x: jnp.exp(x - x[::-1]) / jnp.exp(x).sum(-1, keepdims=True),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_refused(name):
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match="known Lipschitz constant"):
        oj.lipschitz_bound(lambda _, x: LOOKALIKES[name](x), None, jnp.ones((3, 3)))
