"""Certificates that a kernel is inside the ball, cheaper than its norm, and work that is done only where they fail."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from opnorm_jax._blocks import factor, products
from opnorm_jax._blocks.batching import one_by_one
from opnorm_jax._blocks.symbol import block_taps, phases, scan_frequencies, symbol
from opnorm_jax._execution import Execution
from opnorm_jax._geometry import Plan, coarse_plan, finer_and_finer, half_grid
from opnorm_jax._kernel.norm import circular_norm
from opnorm_jax._rounding import certificate_margin

_ENTRIES = 2**15
"""Entries of the blocks that a CPU looks at together: few, so that a kernel outside is noticed at once."""


def certified_inside(
    kernel: Float[Array, "*taps i o"], bound: Float[Array, ""], plan: Plan, execution: Execution
) -> Bool[Array, ""]:
    """Decides whether the norm is at most ``bound``, without computing it. True is certain; False says nothing.

    It takes only Cholesky factorisations (or matrix products). A CPU tries finer and finer grids, and leaves each at
    the first frequency that fails, so that a kernel outside costs little more than a chunk of each. Other devices,
    where nothing can be left, look at the coarsest grid alone.
    """
    coarsest = lambda kernel, bound: _below_together(kernel, bound, *coarse_plan(plan), execution)
    if not _leaves_early(execution):
        return coarsest(kernel, bound)

    def finer(kernel, bound):
        certain = jnp.zeros((), bool)
        for level, overshoot in finer_and_finer(plan):
            look = functools.partial(_below_in_turns, plan=level, overshoot=overshoot)
            certain = lax.cond(certain, lambda *_: jnp.ones((), bool), look, kernel, bound)
        return certain

    return lax.platform_dependent(kernel, bound, cpu=finer, default=coarsest)


def _limit(kernel, bound, overshoot):
    return bound / (overshoot * (1 + certificate_margin(kernel.shape, kernel.dtype)))


def _below_together(kernel, bound, plan, overshoot, execution):
    """Decides whether every block's norm times ``overshoot`` is below the bound, at all frequencies at once."""
    limit = _limit(kernel, bound, overshoot)

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, *blocks.shape[2:])
        if execution.factorization == "products":
            below = jnp.all(products.norms(stack, products.ROUGH) < limit)
        else:
            below = factor.all_below(factor.gram(stack), limit**2)
        return carry, jnp.broadcast_to(below, blocks.shape[:1])

    _, below = scan_frequencies(step, (), block_taps(kernel, plan), plan, execution)
    return jnp.all(below)


def _below_in_turns(kernel, bound, plan, overshoot):
    """Decides the same, a few frequencies at a time, and ends with the first that fails."""
    taps = block_taps(kernel, plan)
    frequencies = half_grid(plan.grid).frequencies
    chunk = max(1, min(len(frequencies), _ENTRIES // math.prod(taps.shape[1:])))
    padding = -len(frequencies) % chunk
    frequencies = jnp.asarray(np.pad(frequencies, ((0, padding), (0, 0)), mode="edge"))
    limit = _limit(kernel, bound, overshoot)

    def look(state):
        done, _ = state
        phase = phases(lax.dynamic_slice_in_dim(frequencies, done, chunk), plan, taps.dtype)
        stack = symbol(taps, phase).reshape(-1, *taps.shape[2:])
        return done + chunk, factor.all_below(factor.gram(stack), limit**2)

    going = lambda state: (state[0] < len(frequencies)) & state[1]
    return lax.while_loop(going, look, (jnp.zeros((), jnp.int32), jnp.ones((), bool)))[1]


def unless_inside(
    inside: Callable[..., Any], outside: Callable[..., Any], plan: Plan, execution: Execution
) -> Callable[..., Any]:
    """Makes a function of a kernel and a bound: ``inside`` of them where that is certified, ``outside`` of them if not.

    Both are functions of modules, called as ``inside(plan, execution, kernel, bound)``; ``outside`` must be right for
    kernels inside too. ``vmap`` would turn the condition into the computation of both. Instead a CPU takes the members
    of the batch one by one, and other devices leave ``outside`` out if all are inside. Not differentiable.
    """
    guarded = one_by_one(_one, inside, outside, plan, execution, together=_together)
    if len(half_grid(coarse_plan(plan)[0].grid).weights) <= 0.7 * len(half_grid(plan.grid).weights):
        return guarded
    # Where nothing can be left at the first failure, the certificate costs about as much as the answer.
    alone = functools.partial(outside, plan, execution)
    if not _leaves_early(execution):
        return alone
    return lambda kernel, bound: lax.platform_dependent(kernel, bound, cpu=guarded, default=alone)


def _leaves_early(execution: Execution) -> bool:
    """Returns whether a CPU goes through the frequencies one after the other."""
    return execution.factorization != "products" and execution.mesh is None


def _one(inside, outside, plan, execution, kernel, bound):
    certain = certified_inside(kernel, bound, plan, execution)
    inside, outside = (functools.partial(function, plan, execution) for function in (inside, outside))
    return lax.cond(certain, inside, outside, kernel, bound)


def _together(inside, outside, plan, execution, kernels, bounds):
    certain = jax.vmap(lambda kernel, bound: certified_inside(kernel, bound, plan, execution))(kernels, bounds).all()
    inside, outside = (jax.vmap(functools.partial(function, plan, execution)) for function in (inside, outside))
    return lax.cond(certain, inside, outside, kernels, bounds)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def norm_unless_inside(kernel: Float[Array, "*taps i o"], bound: Float[Array, ""], plan: Plan, execution: Execution):
    """Computes the norm on the plan's grid, or returns 0 if the kernel is certified to be inside the ball."""
    return unless_inside(_zero, _norm, plan, execution)(kernel, bound)


def _zero(plan, execution, kernel, bound):
    return jnp.zeros((), kernel.dtype)


def _norm(plan, execution, kernel, bound):
    return circular_norm(kernel, plan, execution)


@norm_unless_inside.defjvp
def _norm_unless_inside_jvp(plan, execution, primals, tangents):
    norm = lambda kernel: circular_norm(kernel, plan, execution)
    return jax.jvp(norm, primals[:1], tangents[:1])
