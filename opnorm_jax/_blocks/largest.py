r"""The largest singular value over a large grid of frequencies, most of which are never looked at.

Let s be the largest value on the grid, u and v its singular vectors, S >= s the supremum over all frequencies. Along
each axis :math:`\mathrm{Re}\, u^H F(\omega) v`, once centred, is a real function of exponential type d, half the span
of the taps, and at most S in modulus. By Bernstein and Szegő's inequality (Duffin and Schaeffer's for such functions)
it is :math:`S \cos\theta` with :math:`|\theta'| \le d`, so that at distances :math:`\delta_a` along the axes

.. math:: \|F(\omega + \delta)\| \ge S \cos(\arccos(s / S) + r)
    \ge s\, (\cos r - \sqrt{(S/s)^2 - 1}\, \sin r), \qquad r = \textstyle\sum_a d_a |\delta_a|,

where S / s is bounded by M. Riesz's lemma, as in :func:`operator_norm_upper_bound`. So a frequency whose norm is below
that share of a value already found is not within :math:`\delta` of the largest. Cells of frequencies shrink by halves
from level to level; of each level only the cells' centres are looked at, and of those only the ones that no earlier
level has ruled out. The value found is that of one of the grid's own blocks: the answer is exact, and its cost depends
little on the size of the grid.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._blocks import factorizations
from opnorm_jax._blocks.symbol import Plan, half_grid, overshoot, phases, rounding, span, symbol

_POINTS = 4
"""Centres an axis and unit of span on the first level: fewer rule out hardly a cell."""
_CHUNK = 32
"""Blocks looked at together."""


class Levels(NamedTuple):
    """The cells of a grid, the largest first; the last hold one frequency each."""

    sides: np.ndarray  # (levels, axes), in grid points; centres are the multiples of these
    shares: np.ndarray  # (levels,) what share of the grid's largest value the centre of its cell has at least


class Found(NamedTuple):
    """The largest singular value so far; all shape=()."""

    value: jax.Array
    position: jax.Array  # in the half grid, of its frequency
    group: jax.Array


@functools.lru_cache(maxsize=128)
def levels(plan: Plan) -> Levels | None:
    """None if the grid is too small for a search to pay."""
    grid = plan.grid
    spans = [span(axis) for axis in plan.axes]
    if any(n <= width for n, width in zip(grid, spans, strict=True)):
        return None
    first = [n // (_POINTS * max(width, 1)) for n, width in zip(grid, spans, strict=True)]
    exponents = [max(size, 1).bit_length() - 1 for size in first]
    if math.prod(2**exponent for exponent in exponents) < 4:
        return None
    sides = np.array([[2 ** max(exponent - level, 0) for exponent in exponents] for level in range(max(exponents) + 1)])
    reaches = np.minimum(np.sum(np.array(spans) * math.pi * (sides // 2) / np.array(grid), axis=1), math.pi)
    above = math.prod(overshoot(width, n) for n, width in zip(grid, spans, strict=True))
    return Levels(sides, np.maximum(np.cos(reaches) - math.sqrt(above**2 - 1) * np.sin(reaches), 0))


def pays(plan: Plan, devices: int) -> bool:
    """Whether a search is likely to be faster than all frequencies divided among so many devices.

    They would search all alike, and on a CPU in one another's way.
    """
    found = levels(plan)
    if found is None:
        return False
    first = math.prod(-(-n // side) for n, side in zip(plan.grid, found.sides[0].tolist(), strict=True))
    return (2 if devices == 1 else 32 * devices) * first < math.prod(plan.grid)


def largest(taps: Float[Array, "tau g m n"], plan: Plan, chunk_bytes: int) -> Found:
    """The largest singular value. For CPUs.

    ``vmap`` takes one kernel after the other. Not differentiable.
    """
    return _largest(plan, chunk_bytes)(taps)


@functools.lru_cache(maxsize=512)
def _largest(plan, chunk_bytes):
    one = jax.custom_batching.custom_vmap(jax.jit(functools.partial(_search, plan=plan, chunk_bytes=chunk_bytes)))

    @one.def_vmap
    def rule(axis_size, in_batched, taps):
        found = lax.map(one, taps)
        return found, jax.tree.map(lambda _: True, found)

    return one


def _search(taps, plan, chunk_bytes):
    found = levels(plan)
    assert found is not None
    g, m, n = taps.shape[1:]
    half = half_grid(plan.grid)
    frequencies, expand = jnp.asarray(half.frequencies), jnp.asarray(half.expand)
    count = len(frequencies)
    chunk = max(1, min(count, _CHUNK // g, chunk_bytes // (2 * taps.dtype.itemsize * g * m * n)))
    shares = found.shares * (1 - rounding((len(taps), m, n), taps.dtype))

    def level(carry, item):
        best, alive, seen = carry
        sides, share, last = item
        flat = jnp.zeros(count, jnp.int32)
        for axis, size in enumerate(plan.grid):
            nearest = (frequencies[:, axis] + sides[axis] // 2) // sides[axis] * sides[axis] % size
            flat = flat * size + nearest
        centre = expand[flat]
        wanted = jnp.zeros(count, bool).at[centre].max(alive)
        wanted = wanted & ~(last & seen)
        (order,) = jnp.nonzero(wanted, size=count, fill_value=0)
        order = jnp.pad(order.astype(jnp.int32), (0, chunk))
        left = jnp.sum(wanted, dtype=jnp.int32)

        def look(state):
            done, best, promising = state
            picked = lax.dynamic_slice(order, (done,), (chunk,))
            blocks = symbol(taps, phases(frequencies[picked], plan, taps.dtype)).reshape(-1, m, n)
            valid = jnp.repeat(done + jnp.arange(chunk, dtype=jnp.int32) < left, g)
            norms, some = factorizations.largest_above(blocks, valid, best.value, share)
            at = lax.argmax(norms, 0, jnp.int32)
            new = Found(norms[at], picked[at // g], at % g)
            better = ~(new.value <= best.value)  # NaN counts as the largest, and ends the search
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), new, best)
            return done + chunk, best, promising.at[picked].max(some.reshape(chunk, g).any(axis=1))

        going = lambda state: (state[0] < left) & ~jnp.isnan(state[1].value)
        _, best, promising = lax.while_loop(going, look, (jnp.zeros_like(left), best, jnp.zeros(count, bool)))
        return (best, alive & promising[centre], seen | wanted), None

    nothing = Found(jnp.zeros((), taps.dtype), *2 * [jnp.zeros((), jnp.int32)])
    last = np.arange(len(shares)) == len(shares) - 1
    items = np.int32(found.sides), jnp.asarray(shares, taps.dtype), last
    (best, *_), _ = lax.scan(level, (nothing, jnp.ones(count, bool), jnp.zeros(count, bool)), items)
    return best
