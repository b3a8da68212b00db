"""The nearest kernel inside the ball: accelerated proximal gradient on the dual problem."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
from opnorm_jax._kernel.norm import circular_norm
from opnorm_jax._rounding import inside_tolerance


class ProjectionInfo(NamedTuple):
    """How near to nearest a projection came."""

    distance: jax.Array  # shape=(): |result - kernel|, Frobenius
    gap: jax.Array  # shape=(): distance less a lower bound on the distance of *any* kernel inside the ball; >= 0
    iterations: jax.Array  # shape=(), int32
    norm: jax.Array  # shape=(): the kernel's norm before, on the circulant embedding
    dual: jax.Array  # the dual variable: opaque, real; passed back, a warm start

    def __repr__(self) -> str:  # the dual has one block a frequency: too long to print
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in self._fields[:-1])
        return f"ProjectionInfo({shown}, dual=<{self.dual.shape}>)"


def dual_shape(kernel_shape: tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    """Shape of the dual variable: real and imaginary parts of one block a frequency of the half grid."""
    taps = jax.eval_shape(lambda k: block_taps(k, plan), jax.ShapeDtypeStruct(kernel_shape, jnp.float32))
    return (2, len(half_grid(plan.grid).frequencies), *taps.shape[1:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def nearest(kernel, norm, bound, dual, plan: Plan, options: tuple[float, int], execution: Execution):
    """Accelerated proximal gradient on the dual; see project_operator_norm.

    ``norm`` is the kernel's, ``dual`` where it starts.

    With M the map from a kernel to its blocks (scaled to an isometry) and p the dual variable, one block a frequency:
    K = kernel - Mᵀp, and p <- (q + M K) - clip(q + M K) with Nesterov's extrapolation q. Blocks are stacked per
    frequency of the half grid, so every sum over frequencies carries their weights.
    """
    tolerance, max_iterations = options
    taps = block_taps(kernel, plan)
    rate = 1 / squared_norm_of_coupling(plan)
    channels = kernel.shape[-2:]
    zero = jnp.zeros((), taps.dtype)

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

    def drawn_by(p):
        """Mᵀp, the kernel that the dual variable takes away."""

        def step(back, blocks, phase, weights, p):
            return back + symbol_adjoint(weigh(weights, p), phase), None

        back, _ = scan_frequencies(step, jnp.zeros_like(taps), taps, plan, execution, xs=p)
        return kernel_from_block_taps(back, plan, channels, adjoint=True)

    def certify(drawn, nuclear):
        """A kernel inside the ball, and a lower bound on every such kernel's squared distance."""
        k = kernel - drawn
        inside = fit(k, circular_norm(k, plan, execution), bound)
        dual_value = jnp.sum(drawn * kernel) - 0.5 * jnp.sum(drawn * drawn) - bound * nuclear
        return inside, jnp.sqrt(jnp.maximum(2 * dual_value, 0))

    def going(state):
        _, _, below, distance, iterations = state
        return (distance > (1 + tolerance) * below) & (iterations < max_iterations)

    def ten(state):
        inner, best, below, distance, iterations = state
        inner, _ = lax.scan(iterate, inner, None, length=10)
        inside, newly = certify(*inner[4])
        moved = jnp.sqrt(jnp.sum((inside - kernel) ** 2))
        best = jnp.where(moved < distance, inside, best)
        return inner, best, jnp.maximum(below, newly), jnp.minimum(distance, moved), iterations + 10

    start = fit(kernel, norm, bound)
    distance = jnp.sqrt(jnp.sum((start - kernel) ** 2))
    # A kernel that is inside (or not finite) takes no iteration.
    distance = jnp.where(norm > bound * (1 + inside_tolerance(taps.dtype)), distance, 0)
    p = lax.complex(dual[0], dual[1])
    drawn = drawn_by(p)
    inner = (kernel - drawn, p, p, jnp.ones((), taps.dtype), (drawn, zero))
    state = (inner, start, zero, distance, jnp.zeros((), jnp.int32))
    (_, p, *_), best, below, distance, iterations = lax.while_loop(going, ten, state)
    return best, ProjectionInfo(
        distance, jnp.maximum(distance - below, 0), iterations, norm, jnp.stack([p.real, p.imag])
    )


@nearest.defjvp
def _nearest_jvp(plan, options, execution, primals, tangents):
    raise NotImplementedError(
        "project_operator_norm has no derivative. Differentiate through rescale_operator_norm instead, or penalise "
        "operator_norm in the loss; to project between gradient steps, call it outside the differentiated function "
        "(constrain_operator_norm does)."
    )
