"""The nearest kernel inside the ball, with a certificate of how near to nearest it is.

Where matrices may be decomposed it is found by Newton steps (see ``newton.py``). With matrix products alone the
derivative that they need would cost more than it saves: there, accelerated proximal gradient on the dual is used.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from opnorm_jax._blocks.batching import one_by_one
from opnorm_jax._blocks.clip import excess
from opnorm_jax._blocks.symbol import (
    block_taps,
    kernel_from_block_taps,
    scan_frequencies,
    squared_norm_of_coupling,
    symbol_adjoint,
)
from opnorm_jax._execution import Execution
from opnorm_jax._geometry import Plan, half_grid
from opnorm_jax._kernel.clip import fit, weigh
from opnorm_jax._kernel.inside import certified_inside
from opnorm_jax._kernel.newton import ProjectionInfo, by_newton, frobenius, gap_floor
from opnorm_jax._kernel.norm import circular_norm
from opnorm_jax._rounding import inside_tolerance, rounding


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def nearest(kernel, bound, plan: Plan, options: tuple[float, int], execution: Execution):
    """Projects the kernel. Returns the ProjectionInfo too; its norm is 0 if no value of the kernel is above the bound.

    ``options`` are the tolerance and the largest number of iterations. ``vmap`` takes a batch's members one by one on a
    CPU, since a loop for all would wait for the slowest.
    """
    return one_by_one(_one, plan, options, execution, together=_together)(kernel, bound)


@nearest.defjvp
def _nearest_jvp(plan, options, execution, primals, tangents):
    raise NotImplementedError(
        "project_operator_norm has no derivative. Differentiate through rescale_operator_norm instead, or penalise "
        "operator_norm in the loss; to project between gradient steps, call it outside the differentiated function "
        "(constrain_operator_norm does)."
    )


def _one(plan, options, execution, kernel, bound):
    def inside(kernel, bound):
        zero = jnp.zeros((), kernel.dtype)
        return kernel, ProjectionInfo(zero, zero, gap_floor(kernel), jnp.zeros((), jnp.int32), zero)

    outside = functools.partial(_project, plan, options, execution)
    return lax.cond(certified_inside(kernel, bound, plan, execution), inside, outside, kernel, bound)


def _together(plan, options, execution, kernels, bounds):
    return jax.vmap(functools.partial(_project, plan, options, execution))(kernels, bounds)


def _project(plan, options, execution, kernel, bound):
    method = _by_products if execution.factorization == "products" else by_newton
    return method(kernel, bound, plan, options, execution)


def _by_products(kernel, bound, plan: Plan, options: tuple[float, int], execution: Execution):
    """Accelerated proximal gradient on the dual.

    With p the dual variable, one block for each frequency: k = kernel - Mᵀp, and p <- (q + M k) - clip(q + M k) with
    Nesterov's extrapolation q, restarted where it points uphill.
    """
    tolerance, max_iterations = options
    taps = block_taps(kernel, plan)
    rate = 1 / squared_norm_of_coupling(plan)
    channels = kernel.shape[-2:]
    zero = jnp.zeros((), taps.dtype)
    floor, allowed = gap_floor(kernel), rounding(kernel.shape, kernel.dtype)

    def iterate(state, _):
        k, p, q, momentum, _ = state

        def step(carry, blocks, phase, weights, item):
            p, q = item
            back, nuclear, uphill = carry
            z = q + jnp.asarray(rate, blocks.dtype) * blocks
            new, over, _ = excess(z, rate * bound, execution.factorization, norm_wanted=False)
            back = back + symbol_adjoint(weigh(weights, new), phase)
            nuclear = nuclear + jnp.sum(weights * over)
            uphill = uphill + jnp.sum(weights[:, None, None, None] * ((q - new).conj() * (new - p)).real)
            return (back, nuclear, uphill), new

        (back, nuclear, uphill), new = scan_frequencies(
            step, (jnp.zeros_like(taps), zero, zero), block_taps(k, plan), plan, execution, xs=(p, q)
        )
        drawn = kernel_from_block_taps(back, plan, channels, adjoint=True)
        # q was extrapolated: the kernel at q needs the same combination of the kernels at the last two p.
        momentum = jnp.where(uphill > 0, 1.0, momentum)
        grown = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        beta = (momentum - 1) / grown
        last = state[4]
        q = new + beta.astype(new.dtype) * (new - p)
        k = kernel - (drawn + beta * (drawn - last[0]))
        return (k, new, q, grown, (drawn, nuclear)), None

    def certify(drawn, nuclear):
        """Returns a kernel inside the ball, and a lower bound on every such kernel's distance."""
        k = kernel - drawn
        inside = fit(k, circular_norm(k, plan, execution), bound)
        dual = jnp.sum(drawn * kernel) - 0.5 * jnp.sum(drawn * drawn) - bound * nuclear
        dual = dual - allowed / 4 * (frobenius(drawn) * frobenius(kernel) + bound * nuclear)
        return inside, jnp.sqrt(jnp.maximum(2 * dual, 0))

    def going(state):
        _, _, below, distance, iterations = state
        return (distance - below > jnp.maximum(tolerance * below, floor)) & (iterations < max_iterations)

    def ten(state):
        inner, best, below, distance, iterations = state
        inner, _ = lax.scan(iterate, inner, None, length=10)
        inside, newly = certify(*inner[4])
        moved = frobenius(inside - kernel)
        best = jnp.where(moved < distance, inside, best)
        return inner, best, jnp.maximum(below, newly), jnp.minimum(distance, moved), iterations + 10

    norm = circular_norm(kernel, plan, execution)
    start = fit(kernel, norm, bound)
    distance = frobenius(start - kernel)
    # A kernel that is inside (or not finite) takes no iteration.
    distance = jnp.where(norm > bound * (1 + inside_tolerance(taps.dtype)), distance, 0)
    count = len(half_grid(plan.grid).weights)
    p = lax.complex(*2 * [jnp.zeros((count, *taps.shape[1:]), taps.dtype)])
    inner = (kernel, p, p, jnp.ones((), taps.dtype), (jnp.zeros_like(kernel), zero))
    state = (inner, start, zero, distance, jnp.zeros((), jnp.int32))
    _, best, below, distance, iterations = lax.while_loop(going, ten, state)
    return best, ProjectionInfo(distance, jnp.maximum(distance - below, 0), floor, iterations, norm)
