"""How a constrained kernel survives its last rounding: to its own dtype, or to what ``p + u`` can reach.

An optax transformation cannot return a kernel, only an update u; ``optax.apply_updates`` then rounds p + u. With a
target c, u = c - p rounded to the dtype of the updates, what is reached is

* c itself, entry by entry, where c/2 <= p <= 2c (Sterbenz: c - p is exact), which is where training happens;
* c to one unit of rounding where p is smaller than that;
* where p is larger, p + u is exact (Sterbenz again, for -u and p), so that all of the error is that of u: half a unit
  of rounding *of p*, however small c is. A float32 kernel 1e7 times too large reaches only multiples of about its
  bound.

So what is reached may differ from c by any amount, and its norm must be bounded anew. That takes no factorisation: with
D_t the matrices of the difference's taps, the operator of the difference is a sum of partial shifts times D_t, whatever
the strides and groups, so its norm is at most the sum of the norms of D_t, and each of those is at most the fourth root
of trace (D_tᵀ D_t)² (Schatten's 4-norm). Where padding copies pixels, all of it is multiplied by the norm of that map.
If that is too much, a smaller multiple of c is tried. If none is found that is inside the ball and not zero, a single
entry is kept, the one that can be set most finely: its norm is at most that entry's absolute value. If even the finest
step from p is longer than the bound, the zero kernel is the only one left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from opnorm_jax._conv import Conv, canonical_kernel, canonical_shape
from opnorm_jax._geometry import resolve

_TRIES = 60


def wider(first: Any, second: Any) -> Any:
    """Returns the dtype in which jax computes with two dtypes, also where strict promotion is asked for."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


def round_to(value: jax.Array, dtype: Any) -> jax.Array:
    """Rounds to a narrower dtype and keeps the wide one: XLA may leave out a pair of casts, but not this."""
    info, wide = jnp.finfo(dtype), jnp.finfo(value.dtype)
    rounded = lax.reduce_precision(value, info.nexp, info.nmant)
    if info.minexp <= wide.minexp:
        return rounded
    step = float(info.smallest_subnormal)  # reduce_precision takes what is subnormal for zero
    return jnp.where(jnp.abs(value) < float(info.smallest_normal), step * jnp.round(value / step), rounded)


def round_update(target: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """Returns the update, of the given dtype, that brings the kernel nearest to the target (of a wider dtype)."""
    wide = wider(target.dtype, dtype)
    target = round_to(target, kernel.dtype)  # so that the difference is exact in the first case above
    return round_to(target.astype(wide) - kernel.astype(wide), dtype).astype(dtype)


def apply_update(kernel: jax.Array, update: jax.Array, wide: Any) -> jax.Array:
    """Returns what ``optax.apply_updates`` makes of the kernel, in a wider dtype."""
    both = wider(wide, update.dtype)
    total = round_to(kernel.astype(both) + update.astype(both), update.dtype)
    return round_to(total, kernel.dtype).astype(wide)


def norm_bound(kernel: jax.Array, conv: Conv) -> jax.Array:
    """Bounds the operator norm of a kernel by its taps alone; see the top of this module. Without a derivative."""
    kernel = lax.stop_gradient(canonical_kernel(kernel, conv))
    largest = jnp.max(jnp.abs(kernel))
    taps = (kernel / jnp.where(largest > 0, largest, 1)).reshape(-1, *kernel.shape[-2:])
    taps = taps if kernel.shape[-1] <= kernel.shape[-2] else taps.swapaxes(-1, -2)
    gram = jnp.matmul(taps.swapaxes(-1, -2), taps, precision=lax.Precision.HIGHEST)
    rounding = 1 + 8 * taps.shape[-2] * float(jnp.finfo(kernel.dtype).eps)  # of the sums, generously
    gain = resolve(conv, kernel.shape).gain  # a tap may meet a pixel once for each copy of it
    return gain * rounding * largest * jnp.sum(jnp.sqrt(jnp.sqrt(jnp.sum(gram**2, axis=(1, 2)))))


def find_scale(target: jax.Array, reach: Callable, conv: Conv, bound: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns a factor s such that the norm of ``reach(s * target)`` is at most ``limit``, and it is not zero.

    Args:
      target: a kernel in the computing dtype, of norm at most ``bound``.
      reach: gives the kernel that is really reached for a target, in the computing dtype.
      conv: of the kernel.
      bound, limit: positive scalars; ``limit`` is a little larger than ``bound``.

    Returns:
      A scalar, 1 wherever rounding does no harm, and 0 where no factor was found. It has no derivative.
    """
    target, bound, limit = lax.stop_gradient((target, bound, limit))
    hopeless = ~(jnp.any(target) & jnp.all(jnp.isfinite(target)))  # zero stays zero, NaN stays NaN

    def attempt(state):
        scale, tries, _ = state
        reached = reach(scale * target)
        moved = norm_bound(reached - scale * target, conv)
        inside = (scale * bound + moved <= limit) | (norm_bound(reached, conv) <= limit)
        good = (inside & jnp.any(reached)) | hopeless
        excess = 1.1 * (scale * bound + moved - limit) / bound
        smaller = jnp.where((excess > 0) & (excess < 0.25 * scale), scale - excess, 0.75 * scale)
        return jnp.where(good, scale, smaller), tries + 1, good

    going = lambda state: ~state[2] & (state[1] < _TRIES)
    scale, _, good = lax.while_loop(going, attempt, (jnp.ones_like(bound), 0, jnp.zeros((), bool)))
    return jnp.where(good, scale, 0)


def single_entry(kernel: jax.Array, dtype: Any, conv: Conv, bound: jax.Array, wide: Any) -> jax.Array:
    """Returns a target inside the ball with one entry: the one that updates of the given dtype can set most finely."""
    bound = bound / resolve(conv, canonical_shape(kernel, conv)).gain
    flat = lax.stop_gradient(jnp.ravel(kernel).astype(wide))
    exponent = jnp.frexp(flat)[1]
    steps = jnp.where(flat == 0, 0, jnp.ldexp(jnp.ones_like(flat), exponent - 1 - jnp.finfo(dtype).nmant))
    at = jnp.argmin(jnp.where(jnp.isfinite(flat), steps, jnp.inf))
    step = steps[at]
    value = jnp.where(step < bound / 4, bound / 2, jnp.where(step <= bound, step, 0))
    value = jnp.where(flat[at] < 0, -value, value)
    return jnp.zeros_like(flat).at[at].set(value).reshape(kernel.shape)
