"""A kernel on its way in and out: from the form that a user passes to the one that is computed with, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._conv import canonical_kernel, restore_kernel
from opnorm_jax._geometry import Geometry


def prepare(kernel: Float[Array, ...], geometry: Geometry) -> tuple[Float[Array, "*taps i o"], Float[Array, ""]]:
    """Returns the kernel's live part, spatial axes first, in the computing dtype and scaled; and the scale.

    Taps that never meet a pixel are cropped, or set to zero in between. A NaN or an infinity in one of them makes NaN
    of all, because 0 times it is NaN in the layer too.

    The scale is a power of two near the largest entry: the division is exact, and squares neither overflow nor vanish.
    """
    kernel = canonical_kernel(kernel, geometry.conv)
    mask, window = _live(geometry)
    if not mask.all():
        finite = jnp.isfinite(kernel).all()
        kernel = jnp.where(finite, jnp.where(mask[window], kernel[window], 0), jnp.nan)
    return normalise(kernel)


def restore(prepared: Float[Array, "*taps i o"], kernel: Float[Array, ...], geometry: Geometry) -> Float[Array, ...]:
    """Returns a kernel in the layout and the dtype of ``kernel``, from which it takes the taps that meet no pixel.

    The scale must have been multiplied again.
    """
    mask, window = _live(geometry)
    if not mask.all():
        whole = canonical_kernel(kernel, geometry.conv)
        dead = jnp.where(jnp.isfinite(prepared).all(), whole, jnp.nan)
        prepared = jnp.where(mask, whole.at[window].set(prepared), dead)
    return restore_kernel(prepared, geometry.conv, kernel.dtype)


def _live(geometry: Geometry) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Returns which taps meet a pixel, shape (*taps, 1, 1), and the window outside of which none does."""
    mask = np.ones((1, 1), bool)
    for axis, k in reversed(list(zip(geometry.live, geometry.taps, strict=True))):
        own = np.zeros(k, bool)
        own[axis.start : axis.stop] = axis.meets
        mask = own.reshape(-1, *(1,) * mask.ndim) & mask
    return mask, tuple(slice(axis.start, axis.stop) for axis in geometry.live)


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
