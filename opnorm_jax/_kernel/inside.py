"""Certificates that a kernel is inside the ball, cheaper than its norm, and work done only where they fail."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from opnorm_jax._blocks import factorizations, products
from opnorm_jax._blocks.symbol import Plan, block_taps, half_grid, overshoot, rounding, scan_frequencies, span
from opnorm_jax._execution import Execution
from opnorm_jax._kernel.spectrum import circular_norm


@functools.lru_cache(maxsize=512)
def coarse_plan(plan: Plan) -> tuple[Plan, float]:
    """The same convolution on the smallest grid of use, and the factor by which norms on any grid can exceed its."""
    axes, factor = [], 1.0
    for axis, own in zip(plan.axes, plan.grid, strict=True):
        width = span(axis)
        grid = max(1, math.ceil(2.5 * width))  # 1.24 an axis; five points for three taps
        if grid < own:
            axis, factor = axis._replace(period=axis.run * grid), factor * overshoot(width, grid)
        axes.append(axis)
    return Plan(tuple(axes), plan.groups), factor


def certified_inside(
    kernel: Float[Array, "*taps i o"], bound: Float[Array, ""], plan: Plan, execution: Execution
) -> Bool[Array, ""]:
    """True only if the norm is at most ``bound``; often False all the same. On a coarse grid, without factorisations
    but Cholesky's."""
    coarse, factor = coarse_plan(plan)
    limit = bound / (factor * (1 + 2 * rounding(kernel.shape, kernel.dtype)))

    def step(carry, blocks, phase, weights, x):
        stack = blocks.reshape(-1, *blocks.shape[2:])
        if execution.factorization == "products":
            below = jnp.all(products.norms(stack, products.ROUGH) < limit)
        else:
            below = factorizations.all_below(factorizations.gram(stack), limit**2)
        return carry, jnp.broadcast_to(below, blocks.shape[:1])

    _, below = scan_frequencies(step, (), block_taps(kernel, coarse), coarse, execution)
    return jnp.all(below)


def unless_inside(inside: Callable[..., Any], outside: Callable[..., Any], plan: Plan, execution: Execution):
    """A function of a kernel, a bound (and more arrays): ``inside`` of them if that is certified, ``outside`` if not.

    ``vmap`` would turn the condition into the computation of both. Instead a CPU takes the batch's members one by one,
    which loses nothing there; other devices do without ``outside`` if all are inside. ``outside`` must be right for
    kernels inside too. Not differentiable.
    """
    if len(half_grid(coarse_plan(plan)[0].grid).weights) > 0.7 * len(half_grid(plan.grid).weights):
        return outside  # the certificate costs about as much as the answer
    certain = lambda kernel, bound, *_: certified_inside(kernel, bound, plan, execution)

    @jax.custom_batching.custom_vmap
    @jax.jit  # see factorizations._stackwise
    def one(*args):
        return lax.cond(certain(*args), inside, outside, *args)

    @one.def_vmap
    def rule(axis_size, in_batched, *args):
        full = lambda arg, batched: arg if batched else jnp.broadcast_to(arg, (axis_size, *jnp.shape(arg)))
        args = tuple(map(full, args, in_batched))
        one_by_one = lambda *args: lax.map(lambda item: one(*item), args)
        together = lambda *args: lax.cond(jax.vmap(certain)(*args).all(), jax.vmap(inside), jax.vmap(outside), *args)
        outs = lax.platform_dependent(*args, cpu=one_by_one, default=together)
        return outs, jax.tree.map(lambda _: True, outs)

    return one


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def norm_unless_inside(kernel: Float[Array, "*taps i o"], bound: Float[Array, ""], plan: Plan, execution: Execution):
    """The norm on the plan's grid, or 0 if the kernel is certified to be inside the ball."""
    return _norm_unless_inside(plan, execution)(kernel, bound)


@functools.lru_cache(maxsize=512)
def _norm_unless_inside(plan, execution):
    outside = lambda kernel, _: circular_norm(kernel, plan, execution)
    return unless_inside(lambda kernel, _: jnp.zeros((), kernel.dtype), outside, plan, execution)


@norm_unless_inside.defjvp
def _norm_unless_inside_jvp(plan, execution, primals, tangents):
    norm = lambda kernel: circular_norm(kernel, plan, execution)
    return jax.jvp(norm, primals[:1], tangents[:1])
