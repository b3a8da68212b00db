r"""Multipliers for a run of stages, one for each channel of each diagonal, that are best for the whole run.

``sdp.py`` searches one multiplier for each diagonal, stage after stage, for the least value behind that stage. Here all
of them move together, along the gradient of the value behind the last stage. By

.. math:: w^H B Q^{-1} B^H w = \max_v 2 \Re w^H B v - v^H Q v

the derivative with respect to a multiplier is that of :math:`-v^H Q v` at the best v, :math:`Q^{-1} B^H w`: the sum of
:math:`2 (d - a z)^* (b z - d)` over its channel. The derivative with respect to :math:`G G^H`, where G is the root of
the stage's input s, is :math:`\eta \eta^H`; :math:`\eta` is the derivative of all terms with respect to s. It is handed
back to the stage before.

The frequencies looked at are those of a smaller circle where the stage's own has too many. ``certify`` decides what
holds, on all of them. Where that is no less than before, the run keeps its bound. Everything is computed by NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opnorm_jax._blocks.linalg import adjoint
from opnorm_jax._geometry import half_grid
from opnorm_jax._program.sdp import Linear, Stage, certify, linear_part, mirrored, summed

_TRIES = 60
"""The value and its gradient are computed so many times, where not all frequencies are looked at.

More would fit the multipliers to the frequencies that are.
"""

_MOST_TRIES = 600
"""So many times at most where all are looked at."""

_OPERATIONS = 4e8
"""At least so many operations are allowed for one value and its gradient, about 0.3 seconds.

What is counted are cubes of the sides of matrices. A larger run may take a seventh of what all its frequencies take.
"""

_LEAST_TRIES = 16
"""Fewer computations than this are not worth beginning."""

_POWERS = (8, 30, 120)
"""The largest eigenvalue is smoothed by sums of such powers, one after the other."""

_SHARES = (0.5, 0.75, 1)
"""So much of all tries is used up, at most, when each of them ends."""

_FACTORS = (1, 0.95, 0.8)
"""A stage's multipliers are tried with these factors, until there is a certificate at all frequencies."""

_CAPS = (1, 0.6, 0.3)
"""Then each is at most so many times that of the search before."""

_PEAK = 3
"""A certificate whose roots are larger somewhere than so many times what was expected, is avoided.

Between the frequencies that were looked at, Q can be nearly singular. The stage behind would suffer.
"""

_MARGINS = (0.02, 0.05)
"""Where not all frequencies are looked at, all eigenvalues of Q are at least this. Its diagonal is about 1.

The second is for runs that the first leaves without a certificate at the other frequencies.
"""


class Leg(NamedTuple):
    """A stage of a run or, where there is none, the sum over all pixels of an image on a circle.

    The multipliers are one for each channel of each diagonal, for an input of the run of length 1.
    """

    stage: Stage | None
    arrays: tuple[Any, ...] = ()
    multipliers: np.ndarray = np.zeros(0)
    image: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    sample: tuple[int, ...] = ()  # the circle that is looked at in place of the image's own


def improved(legs: Sequence[Leg], gain: float) -> float:
    """Returns a bound on what a run of stages gains, ``gain`` or less, rounded upwards."""
    sampled = _sampled(legs) if any(leg.multipliers.size for leg in legs) else None
    if sampled is None:
        return gain
    sample, tries, is_whole = sampled
    for margin in [0.0] if is_whole else _MARGINS:
        found = _optimised(_RunValue(sample, margin), [leg.multipliers for leg in legs], tries)
        if found is not None and (own := _certified(legs, found)) < math.inf:
            return min(gain, own)
    return gain


class _Found(NamedTuple):
    """What was found for a leg; multipliers are relative to the mean trace of what it is given."""

    multipliers: np.ndarray
    before: np.ndarray  # the multipliers that there were
    peak: float = math.inf  # the largest trace behind it, over the mean


def _certified(legs: Sequence[Leg], found: Sequence[_Found]) -> float:
    """Returns the gain of a run with certainty; infinity where there is no certificate."""
    scale, roots, size = 1.0, None, 1.0
    for leg, own in zip(legs, found, strict=True):
        if leg.stage is None:
            roots = summed(roots, leg.image, leg.grid, np.float64)
            size = float(np.sum(np.abs(roots) ** 2))
            continue
        for tried in _attempts(own):
            out, top = certify(leg.stage, leg.arrays, tried / size, roots, np.float64)
            if not own.multipliers.size:
                break
            if 0 < top < math.inf and np.divide(*_peak_and_mean(leg.stage, out)) <= _PEAK * own.peak:
                break
        if not 0 < top < math.inf:
            return math.inf
        gain = math.sqrt(float(top)) * (1 + 2**-50)
        scale, roots = scale * gain * (1 + 2**-50), out / gain
        _, size = _peak_and_mean(leg.stage, roots)
    return scale


def _attempts(found: _Found) -> list[np.ndarray]:
    """Returns what is tried one after the other. Smaller multipliers make Q more definite."""
    scaled = [factor * found.multipliers for factor in _FACTORS]
    return scaled + [np.minimum(found.multipliers, cap * found.before) for cap in _CAPS]


def _peak_and_mean(stage: Stage, roots: np.ndarray) -> tuple[float, float]:
    """Returns the largest and the mean trace of G Gᴴ over half of the frequencies, as the search takes them."""
    expand = half_grid(stage.coarse_grid).expand
    traces = np.bincount(expand, np.sum(np.abs(roots) ** 2, axis=(1, 2))) / np.bincount(expand)
    return float(traces.max()), float(traces.mean())


def _optimised(run: _RunValue, multipliers: Sequence[np.ndarray], tries: int) -> list[_Found] | None:
    """Returns multipliers for every leg, relative to what it is given, or None where there is nowhere to begin."""
    at = run.relative(multipliers)
    if at is None:
        return None
    best = _Incumbent(run, at)
    for power, share in zip(_POWERS, _SHARES, strict=True):
        descend(lambda logs, power=power: best.value(logs, power), best.at, int(share * tries) - best.tries)
    run.value(best.at, 1)  # so that every part has the Gram matrices of these multipliers
    peaks = [np.trace(part.gram, axis1=-2, axis2=-1).real.max() for part in run.parts]
    parts = np.split(np.exp(best.at), run.ends), np.split(np.exp(at), run.ends)
    return [_Found(*each) for each in zip(*parts, peaks, strict=True)]


def _sampled(legs: Sequence[Leg]) -> tuple[list[Leg], int, bool] | None:
    """Returns a run on a circle with few enough points, how often it may be computed, and whether no point is left out.

    None if it is too large.
    """
    stages = [leg.stage for leg in legs if leg.stage is not None and leg.stage.grid]
    strides = np.prod([stage.strides for stage in stages], axis=0) if stages else np.ones(0, int)
    whole = np.asarray(stages[0].grid if stages else (), int) // strides
    allowed = max(_OPERATIONS, _operations(legs) / 7)
    for points in range(int(max(whole, default=1)), 0, -1):
        sample = _on_circle(legs, np.minimum(whole, points) * strides)
        if _operations(sample) <= allowed or points <= 4:
            break
    is_whole = _operations(sample) == _operations(legs)
    tries = int(min(_MOST_TRIES if is_whole else _TRIES, _TRIES * allowed / _operations(sample)))
    return (sample, tries, is_whole) if tries >= _LEAST_TRIES else None


def _on_circle(legs: Sequence[Leg], grid: np.ndarray) -> list[Leg]:
    """Returns the same run on another circle. A sum over pixels keeps its own, and has the new one as its sample."""
    found = []
    for leg in legs:
        if leg.stage is not None and leg.stage.grid:
            stage = leg.stage._replace(grid=tuple(map(int, grid)))
            leg, grid = leg._replace(stage=stage), np.asarray(stage.coarse_grid, int)
        elif leg.stage is None:
            leg = leg._replace(sample=tuple(map(int, grid)))
        found.append(leg)
    return found


def _operations(legs: Sequence[Leg]) -> float:
    """Returns about how many operations a value and its gradient take, but for a constant factor."""
    stages = [leg.stage for leg in legs if leg.stage is not None]
    work = lambda side, *rest: (sum(rest) + 1) ** 2 * (side + sum(rest))
    return float(sum((math.prod(stage.coarse_grid) / 2 + 1) * work(*stage.sides) for stage in stages))


class _Incumbent:
    """Remembers the multipliers of the least value, which need not be those of the least smoothed one."""

    def __init__(self, run: _RunValue, at: np.ndarray):
        self.run, self.at, self.top, self.tries = run, at, math.inf, 0

    def value(self, logs: np.ndarray, power: float) -> tuple[float, np.ndarray]:
        self.tries += 1
        top, value, gradient = self.run.value(logs, power)
        if top < self.top:
            self.at, self.top = logs, top
        return value, gradient


class _RunValue:
    """A run of stages as a function of its multipliers' logarithms.

    Behind each stage what is known is divided by its size, and the multipliers of the next one are relative to that. So
    those of one stage hardly change which are best in the next.
    """

    def __init__(self, legs: Sequence[Leg], margin: float):
        self.parts = [_PixelSum(leg) if leg.stage is None else _StageValue(leg, margin) for leg in legs]
        self.ends = np.cumsum([part.count for part in self.parts])[:-1]

    def relative(self, multipliers: Sequence[np.ndarray]) -> np.ndarray | None:
        """Returns logarithms of multipliers that are given for an input of length 1."""
        gram: Any = None
        size, half, found = 1.0, None, []
        for part, own in zip(self.parts, multipliers, strict=True):
            found.append(np.log(own * size))
            gram = part.forward(own * size, gram, half)
            if gram is None:
                return None
            half, own_size = part.half, _size(gram)
            gram, size = gram / own_size, size * own_size
        return np.concatenate(found)

    def value(self, logs: np.ndarray, power: float) -> tuple[float, float, np.ndarray]:
        """Returns the logarithm of the last stage's largest value, the same smoothed, and the gradient of that."""
        gram: Any = None
        half, log = None, 0.0
        for part, own in zip(self.parts, np.split(logs, self.ends), strict=True):
            gram = part.forward(np.exp(own), gram, half)
            if gram is None:
                return math.inf, math.inf, np.zeros(len(logs))
            half, part.size = part.half, _size(gram)
            gram = part.gram = gram / part.size
            log += math.log(part.size)
        values, vectors = np.linalg.eigh(gram)
        top = values.max()
        ratios = np.maximum(values / top, 0)
        smooth = np.sum(ratios**power) ** (1 / power)
        by_gram = (vectors * (ratios / smooth)[:, None, :] ** (power - 1)) @ adjoint(vectors) / (top * smooth)
        gradients = []
        for part in reversed(self.parts):
            # The derivative through gram / size and log(size), of which size is the mean trace.
            inner = np.sum(by_gram * part.gram.conj()).real
            by_gram = by_gram / part.size + (1 - inner) / (part.size * len(by_gram)) * np.eye(by_gram.shape[-1])
            gradient, by_gram = part.backward(by_gram)
            gradients.append(gradient)
        return log + math.log(top), log + math.log(top * smooth), np.concatenate(gradients[::-1])


def _size(gram: np.ndarray) -> float:
    """Returns the mean trace."""
    return float(np.trace(gram, axis1=-2, axis2=-1).real.mean())


class _StageValue:
    """A stage at half of its frequencies. What a way forward computes is kept for the way back."""

    def __init__(self, leg: Leg, margin: float):
        assert leg.stage is not None
        stage = self.stage = leg.stage
        self.margin = margin
        self.half = half_grid(stage.coarse_grid)
        self.linear: Linear = linear_part(stage, leg.arrays, self.half.frequencies)
        self.first = stage.sides[0]
        steps = [stage.steps[n] for n in stage.diagonals]
        starts = np.cumsum([0, *(step.channels for step in steps)])
        self.count = int(starts[-1])
        # The number of the multiplier of each row: all aliases share that of their channel.
        rows = [start + np.arange(stage.side(step)) % step.channels for start, step in zip(starts, steps)]
        self.rows = np.concatenate([np.zeros(0, int), *rows])
        self.size, self.gram = 1.0, np.zeros(0)

    def forward(self, multipliers: np.ndarray, gram: Any, half: Any) -> np.ndarray | None:
        """Returns B Q^-1 Bᴴ, given G Gᴴ at the frequencies of the stage before; None where a Q is not positive."""
        first, weights = self.first, multipliers[self.rows]
        self.weights = weights
        roots = self._roots(gram, half)
        f, b = (self._scaled(x, roots) for x in (self.linear.f, self.linear.b))
        best = self._solved(f, adjoint(b))
        if best is None:
            return None
        self.z, self.d = f @ best, best[:, first:] / np.sqrt(2 * weights)[:, None]
        out = b @ best
        out = (out + adjoint(out)) / 2
        return out if np.isfinite(out).all() and _size(out) > 0 else None

    def _solved(self, f: np.ndarray, b: np.ndarray) -> np.ndarray | None:
        """Returns Q^-1 b; None where Q is not positive definite, which Cholesky factorisations find out.

        The stage's input is eliminated first: of Q = [[corner, crossᴴ], [cross, inner]] the Schur complement
        inner - cross corner^-1 crossᴴ is left. Where no slope interval has two ends other than 0, corner is I.
        """
        low, high, first, weights = self.linear.low, self.linear.high, self.first, self.weights
        start, rest = f[..., :first], f[..., first:]
        outer = -(np.sqrt(weights / 2) * (low + high))[:, None]
        cross, inner = outer * start, outer * rest
        inner = inner + adjoint(inner) + (1 - self.margin) * np.eye(inner.shape[-1])
        try:
            if np.any(low * high):
                both = (2 * weights * low * high)[:, None]
                corner = np.eye(first) + adjoint(start) @ (both * start)
                np.linalg.cholesky(corner)
                cross = cross + adjoint(rest) @ (both * start)
                inner = inner + adjoint(rest) @ (both * rest)
                right = np.linalg.solve(corner, np.concatenate([adjoint(cross), b[:, :first]], axis=-1))
            else:
                right = np.concatenate([adjoint(cross), b[:, :first]], axis=-1)
            side = inner.shape[-1]
            inner = inner - cross @ right[..., :side]
            np.linalg.cholesky(inner)
            inner = inner + self.margin * np.eye(side)
            ends = np.linalg.solve(inner, b[:, first:] - cross @ right[..., side:])
            return np.concatenate([right[..., side:] - right[..., :side] @ ends, ends], axis=1)
        except np.linalg.LinAlgError:
            return None

    def _roots(self, gram: Any, half: Any) -> np.ndarray | None:
        """Returns the root of every alias, (frequencies, aliases, c, c)."""
        self.before = None
        if gram is None:
            return None
        where = half.expand[self.linear.points]
        turned = mirrored(half, self.stage.grid)[self.linear.points][..., None, None]
        self.before = where, turned, len(gram)
        roots = np.linalg.cholesky(gram + 1e-13 * _size(gram) * np.eye(gram.shape[-1]))[where]
        return np.where(turned, roots.conj(), roots)

    def _scaled(self, form: np.ndarray, roots: np.ndarray | None) -> np.ndarray:
        """Returns a form in the variables of Q: u, and each diagonal divided by the root of 2 lambda."""
        start = form[..., : self.first]
        if roots is not None:
            many, rows, copies = *start.shape[:2], roots.shape[1]
            start = (start.reshape(many, rows, copies, roots.shape[-1]).swapaxes(1, 2) @ roots).swapaxes(1, 2)
            start = start.reshape(many, rows, self.first)
        return np.concatenate([start, form[..., self.first :] / np.sqrt(2 * self.weights)], axis=-1)

    def backward(self, by_output: np.ndarray) -> tuple[np.ndarray, Any]:
        """Returns derivatives by the multipliers' logarithms and by G Gᴴ, from that by the stage's own result."""
        low, high = self.linear.low[:, None], self.linear.high[:, None]
        d, z, weights = self.d, self.z, self.weights[:, None]
        terms = (d - low * z) * ((high * z - d) @ by_output).conj()
        gradient = np.bincount(self.rows, 2 * np.sum(terms.real, axis=(0, -1)) * self.weights, self.count)
        if self.before is None:
            return gradient, None
        lift = weights * ((low + high) * d - 2 * low * high * z)
        start = lambda form: adjoint(form[..., : self.first])
        eta = start(self.linear.b) + start(self.linear.f) @ lift
        where, turned, many = self.before
        eta = eta.reshape(len(eta), where.shape[1], self.stage.channels, eta.shape[-1])
        parts = eta @ by_output[:, None] @ adjoint(eta)
        out = np.zeros((many, *parts.shape[-2:]), complex)
        np.add.at(out, where, np.where(turned, parts.conj(), parts))
        return gradient, out


class _PixelSum:
    """The sum over all pixels of an image."""

    count, size, gram = 0, 1.0, np.zeros(0)

    def __init__(self, leg: Leg):
        self.half, self.of_points = half_grid(()), np.ones(())
        for n, m, points in zip(leg.image, leg.grid, leg.sample, strict=True):
            turns = np.outer(np.arange(points), np.arange(n)) % points
            own = abs(np.exp(2j * np.pi * turns / points).sum(1)) ** 2
            # Frequency 0 has its own weight, n^2 / m; the others share the rest of all weights' sum, n.
            own *= (n - n**2 / m) / max(own[1:].sum(), 1e-9)
            own[0] = n**2 / m
            self.of_points = np.multiply.outer(self.of_points, own)

    def forward(self, multipliers: np.ndarray, gram: Any, half: Any) -> np.ndarray:
        self.weights = np.bincount(half.expand, self.of_points.ravel(), len(gram))
        return np.sum(self.weights[:, None, None] * gram, axis=0, keepdims=True).real.astype(complex)

    def backward(self, by_output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(0), self.weights[:, None, None] * by_output


def descend(
    value: Callable[[np.ndarray], tuple[float, np.ndarray]], at: np.ndarray, tries: int, memory: int = 10
) -> np.ndarray:
    """Minimises a function by L-BFGS, and keeps away from where it is infinite.

    More than half of the values can be infinite here, for which the line searches of SciPy and optax are not made.
    (With a finite penalty in their place, SciPy's left a bound on a ResNet-20 that was twice as large.)

    Args:
      value: returns the function's value and gradient.
      at: where to begin.
      tries: how often the function may be computed at most. Once ten steps gain less than 1e-4, it is enough.
      memory: of so many steps the changes of the gradient are remembered.
    """
    best, gradient = value(at)
    tries -= 1
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    values: list[float] = []
    while tries > 0:
        values.append(best)
        if len(values) > memory and values[-1 - memory] - best < 1e-4:
            break
        step = _quasi_newton_step(gradient, pairs)
        step /= max(1.0, np.abs(step).max())
        slope, length, outside, found = float(step @ gradient), 1.0, False, None
        while tries > 0:
            new, new_gradient = value(at + length * step)
            tries -= 1
            if new <= best + 1e-4 * length * slope:
                found = length, new, new_gradient
                if not outside:
                    break
                outside = False  # half of the way to the border is kept free
            elif found is not None:
                break
            else:
                outside = outside or not np.isfinite(new)
            length *= 0.5
        if found is None:
            if not pairs:
                break
            pairs = []
            continue
        length, best, new_gradient = found
        moved, change = length * step, new_gradient - gradient
        if moved @ change > 1e-12 * np.linalg.norm(moved) * np.linalg.norm(change):
            pairs = [*pairs, (moved, change)][-memory:]
        at, gradient = at + moved, new_gradient
    return at


def _quasi_newton_step(gradient: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the step of L-BFGS; where nothing is remembered that of steepest descent, with 0.5 as largest entry."""
    if not pairs:
        return -gradient * (0.5 / max(np.abs(gradient).max(), 1e-300))
    step, kept = -gradient, []
    for moved, change in reversed(pairs):
        part = (moved @ step) / (moved @ change)
        kept.append(part)
        step = step - part * change
    moved, change = pairs[-1]
    step = step * (moved @ change) / (change @ change)
    for (moved, change), part in zip(pairs, reversed(kept)):
        step = step + moved * (part - (change @ step) / (moved @ change))
    return step
