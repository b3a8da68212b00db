"""Arithmetic of bounds: never below the exact result.

A bound is a Python float while everything that it comes from is known, and a traced or float32 array otherwise. Each
operation here rounds upwards by more than its own rounding error, and a product that underflows gives the smallest
normal number instead of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._program.jaxpr import is_narrow

Number = Any
"""A float, or a scalar array."""


def widest(value: Any) -> Any:
    """Returns an array in at least single precision; what is no narrow floating array is returned as it is."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return np.asarray(value) if isinstance(value, (bool, int, float, complex)) else value
    if isinstance(value, (np.ndarray, np.generic)) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return jnp.asarray(value)  # as jax takes it
    return jnp.asarray(value).astype(jnp.float32) if is_narrow(dtype) else value


def largest(array: Any) -> Number:
    """Returns the largest modulus among an array's elements; 0 of an empty one."""
    if isinstance(array, jax.core.Tracer):
        return jnp.max(jnp.abs(array), initial=0)
    return float(np.max(np.abs(np.asarray(array, np.result_type(np.asarray(array), np.float64))), initial=0))


def times(*factors: Number) -> Number:
    """Returns the product of bounds; infinite where a factor is infinite or NaN."""
    known = [float(factor) for factor in factors if not isinstance(factor, jax.core.Tracer)]
    product: Any = 1.0
    for factor in known:
        exact = product * factor if math.isfinite(factor) and math.isfinite(product) else math.inf
        product = max(exact * (1 + 2**-51), _tiny(np.float64)) if product > 0 and factor > 0 else exact
    for factor in factors:
        if isinstance(factor, jax.core.Tracer):
            dtype = _dtype([product, factor])
            product, factor = _upwards(product, dtype), _upwards(factor, dtype)
            positive = (product > 0) & (factor > 0)
            exact = jnp.where(
                jnp.isfinite(factor) & jnp.isfinite(product), product * factor * (1 + 4 * jnp.finfo(dtype).eps), jnp.inf
            )
            product = jnp.where(positive, jnp.maximum(exact, _tiny(dtype)), exact)
    return product


def plus(terms: Sequence[Number]) -> Number:
    """Returns the sum of bounds."""
    if any(isinstance(term, jax.core.Tracer) for term in terms):
        total = jnp.sum(_stacked(terms))
        return total * (1 + len(terms) * float(jnp.finfo(total.dtype).eps))
    return math.fsum(float(term) for term in terms) * (1 + 2**-51)


def hypot(terms: Sequence[Number]) -> Number:
    """Returns the root of the sum of squares."""
    if len(terms) == 1:
        return terms[0]
    if any(isinstance(term, jax.core.Tracer) for term in terms):
        array = _stacked(terms)
        top = jax.lax.stop_gradient(jnp.max(array))
        scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        square = jnp.sum((array / scale) ** 2)
        root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        return scale * root * (1 + (4 + len(terms)) * float(jnp.finfo(array.dtype).eps))
    return math.hypot(*(float(term) for term in terms)) * (1 + 2**-51)


def maximum(terms: Sequence[Number]) -> Number:
    """Returns the largest of bounds."""
    if any(isinstance(term, jax.core.Tracer) for term in terms):
        return jnp.max(_stacked(terms))
    return max(float(term) for term in terms)


def minimum(terms: Sequence[Number | None]) -> Number:
    """Returns the smallest of bounds; None is no bound, and neither is NaN."""
    given = [term for term in terms if term is not None]
    if any(isinstance(term, jax.core.Tracer) for term in given):
        array = _stacked(given)
        return jnp.min(jnp.where(jnp.isnan(array), jnp.inf, array))
    return min(float(term) for term in given if not math.isnan(float(term)))


def rounded_up(bound: Number, dtype: Any) -> jax.Array:
    """Returns the bound as an array, at least as large."""
    if isinstance(bound, jax.core.Tracer):
        return _upwards(bound, dtype) * (1 + jnp.finfo(dtype).eps)
    with np.errstate(over="ignore"):
        found = np.asarray(bound, dtype)
        return jnp.asarray(np.nextafter(found, np.asarray(np.inf, dtype)) if float(found) < bound else found)


def _stacked(terms: Sequence[Number]) -> jax.Array:
    """Returns bounds as one array, none of them smaller."""
    dtype = _dtype(terms)
    return jnp.stack([_upwards(term, dtype) for term in terms])


def _upwards(term: Number, dtype: Any) -> jax.Array:
    """Returns a bound as an array of a dtype, at least as large; what is positive stays so."""
    if not isinstance(term, jax.core.Tracer):
        found = rounded_up(term, dtype)
        return jnp.maximum(found, _tiny(dtype)) if float(term) > 0 else found
    if term.dtype == dtype:
        return term
    found = term.astype(dtype) * (1 + float(jnp.finfo(dtype).eps))
    return jnp.where(term > 0, jnp.maximum(found, _tiny(dtype)), found)


def _dtype(terms: Sequence[Number]) -> Any:
    """Returns the widest dtype of those that are traced."""
    dtypes = [term.dtype for term in terms if isinstance(term, jax.core.Tracer)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def _tiny(dtype: Any) -> float:
    return float(jnp.finfo(dtype).tiny)
