"""Small functions of stacks of complex matrices that several modules use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


def adjoint(matrices: Any) -> Any:
    """Returns the conjugate transposes. Works for NumPy's arrays too."""
    return matrices.conj().swapaxes(-1, -2)


def diagonal(values: Float[Array, "*c n"]) -> Float[Array, "*c n n"]:
    """Returns diagonal matrices."""
    size = values.shape[-1]
    return jnp.where(np.eye(size, dtype=bool), jnp.broadcast_to(values[..., None], (*values.shape, size)), 0)


def frobenius(matrices: Complex[Array, "*c m n"]) -> jax.Array:
    """Returns the Frobenius norms."""
    return jnp.sqrt(jnp.sum(matrices.real**2 + matrices.imag**2, axis=(-1, -2)))
