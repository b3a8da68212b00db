r"""Semismooth Newton steps to the nearest kernel inside the ball, where matrices may be decomposed.

With M the map from a kernel to its blocks (an isometry, unless taps fold), C the blocks whose singular values are at
most c, and E(Z) = Z - clip(Z), the projection of K minimises |k - K|²/2 over the kernels k with Mk in C.

An augmented Lagrangian with semismooth Newton steps finds it:

.. math:: f(k) = \tfrac12 |k - K|^2 + \tfrac\rho2 |E(Mk + P/\rho)|^2, \qquad P \leftarrow \rho E(Mk + P/\rho).

One *pass* decomposes all blocks of Z = Mk + P/rho. It gives f, its gradient, and, with the singular vectors at hand, a
piecewise quadratic model of f, which conjugate gradients minimise by matrix products at the active frequencies alone
(those with a value above c). Most work is in the passes, so the model is used for all that it can give: it drops
singular values that the step brings below c, and it goes on after an update of P, whose effect on Z it can predict.

Every pass also gives a certificate. Each P is a feasible point of the dual problem, so that

.. math:: \tfrac12 |k' - K|^2 \ge \langle M^T P, K\rangle - \tfrac12 |M^T P|^2 - c |P|_*
    \quad\text{for every } k' \text{ inside};

and Mk = clip(Z) + (E(Z) - P/rho) has a norm of at most c + |E(Z) - P/rho|, by which k is scaled into the ball.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from opnorm_jax._blocks import factor, linalg
from opnorm_jax._blocks.linalg import adjoint, diagonal
from opnorm_jax._blocks.symbol import (
    block_taps,
    kernel_from_block_taps,
    phases,
    symbol,
    symbol_adjoint,
)
from opnorm_jax._geometry import half_grid
from opnorm_jax._kernel.clip import weigh
from opnorm_jax._kernel.compiled import exportable
from opnorm_jax._rounding import eps, inside_tolerance, rounding

_HIGHEST = lax.Precision.HIGHEST
_FIRST_PENALTY = 300.0
_GROWTH = 10.0
"""An update of the multipliers makes the penalty larger by this factor at most."""
_INNER = 0.1
"""The multipliers are updated once what is left of the gradient adds at most this share of the gap to it."""
_SHORTEST = 1e-3
"""A step is shortened down to this share of it; then it is taken whatever it does."""
_LARGEST_MARGIN = 0.1
_STEPS = 10
"""One step of the model's Newton method takes so many conjugate gradients at most."""
_MODEL_STEPS = 2
"""The model's minimum is sought by so many steps of Newton's method at most."""


@exportable
class ProjectionInfo(NamedTuple):
    """How near to nearest a projection came."""

    distance: jax.Array  # shape=(): |result - kernel|, Frobenius
    gap: jax.Array  # shape=(): distance less a lower bound on the distance of *any* kernel inside the ball; >= 0
    floor: jax.Array  # shape=(): a gap below this is put down to rounding, whatever the tolerance
    iterations: jax.Array  # shape=(), int32: how often all blocks were decomposed
    norm: jax.Array  # shape=(): the kernel's norm before, on the circulant embedding


def gap_floor(kernel):
    """Returns what rounding can leave of a gap: that of the final scaling, and what the dual value is allowed."""
    return 3 * rounding(kernel.shape, kernel.dtype) * frobenius(kernel)


class _Active(NamedTuple):
    """The decompositions Z = U diag(s) Wᴴ + ... at the frequencies with a value above the bound; these come first.

    Blocks are turned so that m >= n. A value that rounding errors hide has zeros for a left vector.
    """

    count: jax.Array  # shape=(): how many frequencies are active
    order: jax.Array  # (nf,) where each stands among all
    left: jax.Array  # (nf, g, m, n)
    values: jax.Array  # (nf, g, n)
    right: jax.Array  # (nf, g, n, n)
    along: jax.Array  # (nf, g, n) the multipliers' part along u wᴴ, over the penalty
    excess: jax.Array  # (nf, g, m, n) E(Z)


class _Pass(NamedTuple):
    """What the decomposition of all blocks of Z = Mk + P/rho gives, besides the decompositions."""

    pull: jax.Array  # shaped like the kernel: Mᵀ E(Z)
    nuclear: jax.Array  # shape=(): sum of E(Z)'s singular values
    square: jax.Array  # shape=(): |E(Z)|²
    largest: jax.Array  # shape=(): Z's largest singular value, or 0 if none is above the bound
    violation: jax.Array  # shape=(): at most so much is the kernel's norm above the bound


class _Model(NamedTuple):
    """The linear map of a kernel's change to that of E(Z), from the values that Z is expected to have."""

    values: jax.Array  # (nf, g, n) of Z, expected
    share: jax.Array  # (nf, g, n) 1 - c / value for those above c
    divided: jax.Array  # (nf, g, n, n) divided differences of that as a function of the value's square


class _Problem:
    """One projection's data, and what is done with them, at one device's share of the frequencies."""

    def __init__(self, kernel, bound, plan, execution, share):
        self.kernel, self.bound, self.plan = kernel, bound, plan
        frequencies, weights = share
        self.names = execution.mesh.axis_names if execution.mesh else None
        taps = jax.eval_shape(functools.partial(block_taps, plan=plan), kernel)
        self.wide = taps.shape[-1] > taps.shape[-2]
        self.groups, (self.n, self.m) = taps.shape[1], sorted(taps.shape[2:])
        count = len(weights)
        block_bytes = 2 * kernel.dtype.itemsize * self.groups * self.m * self.n
        self.chunk = max(1, min(-(-count // 8), execution.chunk_bytes // block_bytes))
        self.chunks = -(-count // self.chunk)
        padding = self.chunks * self.chunk - count
        self.weights = jnp.pad(weights, (0, padding))
        phase = phases(jnp.pad(frequencies, ((0, padding), (0, 0))), plan, kernel.dtype)
        self.phase = phase.reshape(2, -1, phase.shape[-1]).swapaxes(0, 1)  # (nf, 2, tau)

    def taps(self, kernel):
        taps = block_taps(kernel, self.plan)
        return taps.swapaxes(-1, -2) if self.wide else taps

    def symbol(self, taps, phase):
        return symbol(taps, phase.swapaxes(0, 1).reshape(-1, phase.shape[-1]))

    def symbol_adjoint(self, blocks, phase, weights):
        return symbol_adjoint(weigh(weights, blocks), phase.swapaxes(0, 1).reshape(-1, phase.shape[-1]))

    def kernel_from(self, taps):
        """Returns the transpose of ``taps``, of the sum over all devices."""
        taps = lax.psum(taps, self.names) if self.names else taps
        taps = taps.swapaxes(-1, -2) if self.wide else taps
        return kernel_from_block_taps(taps, self.plan, self.kernel.shape[-2:], adjoint=True)

    def over_active(self, step, carry, active: _Active, xs: Any):
        """``carry, outs = step(carry, phase, weights, xs)`` over the active frequencies in chunks; ``outs`` replace
        the rows of ``xs``, of which they are some."""

        def body(state):
            done, carry, xs = state
            take = lambda a: lax.dynamic_slice_in_dim(a, done, self.chunk)
            picked = take(active.order)
            weights = jnp.where(done + jnp.arange(self.chunk, dtype=jnp.int32) < active.count, self.weights[picked], 0)
            carry, outs = step(carry, self.phase[picked], weights, jax.tree.map(take, xs))
            put = lambda a, out: lax.dynamic_update_slice_in_dim(a, out, done, 0)
            return done + self.chunk, carry, {**xs, **{name: put(xs[name], out) for name, out in outs.items()}}

        going = lambda state: state[0] < active.count
        _, carry, xs = lax.while_loop(going, body, (jnp.zeros_like(active.count), carry, xs))
        return carry, xs

    def decompose(self, k, multipliers, penalty, limit) -> tuple[_Pass, _Active]:
        taps, count = self.taps(k), len(self.weights)
        g, m, n = self.groups, self.m, self.n
        plain, noise = ~jnp.any(multipliers != 0), 4 * eps(k.dtype) ** 0.5

        def step(_, item):
            phase, weights, multipliers = item
            z = self.symbol(taps, phase) + multipliers / penalty.astype(multipliers.dtype)
            squares, right = factor.eigh_above(factor.gram(z.reshape(-1, m, n)), limit * limit)
            values = jnp.sqrt(jnp.maximum(squares, 0)).reshape(-1, g, n)
            # NaN is not below the limit.
            active = ~jnp.all(values <= limit, axis=(1, 2)) & (weights > 0)
            idle = jnp.where(active | (weights == 0), 0, jnp.max(linalg.frobenius(multipliers), axis=1) / penalty)
            return None, (z, values, right.reshape(-1, g, n, n), active, idle)

        split = lambda a: a.reshape(self.chunks, self.chunk, *a.shape[1:])
        _, outs = lax.scan(step, None, jax.tree.map(split, (self.phase, self.weights, multipliers)))
        z, values, right, is_active, idle = jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), outs)
        order = jnp.argsort(~is_active, stable=True).astype(jnp.int32)
        z, values, right, at = z[order], values[order], right[order], multipliers[order]
        largest = jnp.max(jnp.where(is_active[order][:, None, None], values, 0))
        active = _Active(jnp.sum(is_active, dtype=jnp.int32), order, z, values, right, jnp.zeros_like(values), at)

        def part(carry, phase, weights, x):
            back, nuclear, square, violation = carry
            over = jnp.maximum(x["values"] - self.bound, 0)
            # Values below that are noise, as the Gram matrix has squared them; and so are their left vectors.
            known = x["values"] > noise * jnp.max(x["values"], axis=-1, keepdims=True)
            inverse = jnp.where(known, 1 / jnp.where(known, x["values"], 1), 0)
            left = _matmul(x["left"], x["right"]) * inverse[:, :, None].astype(z.dtype)
            excess = _matmul(left * over[:, :, None].astype(z.dtype), adjoint(x["right"]))
            shared = x["excess"] / penalty.astype(z.dtype)
            along = jnp.sum((left.conj() * _matmul(shared, x["right"])).real, axis=-2)
            above = jnp.where(plain, jnp.max(over, axis=-1), linalg.frobenius(excess - shared))
            carry = (
                back + self.symbol_adjoint(excess, phase, weights),
                nuclear + jnp.sum(weights * jnp.sum(over, (1, 2))),
                square + jnp.sum(weights * jnp.sum(over * over, (1, 2))),
                jnp.maximum(violation, jnp.max(jnp.where(weights > 0, jnp.max(above, axis=1), 0))),
            )
            return carry, {"left": left, "along": along, "excess": excess}

        zero = jnp.zeros((), k.dtype)
        names = ("left", "values", "right", "along", "excess")
        xs = {name: getattr(active, name) for name in names}
        carry, xs = self.over_active(part, (jnp.zeros_like(taps), zero, zero, jnp.max(idle)), active, xs)
        back, nuclear, square, violation = carry
        if self.names:
            nuclear, square = lax.psum((nuclear, square), self.names)
            largest, violation = lax.pmax((largest, violation), self.names)
        active = active._replace(left=xs["left"], along=xs["along"], excess=xs["excess"])
        return _Pass(self.kernel_from(back), nuclear, square, largest, violation), active

    def multipliers(self, active: _Active, penalty):
        """P = rho E(Z), one block for each frequency."""
        rows = jnp.arange(len(active.order), dtype=jnp.int32)[:, None, None, None] < active.count
        excess = jnp.where(rows, penalty.astype(active.excess.dtype) * active.excess, 0)
        return jnp.zeros_like(excess).at[active.order].set(excess)

    def pulled(self, change, model: _Model, active: _Active, more):
        """Mᵀ of E'(Z)[M change] + U diag(more) Wᴴ; and how the change moves the values."""
        taps = self.taps(change)

        def step(back, phase, weights, x):
            blocks = self.symbol(taps, phase)
            out, moved = derivative_of_excess(blocks, x)
            return back + self.symbol_adjoint(out, phase, weights), {"moved": moved}

        xs = {"left": active.left, "right": active.right, "more": more, "moved": jnp.zeros_like(more)}
        back, xs = self.over_active(step, jnp.zeros_like(taps), active, {**xs, **model._asdict()})
        return self.kernel_from(back), xs["moved"]

    def step(self, k, active: _Active, penalty):
        """Returns the change of k that nearly minimises the piecewise quadratic model; its slope along it; |E(Z)|².

        Newton's method, whose steps are found by conjugate gradients. Both kinds of steps need one product with the
        model's matrix, and take turns in one loop, so that it is compiled once.
        """

        def look(state, pull, along, model):
            """At the change that the conjugate gradients have led to: goes on from there, or takes less of it."""
            gradient = state.change + state.x - self.kernel + k + penalty * pull
            square = jnp.sum(gradient * gradient)
            before, after = jnp.sum(state.gradient * state.x), jnp.sum(gradient * state.x)
            less = jnp.clip(before / (before - after), 0.1, 0.7)
            first = state.rounds == 0
            far = state._replace(x=less * state.x, x_moved=less * state.x_moved, tries=state.tries + 1)
            near = _Step(
                change=state.change + state.x, moved=state.moved + state.x_moved, gradient=gradient, model=model,
                x=jnp.zeros_like(k), x_moved=jnp.zeros_like(state.moved), r=-gradient, p=-gradient,
                square=square, first=square, start=jnp.where(first, square, state.start),
                count=jnp.zeros_like(state.count), tries=jnp.zeros_like(state.tries), rounds=state.rounds + 1,
                slope=jnp.where(first, gradient, state.slope),
            )  # fmt: skip
            overshot = ~first & (after > -0.5 * before) & (state.tries < _MODEL_STEPS)
            return jax.tree.map(lambda a, b: jnp.where(overshot, a, b), far, near)

        def conjugate(state, pull, along, model):
            q = state.p + penalty * pull
            rate = state.square / jnp.sum(state.p * q)
            r = state.r - rate * q
            square = jnp.sum(r * r)
            return state._replace(
                x=state.x + rate * state.p, x_moved=state.x_moved + rate * along, r=r,
                p=r + square / state.square * state.p, square=square, count=state.count + 1,
            )  # fmt: skip

        def looking(state):
            found = (state.square <= 1e-2 * state.first) | (state.count >= _STEPS) | (state.tries > 0)
            return (state.rounds == 0) | found

        def turn(state):
            new = looking(state)
            values = jnp.maximum(active.values + state.moved + state.x_moved, 0)
            model = lax.cond(new, lambda: model_of(values, self.bound), lambda: state.model)
            above = new & (values > self.bound)
            more = jnp.where(above, active.values - self.bound, 0)
            pull, along = self.pulled(jnp.where(new, state.change + state.x, state.p), model, active, more)
            return lax.cond(new, look, conjugate, state, pull, along, model)

        over = jnp.maximum(active.values - self.bound, 0)
        rows = jnp.arange(len(active.order), dtype=jnp.int32) < active.count
        square = jnp.sum(jnp.where(rows, self.weights[active.order] * jnp.sum(over * over, axis=(1, 2)), 0))
        square = lax.psum(square, self.names) if self.names else square
        zero, nothing, number = jnp.zeros_like(k), jnp.zeros_like(active.values), jnp.zeros((), k.dtype)
        start = _Step(
            change=zero, moved=nothing, gradient=zero, model=model_of(nothing, self.bound), x=zero, x_moved=nothing,
            r=zero, p=zero,
            square=number, first=number, start=number, count=jnp.zeros((), jnp.int32), tries=jnp.zeros((), jnp.int32),
            rounds=jnp.zeros((), jnp.int32), slope=zero,
        )  # fmt: skip
        going = lambda state: (
            (state.rounds == 0)
            | ((state.rounds <= _MODEL_STEPS) & (state.first > 1e-2 * state.start) & (state.first > 0))
        )
        end = lax.while_loop(going, turn, start)
        return end.change, jnp.sum(end.slope * end.change), square


class _Step(NamedTuple):
    """Of the loop that minimises the model."""

    change: jax.Array  # so far
    moved: jax.Array  # by which the values move so much
    gradient: jax.Array  # of the model there
    model: _Model  # there
    x: jax.Array  # conjugate gradients' step from there
    x_moved: jax.Array
    r: jax.Array
    p: jax.Array
    square: jax.Array  # |r|²
    first: jax.Array  # |r|² before the first of them
    start: jax.Array  # the same at the change 0
    count: jax.Array  # of conjugate gradients
    tries: jax.Array  # how often x has been shortened
    rounds: jax.Array  # of Newton's steps
    slope: jax.Array  # shaped like the kernel: the model's gradient at the change 0


def model_of(values, c) -> _Model:
    """Returns the linear map for the bound c."""
    above = values > c
    safe = jnp.where(above, values, 1)
    share = jnp.where(above, 1 - c / safe, 0)
    a, b = values[..., :, None], values[..., None, :]
    out_a, out_b = above[..., :, None], above[..., None, :]
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    both = c / jnp.where(out_a & out_b, a * b * (a + b), 1)
    # At a tie of a value above c with one that is not, neither differs from c by more than a rounding error.
    apart = jnp.where(high > low, high - low, 1) * jnp.where(out_a | out_b, high * (high + low), 1)
    divided = jnp.where(out_a & out_b, both, jnp.where(out_a | out_b, (high - c) / apart, 0))
    return _Model(values, share, divided)


def derivative_of_excess(blocks, x):
    r"""E'(Z)[H] + U diag(more) Wᴴ for blocks H; and how H moves the values.

    With X = UᴴHW, S the values' diagonal matrix and Q the divided differences (0 for two values below the bound),

    .. math:: E'(Z)[H] = H W \phi W^H + U S (Q \circ (S X + X^H S)) W^H.
    """
    n = blocks.shape[-1]
    column = lambda a: a[..., None].astype(blocks.dtype)
    row = lambda a: a[..., None, :].astype(blocks.dtype)

    def whole(blocks, x):
        turned = _matmul(blocks, x["right"])
        inner = _matmul(adjoint(x["left"]), turned)
        s = x["values"]
        mixed = x["divided"].astype(blocks.dtype) * (column(s) * inner + row(s) * adjoint(inner))
        mixed = column(s) * mixed + diagonal(x["more"]).astype(blocks.dtype)
        out = _matmul(turned * row(x["share"]) + _matmul(x["left"], mixed), adjoint(x["right"]))
        return out, jnp.diagonal(inner, axis1=-2, axis2=-1).real

    def thin(blocks, x):
        """The same if only the last few values are above the bound: Q is 0 but for the last rows and columns."""
        left, right, s = x["left"], x["right"], x["values"]
        last = lambda a: a[..., n - few :]
        turned = _matmul(blocks, last(right))
        inner = _matmul(adjoint(left), turned)
        other = _matmul(adjoint(right), _matmul(adjoint(blocks), last(left)))
        mixed = last(x["divided"]).astype(blocks.dtype) * (column(s) * inner + row(last(s)) * other)
        corner = diagonal(last(x["more"])).astype(blocks.dtype)
        corner = jnp.concatenate([jnp.zeros_like(mixed[..., : n - few, :]), corner], axis=-2)
        ours = turned * row(last(x["share"])) + _matmul(left, column(s) * mixed + corner)
        rest = jnp.where(np.arange(n)[:, None] < n - few, mixed * row(last(s)), 0)
        first = jnp.concatenate([ours, last(left)], axis=-1)
        second = jnp.concatenate([last(right), _matmul(right, rest)], axis=-1)
        moved = jnp.diagonal(inner[..., n - few :, :], axis1=-2, axis2=-1).real
        return _matmul(first, adjoint(second)), jnp.concatenate([jnp.zeros_like(s[..., : n - few]), moved], axis=-1)

    few = n // 8
    if few < 2:
        return whole(blocks, x)
    return lax.cond(jnp.any(x["share"][..., : n - few] > 0), whole, thin, blocks, x)


class _State(NamedTuple):
    """Of the loop over passes. The next pass is at k + rate * change."""

    k: jax.Array
    value: jax.Array  # of f at k
    change: jax.Array
    slope: jax.Array  # of f along the change
    rate: jax.Array
    margin: jax.Array  # frequencies count as active if a value is above the bound less this share of it
    forced: jax.Array  # whether to go on from k + rate * change whatever its value
    guessed: jax.Array  # whether the value and the slope were predicted when the multipliers were updated
    multipliers: jax.Array
    penalty: jax.Array
    best: jax.Array  # the nearest kernel so far that is inside
    distance: jax.Array  # its
    below: jax.Array  # the best lower bound so far on every such distance
    norm: jax.Array  # the kernel's
    passes: jax.Array


def by_newton(kernel, bound, plan, options, execution):
    half = half_grid(plan.grid)
    count, devices = len(half.weights), execution.mesh.size if execution.mesh else 1
    padding = -count % devices
    # The barrier keeps XLA from folding the phases into a constant the size of the whole grid.
    frequencies = lax.optimization_barrier(jnp.asarray(np.pad(half.frequencies, ((0, padding), (0, 0)))))
    weights = jnp.asarray(np.pad(half.weights, (0, padding)), kernel.dtype)
    share = functools.partial(_newton_share, plan=plan, options=options, execution=execution)
    if execution.mesh is None:
        return share(kernel, bound, frequencies, weights)
    specs = (jax.P(), jax.P(), *2 * [jax.P(execution.mesh.axis_names)])
    run = jax.shard_map(share, mesh=execution.automatic_mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
    return run(kernel, bound, frequencies, weights)


def _newton_share(kernel, bound, frequencies, weights, *, plan, options, execution):
    tolerance, max_passes = options
    problem = _Problem(kernel, bound, plan, execution, (frequencies, weights))
    unit, allowed = eps(kernel.dtype), rounding(kernel.shape, kernel.dtype)
    size, floor = frobenius(kernel), gap_floor(kernel)
    # A penalty beyond this would amplify the singular values' rounding errors to more than the gradient.
    largest_penalty = min(4e-3 / unit, 1e7)

    def going(state):
        near = state.distance - state.below <= jnp.maximum(tolerance * state.below, floor)
        inside = state.norm <= bound * (1 + inside_tolerance(kernel.dtype))
        return (state.passes == 0) | ((state.passes < max_passes) & ~near & ~inside & jnp.isfinite(state.norm))

    def one_pass(state):
        k = state.k + state.rate * state.change
        limit = bound * (1 - state.margin)
        found, active = problem.decompose(k, state.multipliers, state.penalty, limit)
        drawn = state.penalty * found.pull
        # Certificates: k, scaled into the ball; and the dual value, less what rounding can have added to it.
        upper = bound + found.violation + allowed * jnp.maximum(found.largest, bound)
        fitted = k * jnp.minimum(1, bound / upper)
        distance = frobenius(fitted - kernel)
        better = distance < state.distance
        nuclear = bound * state.penalty * found.nuclear
        dual = jnp.sum(drawn * kernel) - 0.5 * jnp.sum(drawn * drawn) - nuclear
        dual = dual - allowed / 4 * (frobenius(drawn) * size + nuclear)
        state = state._replace(
            best=jnp.where(better, fitted, state.best),
            distance=jnp.where(better, distance, state.distance),
            below=jnp.maximum(state.below, jnp.sqrt(jnp.maximum(2 * dual, 0))),
            norm=jnp.where(state.passes == 0, found.largest, state.norm),
            passes=state.passes + 1,
        )
        value = 0.5 * jnp.sum((k - kernel) ** 2) + state.penalty / 2 * found.square
        gradient = k - kernel + drawn
        enough = state.value + 1e-4 * state.rate * state.slope + 4 * unit * state.value

        def shorten(state):
            """The step was too long: values that were below the bound are above it. So those count from now on."""
            slope = jnp.sum(gradient * state.change)
            shorter = jnp.clip(state.slope / (state.slope - slope), 0.1, 0.7)
            shorter = state.rate * jnp.where(jnp.isfinite(shorter), shorter, 0.1)
            give_up = state.guessed | (shorter < _SHORTEST)
            margin = jnp.maximum(state.margin, jnp.minimum(found.violation / bound, _LARGEST_MARGIN))
            return state._replace(
                rate=jnp.where(state.guessed, 0, shorter), forced=give_up, guessed=jnp.zeros((), bool), margin=margin
            )

        def advance(state):
            gap = state.distance - state.below
            # The dual value is |gradient|²/2 less than with these multipliers it could be.
            update = jnp.sum(gradient * gradient) <= _INNER * gap * state.distance
            # What the violation adds to the gap is in inverse proportion to the penalty.
            growth = jnp.clip(1.5 * gap / jnp.maximum(tolerance * state.below, floor), 2, _GROWTH)
            penalty = jnp.minimum(jnp.where(update, growth, 1) * state.penalty, largest_penalty)
            multipliers = lax.cond(update, problem.multipliers, lambda *_: state.multipliers, active, state.penalty)
            over = jnp.maximum(active.values - bound, 0)
            expected = jnp.maximum(active.values - active.along + state.penalty / penalty * over, 0)
            expected = active._replace(values=jnp.where(update, expected, active.values))
            change, slope, square = problem.step(k, expected, penalty)
            guess = 0.5 * jnp.sum((k - kernel) ** 2) + penalty / 2 * square
            return state._replace(
                k=k, value=jnp.where(update, guess, value), change=change, slope=slope, rate=jnp.ones_like(state.rate),
                margin=jnp.where(state.rate < 1, state.margin, 0), forced=jnp.zeros((), bool), guessed=update,
                multipliers=multipliers, penalty=penalty,
            )  # fmt: skip

        return lax.cond(state.forced | ~(value > enough), advance, shorten, state)

    zero = jnp.zeros((), kernel.dtype)
    shape = len(problem.weights), problem.groups, problem.m, problem.n
    start = _State(
        k=kernel, value=zero, change=jnp.zeros_like(kernel), slope=zero, rate=jnp.ones((), kernel.dtype), margin=zero,
        forced=jnp.ones((), bool), guessed=jnp.zeros((), bool),
        multipliers=lax.complex(*2 * [jnp.zeros(shape, kernel.dtype)]),
        penalty=jnp.full((), _FIRST_PENALTY, kernel.dtype),
        best=kernel, distance=jnp.full((), jnp.inf, kernel.dtype), below=zero, norm=zero,
        passes=jnp.zeros((), jnp.int32),
    )  # fmt: skip
    end = lax.while_loop(going, one_pass, start)
    return end.best, ProjectionInfo(end.distance, end.distance - end.below, floor, end.passes, end.norm)


def _matmul(a, b):
    """Returns a product of complex matrices as one of real ones: on a CPU XLA's own takes up to twice as long."""
    m, n = a.shape[-2], b.shape[-1]
    left = jnp.concatenate([a.real, a.imag], axis=-2)
    right = jnp.concatenate([b.real, b.imag], axis=-1)
    parts = jnp.matmul(left, right, precision=_HIGHEST)
    real = parts[..., :m, :n] - parts[..., m:, n:]
    return lax.complex(real, parts[..., :m, n:] + parts[..., m:, :n])


def frobenius(kernel):
    return jnp.sqrt(jnp.sum(kernel * kernel))
