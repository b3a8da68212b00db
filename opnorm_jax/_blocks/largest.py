r"""The largest singular value of a stack of blocks, or of all blocks of a frequency grid.

**Elimination.** Blocks are taken in the order of a rough estimate. One that a Cholesky factorisation shows to be below
the largest value so far is not decomposed. That costs a third of all values.

**Branch and bound** over a large grid, most of whose frequencies are never looked at. Let s be the largest value on the
grid, u and v its singular vectors, S >= s the supremum over all frequencies. Along each axis
:math:`\mathrm{Re}\, u^H F(\omega) v`, once centred, is a real function of exponential type d, half the span of the
taps, and at most S in modulus. By the inequality of Bernstein and Szegő (of Duffin and Schaeffer for such functions) it
is :math:`S \cos\theta` with :math:`|\theta'| \le d`, so that at distances :math:`\delta_a` along the axes

.. math:: \|F(\omega + \delta)\| \ge S \cos(\arccos(s / S) + r)
    \ge s\, (\cos r - \sqrt{(S/s)^2 - 1}\, \sin r), \qquad r = \textstyle\sum_a d_a |\delta_a|,

where S / s is bounded by M. Riesz's lemma, as in :func:`operator_norm_upper_bound`. So if the norm at a frequency is
below that share of a value already found, then no frequency within :math:`\delta` of it holds the largest value. Cells
of frequencies shrink by halves from level to level. On each level only the centres of cells are looked at, and of those
only the ones that no earlier level has ruled out. The value found is that of one of the grid's own blocks: the answer
is exact, and its cost depends little on the size of the grid.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from opnorm_jax._blocks import factor
from opnorm_jax._blocks.batching import one_by_one, stackwise
from opnorm_jax._blocks.symbol import phases, symbol
from opnorm_jax._geometry import Plan, half_grid, overshoot, span
from opnorm_jax._rounding import elimination_limit, possible_limit, rounding

_HIGHEST = lax.Precision.HIGHEST

_POINTS = 4
"""Centres per axis and unit of span on the first level. With fewer, hardly a cell is ruled out."""
_CHUNK = 32
"""Number of blocks that are looked at together."""


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
    """Returns the cells of a plan's grid, or None if the grid is too small for a search to pay."""
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
    """Decides whether a search is likely to be faster than all frequencies divided among this number of devices.

    In a search all devices would do the same work, and on a CPU they would hinder one another.
    """
    found = levels(plan)
    if found is None:
        return False
    first = math.prod(-(-n // side) for n, side in zip(plan.grid, found.sides[0].tolist(), strict=True))
    return (2 if devices == 1 else 32 * devices) * first < math.prod(plan.grid)


def search(taps: Float[Array, "tau g m n"], plan: Plan, chunk_bytes: int) -> Found:
    """Finds the largest singular value over the plan's grid by branch and bound. For CPUs; not differentiable."""
    return one_by_one(_search, plan, chunk_bytes)(taps)


def _search(plan, chunk_bytes, taps):
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
            norms, some = largest_above(blocks, valid, best.value, share)
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


def largest_singular_values(blocks: Complex[Array, "c m n"]) -> Float[Array, " c"]:
    """Computes the largest singular value of each block, or 0 for blocks whose own is not the largest of all.

    Small blocks always have their own. By elimination; accurate to a few eps, at near ties too (which projections
    make). Not differentiable.
    """
    if min(blocks.shape[-2:]) <= factor.JACOBI_SIDE:
        return factor.singular_values(blocks)[:, 0]
    return _largest(blocks[None])[0]


def largest_above(
    blocks: Complex[Array, "c m n"],
    valid: Bool[Array, " c"],
    best: Float[Array, ""],
    share: Float[Array, ""],
) -> tuple[Float[Array, " c"], Bool[Array, " c"]]:
    """Computes the largest singular value of each block, by elimination. Only ``valid`` blocks count.

    Returns 0 for every block whose largest value is not above ``best`` and above those of all other blocks. Also
    returns whether a block's largest value may be as large as that ``share`` of the largest of all. For a CPU, and not
    under ``vmap``.
    """
    if min(blocks.shape[-2:]) <= factor.JACOBI_SIDE:
        norms = jnp.where(valid, factor.singular_values(blocks)[:, 0], 0)
        return norms, valid & ~(norms < share * jnp.maximum(best, jnp.max(norms)))
    return _eliminate(factor.gram(blocks), valid, best, share)


def _eliminate(grams, valid, best, share):
    """:func:`largest_above` of Gram matrices; without a ``share`` every valid block counts as possible."""

    def one(best, at):
        def look(_):
            if share is None:
                return _root_unless_below(grams[at], best), True
            low = factor.is_below(grams[at], possible_limit(share * best))
            value = lax.cond(low, lambda *_: jnp.zeros((), best.dtype), _root_unless_below, grams[at], best)
            return value, ~low

        value, possible = lax.cond(valid[at], look, lambda _: (jnp.zeros((), best.dtype), False), None)
        return jnp.maximum(best, value), (at, value, possible)

    order = jnp.argsort(jnp.where(valid, -_estimates(grams), 0))
    _, (at, values, possible) = lax.scan(one, best, order)
    return jnp.zeros_like(values).at[at].set(values), jnp.zeros_like(valid).at[at].set(possible)


@stackwise
def _largest(stacks: Complex[Array, "b c m n"]) -> Float[Array, "b c"]:
    def eliminate(blocks):
        grams = factor.gram(blocks)
        return _eliminate(grams, jnp.ones(len(grams), bool), jnp.zeros((), grams.real.dtype), None)[0]

    return lax.platform_dependent(stacks, cpu=lambda stacks: lax.map(eliminate, stacks), default=_largest_together)


def _estimates(grams):
    """Estimates the Gram matrices' largest eigenvalues roughly, from below, up to a factor common to all."""
    v = jnp.asarray(np.random.default_rng(0).standard_normal((grams.shape[-1], 1)), grams.dtype)
    v = jnp.broadcast_to(v, (*grams.shape[:-1], 1))
    size = jnp.ones((*grams.shape[:-2], 1, 1), grams.real.dtype)
    for _ in range(3):
        v = jnp.matmul(grams, v / size.astype(grams.dtype), precision=_HIGHEST)
        length = jnp.sqrt(jnp.sum(v.real**2 + v.imag**2, axis=(-1, -2), keepdims=True))
        size = jnp.where(length > 0, length, 1)
    return length[..., 0, 0]


def _root_unless_below(gram, value):
    """Returns the root of the largest eigenvalue, or 0 if a Cholesky factorisation shows that ``value`` is as large."""
    nothing = lambda _: jnp.zeros((), value.dtype)
    root = lambda gram: jnp.sqrt(jnp.maximum(factor.batched_eigh(gram)[0][-1], 0))
    return lax.cond(factor.is_below(gram, elimination_limit(value)), nothing, root, gram)


def _largest_together(stacks: Complex[Array, "b c m n"]) -> Float[Array, "b c"]:
    """Treats all blocks at once, for accelerators: decomposes an eighth of them, and all if that is not enough."""
    grams = factor.gram(stacks)
    root = lambda grams: jnp.sqrt(jnp.maximum(factor.batched_eigh(grams)[0][..., -1], 0))
    _, picked = lax.top_k(_estimates(grams), -(-grams.shape[1] // 8))
    some = root(jnp.take_along_axis(grams, picked[..., None, None], axis=1))
    settled = factor.is_below(
        grams, jnp.broadcast_to(elimination_limit(jnp.max(some, axis=1, keepdims=True)), grams.shape[:2])
    )
    # The picked ones themselves may fail the test by a rounding error.
    settled = jnp.put_along_axis(settled, picked, True, axis=1, inplace=False)
    values = jnp.put_along_axis(jnp.zeros(grams.shape[:2], some.dtype), picked, some, axis=1, inplace=False)
    return lax.cond(settled.all(), lambda _: values, root, grams)
