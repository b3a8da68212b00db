"""A kernel on its way in and out: from the form that a user passes to the one that is computed with, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._conv import canonical_kernel, restore_kernel
from opnorm_jax._geometry import Geometry


def prepare(kernel: Float[Array, ...], geometry: Geometry) -> tuple[Float[Array, "*taps i o"], Float[Array, ""]]:
    """Returns the kernel spatial axes first, in the computing dtype and scaled; and the scale it was divided by.

    The scale is a power of two near the largest entry: the division is exact, and squares neither overflow nor vanish.
    """
    return normalise(canonical_kernel(kernel, geometry.conv))


def restore(prepared: Float[Array, "*taps i o"], geometry: Geometry, dtype: Any) -> Float[Array, ...]:
    """Returns a kernel in the layout and the dtype that the user passed. The scale must have been multiplied again."""
    return restore_kernel(prepared, geometry.conv, dtype)


def normalise(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the kernel divided by a power of two near its largest entry, and that power.

    A zero kernel, or one with NaN or infinity, is left as it is.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(kernel)))
    usable = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    # One below frexp's, and short of the extremes, so that neither the power nor its inverse leaves the dtype's range.
    limit = -jnp.finfo(kernel.dtype).minexp - 1
    scale = jnp.ldexp(jnp.ones((), kernel.dtype), jnp.clip(exponent - 1, -limit, limit))
    return kernel / scale, scale
