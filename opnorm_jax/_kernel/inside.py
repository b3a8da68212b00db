"""Certificates that a kernel is inside the ball, cheaper than its norm, and work that is done only where they fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from opnorm_jax._blocks import factor, products
from opnorm_jax._blocks.batching import one_by_one
from opnorm_jax._blocks.symbol import block_taps, scan_frequencies
from opnorm_jax._execution import Execution
from opnorm_jax._geometry import Plan, coarse_plan, half_grid
from opnorm_jax._kernel.norm import circular_norm
from opnorm_jax._rounding import certificate_margin


def certified_inside(
    kernel: Float[Array, "*taps i o"], bound: Float[Array, ""], plan: Plan, execution: Execution
) -> Bool[Array, ""]:
    """Decides on a coarse grid whether the norm is at most ``bound``. True is certain; False says nothing.

    It takes only Cholesky factorisations (or matrix products).
    """
    coarse, excess = coarse_plan(plan)
    limit = bound / (excess * (1 + certificate_margin(kernel.shape, kernel.dtype)))

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, *blocks.shape[2:])
        if execution.factorization == "products":
            below = jnp.all(products.norms(stack, products.ROUGH) < limit)
        else:
            below = factor.all_below(factor.gram(stack), limit**2)
        return carry, jnp.broadcast_to(below, blocks.shape[:1])

    _, below = scan_frequencies(step, (), block_taps(kernel, coarse), coarse, execution)
    return jnp.all(below)


def unless_inside(
    inside: Callable[..., Any], outside: Callable[..., Any], plan: Plan, execution: Execution
) -> Callable[..., Any]:
    """Makes a function of a kernel and a bound: ``inside`` of them where that is certified, ``outside`` of them if not.

    Both are functions of modules, called as ``inside(plan, execution, kernel, bound)``; ``outside`` must be right for
    kernels inside too. ``vmap`` would turn the condition into the computation of both. Instead a CPU takes the members
    of the batch one by one, and other devices leave ``outside`` out if all are inside. Not differentiable.
    """
    if len(half_grid(coarse_plan(plan)[0].grid).weights) > 0.7 * len(half_grid(plan.grid).weights):
        return functools.partial(outside, plan, execution)  # the certificate costs about as much as the answer
    return one_by_one(_one, inside, outside, plan, execution, together=_together)


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
