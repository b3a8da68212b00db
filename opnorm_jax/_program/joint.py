r"""Multipliers for a run of stages, one for each channel of each diagonal, that minimise the bound of the whole run.

``sdp.py`` searches one multiplier for each diagonal, stage after stage, for the least value of that stage. Here all of
them move together, along the gradient of the value behind the last stage.

With :math:`t = \max_v 2 \Re w^H B v - v^H Q v = w^H B Q^{-1} B^H w`, the derivative of t with respect to a multiplier is
that of :math:`-v^H Q v` at the v that is best, :math:`v = Q^{-1} B^H w`: the sum of :math:`2 (d - a z)^* (b z - d)` over
its channel. The derivative with respect to :math:`R = G G^H` of the stage's input s = G u is :math:`\eta \eta^H`, where
:math:`\eta = R^{-1} s` is that of the remaining terms with respect to s.

Whatever comes out of this, ``certify`` decides what holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opnorm_jax._blocks.linalg import adjoint
from opnorm_jax._geometry import half_grid
from opnorm_jax._program import sdp
from opnorm_jax._program.sdp import Stage


class Leg(NamedTuple):
    """A stage of a run, or, where there is none, the sum over all pixels of an image on a circle."""

    stage: Stage | None
    arrays: tuple[Any, ...] = ()
    multipliers: Any = ()
    image: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()


class _Linear:
    """A stage's linear part at half of the frequencies, and what one pass through it leaves for the way back."""

    def __init__(self, leg: Leg):
        stage = self.stage = leg.stage
        self.half = half_grid(stage.coarse_grid)
        k = self.half.frequencies
        forms = sdp._forms(sdp._NUMPY, stage, leg.arrays, None, k)
        sides, many = stage.sides, len(k)
        join = lambda form, rows: sdp._joined(np, {(0, n): part for n, part in form.items()}, [[rows], sides], many, np.float64)
        self.b = join(forms[-1], stage.side(stage.steps[-1]))
        self.f = np.concatenate([join(form, side) for form, side in zip(forms, sides[1:])], axis=1) if sides[1:] else np.zeros((many, 0, sides[0]), complex)
        steps = [stage.steps[n] for n in stage.diagonals]
        ends = [(0.0, 1.0) if step.kind == "mask" else tuple(map(float, leg.arrays[step.array])) for step in steps]
        spread = lambda n: np.concatenate([np.full(side, end[n]) for side, end in zip(sides[1:], ends)] or [[]])
        self.low, self.high = spread(0), spread(1)
        # The number of the multiplier of each row: an alias has that of its channel.
        starts = np.cumsum([0, *(step.channels for step in steps)])
        self.rows = np.concatenate([start + np.arange(side) % step.channels for start, side, step in zip(starts, sides[1:], steps)] or [np.zeros(0, int)]).astype(int)
        self.count = int(starts[-1])
        copies = math.prod(stage.strides)
        aliases = np.moveaxis(np.indices(stage.strides), 0, -1).reshape(copies, len(stage.strides))
        fine = k[:, None] + aliases * np.asarray(stage.coarse_grid, int)
        self.flat = sdp._flat(fine, stage.grid)
        self.copies = copies

    def forward(self, multipliers, roots):
        """Returns B Q^-1 Bᴴ; None where a Q is not positive definite."""
        m = self.m = multipliers[self.rows]
        first = self.stage.sides[0]
        f, b = self.f.copy(), self.b.copy()
        for x in (f, b):
            if roots is not None and len(roots):
                c = self.stage.channels
                for a in range(self.copies):
                    x[..., a * c : (a + 1) * c] = x[..., a * c : (a + 1) * c] @ roots[:, a]
            x[..., first:] /= np.sqrt(2 * m)
        q = np.zeros((len(f), f.shape[-1], f.shape[-1]), complex)
        part = -(np.sqrt(m / 2) * (self.low + self.high))[:, None] * f
        q[:, first:] += part
        q += adjoint(q)
        if np.any(self.low * self.high):
            q += adjoint(f) @ ((2 * m * self.low * self.high)[:, None] * f)
        q[:, np.arange(q.shape[-1]), np.arange(q.shape[-1])] += 1
        try:
            np.linalg.cholesky(q)
        except np.linalg.LinAlgError:
            return None
        x = self.x = np.linalg.solve(q, adjoint(b))
        self.z = f @ x
        self.d = x[:, first:] / np.sqrt(2 * m)[:, None]
        out = b @ x
        return (out + adjoint(out)) / 2

    def backward(self, w):
        d, z = self.d, self.z
        low, high = self.low[:, None], self.high[:, None]
        residual = 2 * np.sum(((d - low * z) * ((high * z - d) @ w.swapaxes(-1,-2).conj().conj() if False else (d - low * z) * ((high * z - d) @ w).conj())).real, (0, -1)) if False else 2 * np.sum(((d - low * z) * ((high * z - d) @ w).conj()).real, (0, -1))
        gradient = np.zeros(self.count)
        np.add.at(gradient, self.rows, residual)
        first = self.stage.sides[0]
        lift = self.m[:, None] * ((low + high) * d - 2 * low * high * z)
        eta = adjoint(self.b[..., :first]) + adjoint(self.f[..., :first]) @ lift
        c = self.stage.channels
        eta = eta.reshape(len(eta), self.copies, c, -1)
        return gradient, eta @ w[:, None] @ adjoint(eta)


def weights(image, grid):
    w = np.ones(())
    for n, m in zip(image, grid, strict=True):
        turns = np.outer(np.arange(m), np.arange(n)) % m
        w = np.multiply.outer(w, abs(np.exp(2j * np.pi * turns / m).sum(1)) ** 2 / m)
    return w.reshape(-1)


class Run:
    def __init__(self, legs):
        self.legs = [leg if leg.stage is None else _Linear(leg) for leg in legs]
        self.counts = [0 if isinstance(l, Leg) else l.count for l in self.legs]
        self.first = not isinstance(self.legs[0], Leg)

    def value(self, theta, power):
        """log of smoothed max and gradient"""
        lam = np.split(np.exp(theta), np.cumsum(self.counts)[:-1])
        outs, r, half = [], None, None
        for leg, m in zip(self.legs, lam):
            if isinstance(leg, Leg):
                w = weights(leg.image, leg.grid)
                total = np.zeros(len(half.frequencies))
                np.add.at(total, half.expand, w)
                r = np.sum(total[:, None, None] * r, 0, keepdims=True).real + 0j
                outs.append((total, half))
                half = half_grid(())
                continue
            roots = None
            if r is not None:
                size = np.trace(r, axis1=-2, axis2=-1).real.max()
                g = np.linalg.cholesky(r + 1e-13 * size * np.eye(r.shape[-1]))
                where = half.expand[leg.flat]
                mir = self.mirrored(half, leg.flat, leg.stage.grid)
                roots = g[where]
                roots = np.where(mir[..., None, None], roots.conj(), roots)
                outs.append((where, mir, len(g)))
            else:
                outs.append(None)
            r = leg.forward(m, roots)
            if r is None:
                return np.inf, None
            half = leg.half
        e, v = np.linalg.eigh(r)
        e = np.maximum(e, 0)
        top = e.max()
        j = np.sum((e / top) ** power) ** (1 / power)
        w = (v * ((e / top / j) ** (power - 1))[:, None, :]) @ adjoint(v) / (top * j)
        grads = []
        for leg, out in zip(self.legs[::-1], outs[::-1]):
            if isinstance(leg, Leg):
                total, h = out
                w = total[:, None, None] * w
                grads.append(np.zeros(0))
                continue
            g, w2 = leg.backward(w)
            grads.append(g)
            if out is not None:
                where, mir, n = out
                w2 = np.where(mir[..., None, None], w2.conj(), w2)
                w = np.zeros((n, *w2.shape[-2:]), complex)
                np.add.at(w, where.ravel(), w2.reshape(-1, *w2.shape[-2:]))
        grad = np.concatenate(grads[::-1]) * np.exp(theta)
        return math.log(top * j), grad

    @staticmethod
    def mirrored(half, flat, grid):
        points = np.moveaxis(np.indices(grid), 0, -1).reshape(len(half.expand), -1)
        return (half.frequencies[half.expand] != points).any(-1)[flat]


def lbfgs(fun, theta, iterations, memory=10, report=None):
    f, g = fun(theta)
    pairs = []
    for it in range(iterations):
        q, al = g.copy(), []
        for s, y in reversed(pairs):
            a = s @ q / (s @ y); al.append(a); q -= a * y
        if pairs:
            s, y = pairs[-1]
            q *= (s @ y) / (y @ y)
        else:
            q *= 0.5 / max(np.abs(q).max(), 1e-300)
        for (s, y), a in zip(pairs, reversed(al)):
            q += s * (a - y @ q / (s @ y))
        step = -q
        if step @ g > 0:
            step = -g; pairs = []
        biggest = np.abs(step).max()
        if biggest > 1: step /= biggest
        t = 1.0
        for _ in range(12):
            new, gn = fun(theta + t * step)
            if new <= f + 1e-4 * t * (step @ g): break
            t *= 0.4
        else:
            break
        s, y = t * step, gn - g
        if s @ y > 1e-12 * np.linalg.norm(s) * np.linalg.norm(y): pairs = [*pairs, (s, y)][-memory:]
        theta, f, g = theta + s, new, gn
        if report: report(it, f)
    return theta, f
