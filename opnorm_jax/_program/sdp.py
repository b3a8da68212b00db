r"""The semidefinite bound of one stage of a network, frequency by frequency.

A *stage* maps changes of one signal to changes of another by convolutions, sums, and diagonals: elementwise functions,
whose slopes lie in an interval, and the masks that crop zero-padded results. All maps live on one circle of pixels,
so that everything but the diagonals is a small matrix at each frequency.

What is known of the stage's input s is a *root* G at each frequency: s = G u with :math:`\sum_\omega |u|^2 \le 1` for a
change of the network's input of length 1. For a diagonal d of slopes in [a, b] after a linear form z, the sum over all
pixels of :math:`(d - a z)(b z - d)` is not negative, whatever positive multiplier :math:`\lambda` each channel has. So
with v = (u, d1, d2, ...)

.. math:: v^H Q v = |u|^2 - \sum_k 2 \lambda_k (d_k - a_k z_k)^H (b_k z_k - d_k) \le |u|^2,

summed over the frequencies. Where every Q is positive definite and t = B v is the stage's output, the Schur complement
gives :math:`t = G' u'` with :math:`G' G'^H = B Q^{-1} B^H`: the root for the next stage. This is LipSDP (Fazlyab et
al., 2019) cut into the blocks of the discrete Fourier transform.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from opnorm_jax._blocks.linalg import adjoint
from opnorm_jax._geometry import half_grid
from opnorm_jax._rounding import semidefinite_rounding


class Step(NamedTuple):
    """One operation of a stage. Values are numbered: 0 is the stage's input, n the result of step n - 1."""

    kind: str  # "conv", "scale", "sum", "concatenate", "slope" or "mask"
    sources: tuple[int, ...]
    channels: int  # of the result
    coarse: bool = False  # whether the result lives on the coarse grid of a strided stage
    array: int = -1  # of a convolution: its kernel; of a scale: a factor per channel; of a slope: its interval
    lows: tuple[int, ...] = ()  # of a convolution: pixels of padding at the low end of each axis
    dilation: tuple[int, ...] = ()
    strided: bool = False
    masked: bool = False  # whether a convolution's result is still to be cropped to its image
    signs: tuple[int, ...] = ()


class Stage(NamedTuple):
    """A part of a network, static. ``steps`` end in the output."""

    channels: int  # of the input
    steps: tuple[Step, ...]
    grid: tuple[int, ...]  # pixels of the circle, an axis
    strides: tuple[int, ...]

    @property
    def coarse_grid(self) -> tuple[int, ...]:
        return tuple(m // s for m, s in zip(self.grid, self.strides))

    @property
    def diagonals(self) -> list[int]:
        """The steps that are diagonals of slopes."""
        return [n for n, step in enumerate(self.steps) if step.kind in ("slope", "mask")]

    def side(self, step: Step | None) -> int:
        """Counts the numbers of a value at one frequency of the coarse grid: fine ones have all their aliases there."""
        channels, coarse = (step.channels, step.coarse) if step else (self.channels, False)
        return channels * (1 if coarse else math.prod(self.strides))

    @property
    def sides(self) -> list[int]:
        """The sides of Q's blocks."""
        return [self.side(None), *(self.side(self.steps[n]) for n in self.diagonals)]


class Arithmetic(NamedTuple):
    """What computes: NumPy in double precision with numbers that are known, jax with traced ones.

    Both compute with stacks of matrices, one for each frequency of a chunk.
    """

    xp: Any
    dtype: Any
    cholesky: Callable[[Any], Any]  # lower factors; NaN where a matrix is not positive definite
    solve: Callable[[Any, Any], Any]  # L^-1 B
    top: Callable[[Any], tuple[Any, Any]]  # the largest eigenvalue and its vector
    largest: Callable[[Any], Any]  # the largest eigenvalue
    still: Callable[[Any], Any]  # takes no part in derivatives
    chunk: int | None  # frequencies at a time; None: as many as fit

    def mul(self, a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST) if self.xp is jnp else np.matmul(a, b)


def _numpy_cholesky(matrices):
    try:
        return np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        return np.full_like(matrices, np.nan)


def _jax_cholesky(matrices):
    return lax.linalg.cholesky(matrices[0], symmetrize_input=False)[None]


def _jax_top(matrices):
    vectors, values = lax.linalg.eigh(matrices[0], symmetrize_input=False)
    return values[None, -1], vectors[None, :, -1]


def _numpy_top(matrices):
    if not np.isfinite(matrices).all():
        return np.full(len(matrices), np.nan), np.full(matrices.shape[:-1], np.nan, matrices.dtype)
    values, vectors = np.linalg.eigh(matrices)
    return values[:, -1], vectors[:, :, -1]


def _numpy_largest(matrices):
    return np.linalg.eigvalsh(matrices)[:, -1] if np.isfinite(matrices).all() else np.full(len(matrices), np.nan)


_NUMPY = Arithmetic(np, np.float64, _numpy_cholesky, np.linalg.solve, _numpy_top, _numpy_largest, lambda x: x, None)


def _jax_arithmetic(dtype):
    # One matrix a call: see _blocks/factor.py.
    solve = lambda factor, b: lax.linalg.triangular_solve(factor[0], b[0], left_side=True, lower=True)[None]
    return Arithmetic(jnp, dtype, _jax_cholesky, solve, _jax_top, lambda q: _jax_top(q)[0], lax.stop_gradient, 1)


def certify(stage: Stage, arrays: Sequence[Any], multipliers: Any, roots: Any, dtype: Any) -> tuple[Any, Any]:
    """Computes the roots of a stage's output and their largest squared singular value, both rounded outwards.

    Args:
      stage: what the stage does.
      arrays: its kernels (taps, ..., i, o), factors (channels,) and intervals of slopes (2,).
      multipliers: a positive number for each diagonal, or for each channel of each diagonal, one after the other.
      roots: of the input, (points of the grid, c, c) over the whole fine grid; None for the identity.
      dtype: what is computed in where anything is traced.

    Returns:
      Roots (points of the coarse grid, c, c), and a scalar: infinite, with roots that are NaN, where no certificate was
      found. Differentiable in all arrays where they are traced; in double precision where nothing is.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arrays, multipliers, roots))):
        return _certify_traced(stage, np.dtype(dtype), arrays, multipliers, roots)
    return _certify(_NUMPY, stage, arrays, multipliers, roots)


def _certify(arithmetic, stage, arrays, multipliers, roots):
    xp, half = arithmetic.xp, half_grid(stage.coarse_grid)
    growth = _growth(arithmetic, stage, arrays, multipliers, roots)

    def one(k):
        forms = _forms(arithmetic, stage, arrays, roots, k)
        return _certified(arithmetic, stage, *_system(arithmetic, stage, arrays, forms, multipliers), growth)

    outs, tops = _mapped(arithmetic, stage, one, half.frequencies)
    outs = outs[half.expand]
    return xp.where(mirrored(half, stage.coarse_grid)[:, None, None], outs.conj(), outs), xp.max(tops)


def mirrored(half: Any, grid: tuple[int, ...]) -> np.ndarray:
    """Tells of every point of a grid whether half of the frequencies holds its mirror image in its place."""
    points = np.moveaxis(np.indices(grid), 0, -1).reshape(len(half.expand), -1)
    return (half.frequencies[half.expand] != points).any(-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _certify_traced(stage, dtype, arrays, multipliers, roots):
    with _promotion():
        return _certify(_jax_arithmetic(dtype), stage, arrays, *_narrowed(dtype, multipliers, roots))


def _narrowed(dtype, multipliers, roots):
    return jnp.asarray(multipliers, dtype), None if roots is None else jnp.asarray(roots, _complex(dtype))


@contextlib.contextmanager
def _promotion():
    """Lets jax promote dtypes and ranks as NumPy does, in what both compute."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _mapped(arithmetic, stage, function, stacks):
    """Maps a function of stacks, one entry a frequency, over all of them, in chunks."""
    if arithmetic.xp is jnp:
        outs = lax.map(lambda k: function(jax.tree.map(lambda x: x[None], k)), jax.tree.map(jnp.asarray, stacks))
        return jax.tree.map(lambda out: out[:, 0], outs)
    chunk, many = max(1, _CHUNK_BYTES // (16 * 8 * sum(stage.sides) ** 2)), len(jax.tree.leaves(stacks)[0])
    part = lambda n: jax.tree.map(lambda x: x[n : n + chunk], stacks)
    parts = [function(part(n)) for n in range(0, many, chunk)]
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)


_CHUNK_BYTES = 2**27


def summed(roots: Any, image: tuple[int, ...], grid: tuple[int, ...], dtype: Any) -> Any:
    r"""Computes a root of the sum over all pixels of an image on a circle, rounded outwards.

    The sum is the inner product with the image's indicator function, whose transform w has the squared length of the
    number of pixels: :math:`\sum_\omega |w|^2 G G^H` is at most that times the largest of all.

    Args:
      roots: of the image, (points of the grid, c, c).
      image: its pixels, an axis. Outside, it is zero.
      grid: pixels of the circle, an axis.
      dtype: what is computed in where the roots are traced.

    Returns:
      An array (1, c, c).
    """
    traced = isinstance(roots, jax.core.Tracer)
    with _promotion():
        return _summed(_jax_arithmetic(dtype) if traced else _NUMPY, roots, image, grid)


def _summed(arithmetic, roots, image, grid):
    xp, weights = arithmetic.xp, np.ones(())
    for n, m in zip(image, grid, strict=True):
        turns = np.outer(np.arange(m), np.arange(n)) % m
        weights = np.multiply.outer(weights, abs(np.exp(2j * np.pi * turns / m).sum(1)) ** 2 / m)
    weights = xp.asarray(np.sqrt(weights).reshape(-1, 1, 1), roots.real.dtype)
    rows = xp.reshape(xp.swapaxes(weights * roots, 0, 1), (roots.shape[-1], -1))
    gram = arithmetic.mul(rows, adjoint(rows)).real[None]
    rounding = semidefinite_rounding(rows.shape[-1], gram.dtype) * xp.max(xp.sum(xp.abs(gram), axis=-1))
    eye = xp.asarray(np.eye(len(rows)), gram.dtype)
    return arithmetic.cholesky(gram + arithmetic.still(rounding) * eye).astype(roots.dtype)


def search(stage: Stage, arrays: Sequence[Any], multipliers: Any, roots: Any, dtype: Any, *, last: bool = False) -> Any:
    """Improves multipliers by coordinate descent on the largest singular value, over a sample of the frequencies.

    The last stage of a network is searched more finely, because its largest value is the bound. In earlier stages a
    slightly larger value may leave roots that help the next stage, so a coarse search is enough.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arrays, multipliers, roots))):
        return _search_traced(stage, np.dtype(dtype), last, arrays, multipliers, roots)
    return _search(_NUMPY, stage, last, arrays, multipliers, roots)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search_traced(stage, dtype, last, arrays, multipliers, roots):
    arrays, multipliers, roots = jax.tree.map(lax.stop_gradient, (arrays, multipliers, roots))
    with _promotion():
        return _search(_jax_arithmetic(dtype), stage, last, arrays, *_narrowed(dtype, multipliers, roots))


def _search(arithmetic, stage, last, arrays, multipliers, roots):
    xp, frequencies = arithmetic.xp, half_grid(stage.coarse_grid).frequencies
    frequencies = frequencies[:: -(-len(frequencies) // _sample(stage))]

    forms = _mapped(arithmetic, stage, lambda k: _forms(arithmetic, stage, arrays, roots, k), frequencies)

    def value(multipliers):
        def one(forms):
            q, b = _system(arithmetic, stage, arrays, forms, multipliers)
            return arithmetic.largest(_schur(arithmetic, arithmetic.cholesky(q), b))

        top = xp.max(_mapped(arithmetic, stage, one, forms))
        return xp.where(xp.isnan(top), xp.inf, top)

    def move(carry, factors):
        best, multipliers = carry
        tried = multipliers * factors
        found = value(tried)
        return (xp.minimum(best, found), xp.where(found < best, tried, multipliers)), None

    count = len(stage.diagonals)
    moves = [np.ones(count)]
    coarse = (2, 2, 2, 0.5), (1.4, 1 / 1.4), (1.15, 1 / 1.15), (1.05, 1 / 1.05)
    fine = (2, 2, 2, 0.5, 0.5), *((2**step, 0.5**step) for step in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32))
    for factors in fine if last else coarse:
        moves += [np.where(np.arange(count) == n, factor, 1.0) for n in range(count) for factor in factors]
    carry = xp.asarray(np.inf, arithmetic.dtype), multipliers
    if xp is jnp:
        carry, _ = lax.scan(move, carry, jnp.asarray(np.stack(moves), arithmetic.dtype))
    else:
        for factors in moves:
            carry, _ = move(carry, factors)
    return carry[1]


def _sample(stage: Stage) -> int:
    """Returns how many frequencies a search looks at: as many as some 10^9 operations allow, at least 8."""
    return max(8, int(1e9 / (60 * sum(stage.sides) ** 3)))


def _forms(arithmetic, stage, arrays, roots, k):
    """Returns the linear form before each diagonal, and the output, at frequencies of the coarse grid.

    A form is a dictionary: the number of a variable, 0 for u and n for the n-th diagonal, and its matrices. Those of
    other variables are zero.
    """
    xp, dtype, mul = arithmetic.xp, arithmetic.dtype, arithmetic.mul
    copies, many, fine = math.prod(stage.strides), len(k), _aliases(stage, k)
    values: list[Any] = [({0: _input(arithmetic, stage, roots, fine)}, {})]
    forms = []
    for step in stage.steps:
        parts = [values[n] for n in step.sources]
        done, pending = parts[0]
        if step.kind == "conv":
            coarse = step.coarse and not step.strided
            at, grid = (k[:, None], stage.coarse_grid) if coarse else (fine, stage.grid)
            matrix = xp.swapaxes(_symbol(arithmetic, arrays[step.array], at, grid, step), -1, -2)
            out = {n: mul(matrix, part) for n, part in _sum([done, pending]).items()}
            if step.strided:
                out = {n: xp.sum(part, axis=1, keepdims=True) / math.sqrt(copies) for n, part in out.items()}
            values.append(({}, out) if step.masked else (out, {}))
        elif step.kind == "scale":
            factor = xp.asarray(arrays[step.array], dtype)[:, None]
            values.append(tuple({n: factor * part for n, part in each.items()} for each in parts[0]))
        elif step.kind == "sum":
            values.append(tuple(_sum(each, step.signs) for each in zip(*parts)))
        elif step.kind == "concatenate":
            rows = [stage.steps[n - 1].channels if n else stage.channels for n in step.sources]
            values.append(tuple(_concatenate(xp, each, rows) for each in zip(*parts)))
        else:
            z = pending if step.kind == "mask" else _sum([done, pending])
            length = stage.side(step)
            forms.append({n: xp.reshape(part, (many, length, -1)) for n, part in z.items()})
            diagonal = xp.asarray(np.eye(length).reshape(1, -1, step.channels, length), _complex(dtype))
            diagonal = {len(forms): xp.broadcast_to(diagonal, (many, *diagonal.shape[1:]))}
            values.append((_sum([diagonal, done if step.kind == "mask" else {}]), {}))
    out = {n: xp.reshape(part, (many, -1, part.shape[-1])) for n, part in _sum(values[-1]).items()}
    return [*forms, out]


def _aliases(stage, k):
    """Returns all points of the fine grid at frequencies of the coarse one, (frequencies, aliases, axes)."""
    aliases = np.moveaxis(np.indices(stage.strides), 0, -1).reshape(math.prod(stage.strides), len(stage.strides))
    return k[:, None] + (aliases * np.asarray(stage.coarse_grid, int)).astype(np.int32)


class Linear(NamedTuple):
    """A stage's forms at some frequencies, in its input and the diagonals' results, and the slopes of every row."""

    f: np.ndarray  # (frequencies, rows of all diagonals, columns)
    b: np.ndarray  # (frequencies, rows of the output, columns)
    low: np.ndarray  # (rows of all diagonals,)
    high: np.ndarray
    points: np.ndarray  # (frequencies, aliases): numbers of the fine grid's points


def linear_part(stage: Stage, arrays: Sequence[Any], frequencies: np.ndarray) -> Linear:
    """Computes what a stage does but for its diagonals, at frequencies of the coarse grid, by NumPy."""
    *forms, out = _forms(_NUMPY, stage, arrays, None, frequencies)
    sides, many, steps = stage.sides, len(frequencies), [stage.steps[n] for n in stage.diagonals]
    columns = lambda form, n: {(n, variable): part for variable, part in form.items()}
    b = _joined(np, columns(out, 0), [[stage.side(stage.steps[-1])], sides], many, np.float64)
    blocks: dict[tuple[int, int], Any] = {}
    for n, form in enumerate(forms):
        blocks |= columns(form, n)
    f = _joined(np, blocks, [sides[1:], sides], many, np.float64) if forms else np.zeros((many, 0, sides[0]), complex)
    slopes = [(0.0, 1.0) if step.kind == "mask" else arrays[step.array] for step in steps]
    low, high = (np.repeat([float(ends[n]) for ends in slopes], sides[1:]) for n in (0, 1))
    return Linear(f, b, low, high, _flat(_aliases(stage, frequencies), stage.grid))


def _input(arithmetic, stage, roots, fine):
    """Returns the stage's input as a matrix times u, (frequencies, aliases, channels, aliases times channels).

    Each alias has its own root, and depends on its own part of u alone.
    """
    xp, dtype, channels, (many, copies) = arithmetic.xp, arithmetic.dtype, stage.channels, fine.shape[:2]
    eye = xp.asarray(np.eye(copies), dtype)[:, None, :, None]
    own = xp.asarray(np.eye(channels), _complex(dtype)) if roots is None else roots[_flat(fine, stage.grid)]
    start = eye * xp.reshape(own, (-1, *((1,) if roots is None else (copies,)), channels, 1, channels))
    start = xp.broadcast_to(start, (many, copies, channels, copies, channels))
    return xp.reshape(start, (many, copies, channels, copies * channels))


def _system(arithmetic, stage, arrays, forms, multipliers):
    """Returns Q, where each diagonal is divided by the root of 2 lambda, and B from its first column that is not zero.

    The forms are those of ``_forms``. Variables that none of them reads have no blocks to compute.
    """
    xp, dtype, sides = arithmetic.xp, arithmetic.dtype, stage.sides
    weights = _weights(xp, stage, multipliers)
    scaled = lambda form: {n: part / xp.sqrt(2 * weights[n - 1]) if n else part for n, part in form.items()}
    *forms, out = map(scaled, forms)
    many = len(next(iter(out.values())))
    blocks = {(n, n): xp.asarray(np.eye(side), _complex(dtype)) for n, side in enumerate(sides)}
    for n, (form, place) in enumerate(zip(forms, stage.diagonals), 1):
        step, weight = stage.steps[place], weights[n - 1]
        low, high = (0.0, 1.0) if step.kind == "mask" else xp.asarray(arrays[step.array], dtype)
        for i, part in form.items():
            blocks[n, i] = -(xp.sqrt(weight / 2) * (low + high))[:, None] * part
            blocks[i, n] = adjoint(blocks[n, i])
        if step.kind == "slope" and (xp is jnp or low * high):
            for i, j in itertools.product(form, repeat=2):
                product = arithmetic.mul(adjoint(form[i]), (2 * weight * low * high)[:, None] * form[j])
                blocks[i, j] = product + blocks.get((i, j), 0)
    q = _joined(xp, blocks, [sides, sides], many, dtype)
    columns = {(0, n - min(out)): part for n, part in out.items()}
    return q, _joined(xp, columns, [[stage.side(stage.steps[-1])], sides[min(out) :]], many, dtype)


def _weights(xp, stage, multipliers):
    """Returns the multipliers of each diagonal: one, or as many as it has rows."""
    steps = [stage.steps[n] for n in stage.diagonals]
    if len(multipliers) == len(steps):
        return [multipliers[n : n + 1] for n in range(len(steps))]
    parts = np.split(multipliers, np.cumsum([step.channels for step in steps])[:-1])
    return [xp.tile(part, stage.side(step) // step.channels) for part, step in zip(parts, steps, strict=True)]


def _growth(arithmetic, stage, arrays, multipliers, roots):
    """Returns by how much the terms of Q and of B exceed what they add up to: their rounding grows with them.

    A form's row is a sum of products; the sum of their moduli bounds what rounding changes, over the unit of rounding.
    It exceeds the row by much where what a kernel reads is nearly zero, and there multipliers can be very large. What
    underflows counts too: each product may lose the smallest normal number, which later factors may make large again.
    """
    xp, modulus = arithmetic.xp, lambda n: abs(arithmetic.xp.asarray(arrays[n], arithmetic.dtype))
    ones = lambda count: xp.ones(count, arithmetic.dtype)
    lost = float(jnp.finfo(arithmetic.dtype).tiny / jnp.finfo(arithmetic.dtype).eps)
    start = ones(stage.channels) if roots is None else xp.sqrt(xp.sum(abs(roots) ** 2, -1).max(0))
    values: list[Any] = [(start, 0 * start)]
    copies, inner = math.prod(stage.strides), ones(())
    weights = iter(_weights(xp, stage, multipliers))
    for step in stage.steps:
        parts = [values[n] for n in step.sources]
        done, pending = parts[0]
        if step.kind == "conv":
            kernel = modulus(step.array)
            *taps, i, _ = kernel.shape
            summed = kernel.reshape(-1, *kernel.shape[-2:]).sum(0) + math.prod(taps) * lost
            out = arithmetic.mul(done + pending, summed) + i * lost
            out = out * math.sqrt(copies) if step.strided else out
            values.append((0 * out, out) if step.masked else (out, 0 * out))
        elif step.kind == "scale":
            values.append(tuple(modulus(step.array) * each + lost for each in parts[0]))
        elif step.kind == "sum":
            values.append(tuple(sum(each) for each in zip(*parts)))
        elif step.kind == "concatenate":
            values.append(tuple(xp.concatenate(each) for each in zip(*parts)))
        else:
            low, high = (0.0, 1.0) if step.kind == "mask" else modulus(step.array)
            z, weight = pending if step.kind == "mask" else done + pending, next(weights)[: step.channels]
            both = stage.side(step) / step.channels * xp.sum(2 * weight * low * high * z**2)
            inner = xp.maximum(inner, xp.maximum(xp.max(xp.sqrt(weight / 2) * (low + high) * z), both))
            own = ones(step.channels) / xp.sqrt(2 * weight)
            values.append((own + (done if step.kind == "mask" else 0), 0 * own))
    return arithmetic.still(inner), arithmetic.still(xp.max(sum(values[-1])))


def _joined(xp, blocks, sides, many, dtype):
    """Returns stacks of matrices that are made of blocks; those that are missing are zero."""
    zeros = lambda i, j: xp.zeros((1, sides[0][i], sides[1][j]), _complex(dtype))
    block = lambda i, j: xp.broadcast_to(part := blocks.get((i, j), zeros(i, j)), (many, *part.shape[-2:]))
    rows = [[block(i, j) for j in range(len(sides[1]))] for i in range(len(sides[0]))]
    return xp.concatenate([xp.concatenate(row, axis=-1) for row in rows], axis=-2)


def _schur(arithmetic, factor, b):
    """Returns B Q^-1 Bᴴ; B's columns before the last ones, which are given, are zero."""
    columns = b.shape[-1]
    return _gram(arithmetic, arithmetic.solve(factor[:, -columns:, -columns:], adjoint(b)))


def _certified(arithmetic, stage, q, b, growth):
    """Returns roots G of matrices that are certainly at least B Q^-1 Bᴴ, and the largest eigenvalues of G Gᴴ."""
    xp, mul, still = arithmetic.xp, arithmetic.mul, arithmetic.still
    side, rows = q.shape[-1], b.shape[-2]
    identity = lambda n: xp.asarray(np.eye(n), q.dtype)
    by_matrix = lambda x: x[:, None, None]
    # A positive semidefinite matrix is at most as large as the norms of its diagonal blocks together.
    starts = [0, *np.cumsum(stage.sides)]
    sizes = [xp.sum(xp.abs(q[:, i:j, i:j]), axis=-1).max(-1) for i, j in zip(starts, starts[1:])]
    size = (1 + len(sizes)) * functools.reduce(xp.maximum, sizes, growth[0])
    rounding = semidefinite_rounding(side + rows, arithmetic.dtype)
    slack = still(rounding * size)
    factor = arithmetic.cholesky(q - by_matrix(slack) * identity(side))
    found = _schur(arithmetic, factor, b)
    top, vector = arithmetic.top(still(found))
    # Rounding changes B by rounding * growth[1] at most. What it does between two blocks is outweighed by a number on
    # the first and another on the second, whose product is the square of that. On the first, which may be nearly
    # singular, the number is no larger than is needed to make the second one negligible.
    top = xp.maximum(top, (8 * rounding * growth[1]) ** 2)
    smallest = still(xp.diagonal(factor, axis1=-2, axis2=-1).real.min(-1) ** 2)
    error = xp.maximum(slack, rounding * growth[1] / xp.sqrt(xp.where(top > 0, top, 1)))
    first = xp.maximum(slack, xp.minimum(error * xp.sqrt(smallest), error**2 / 1e-4))
    second = xp.maximum(slack, error**2 / first)
    found = found + by_matrix(still((2 * second + first / smallest) * top)) * identity(rows)
    # Whether Q and what was found enclose B is checked by one more factorisation, of a matrix of about unit size.
    positive = by_matrix(top > 0)
    scale = xp.where(positive, 1 / xp.sqrt(xp.where(positive, by_matrix(top), 1)), 0)
    unit = xp.where(positive, scale * found * scale, identity(rows))
    b = xp.pad(b, [(0, 0), (0, 0), (side - b.shape[-1], 0)])
    rows_above = xp.concatenate([q, adjoint(scale * b)], axis=-1)
    whole = xp.concatenate([rows_above, xp.concatenate([scale * b, unit], axis=-1)], axis=-2)
    last = np.diag(np.arange(side + rows) >= side)
    checked = arithmetic.cholesky(
        still(whole - xp.where(last, by_matrix(second), by_matrix(first) * identity(side + rows)))
    )
    holds = xp.isfinite(checked).all((-1, -2)) & xp.isfinite(top)
    column = vector[:, :, None]
    quotient = mul(adjoint(column), mul(found, column))[:, 0, 0].real
    margin = still(semidefinite_rounding(rows, arithmetic.dtype) * top)
    root = arithmetic.cholesky(found + by_matrix(margin + (top <= 0)) * identity(rows))
    return xp.where(by_matrix(holds), root, np.nan), xp.where(holds, quotient + 3 * margin, np.inf)


def _symbol(arithmetic, kernel, frequencies, grid, step):
    """Returns the convolution's matrices (i, o) at coordinates on ``grid``, integers of shape (c, aliases, axes)."""
    xp, dtype = arithmetic.xp, arithmetic.dtype
    kernel = xp.asarray(kernel, dtype)
    *taps, i, o = kernel.shape
    several = frequencies.shape[:2]
    cos, sin = xp.ones((*several, 1), dtype), xp.zeros((*several, 1), dtype)
    for axis, (k, m) in enumerate(zip(taps, grid, strict=True)):
        # The angle is reduced modulo the grid in exact integers.
        turns = np.outer(np.arange(m), step.dilation[axis] * np.arange(k) - step.lows[axis]) % m
        c, s = (xp.asarray(f(2 * np.pi * turns / m), dtype)[frequencies[..., axis]] for f in (np.cos, np.sin))
        outer = lambda a, b: xp.reshape(a[..., :, None] * b[..., None, :], (*several, -1))
        cos, sin = outer(cos, c) - outer(sin, s), outer(cos, s) + outer(sin, c)
    flat = xp.reshape(kernel, (-1, i * o))
    real, imaginary = (xp.reshape(arithmetic.mul(part, flat), (*several, i, o)) for part in (cos, sin))
    return real + 1j * imaginary


def _flat(frequencies, grid):
    """Returns the row-major index of points of a grid."""
    flat = np.zeros(frequencies.shape[:-1], np.int32)
    for axis, m in enumerate(grid):
        flat = flat * m + frequencies[..., axis]
    return flat


def _gram(arithmetic, matrices):
    return arithmetic.mul(adjoint(matrices), matrices)


def _sum(forms, signs=None):
    """Adds forms."""
    total: dict[int, Any] = {}
    for form, sign in zip(forms, signs or [1] * len(forms), strict=True):
        for n, part in form.items():
            part = part if sign == 1 else -part
            total[n] = total[n] + part if n in total else part
    return total


def _concatenate(xp, forms, rows):
    """Concatenates forms of so many rows each."""
    found = {}
    for n in sorted(set().union(*forms)):
        shape = next(form[n].shape for form in forms if n in form)
        parts = [form.get(n, xp.zeros((*shape[:-2], many, shape[-1]))) for form, many in zip(forms, rows, strict=True)]
        found[n] = xp.concatenate(parts, axis=-2)
    return found


def _complex(dtype):
    return np.result_type(dtype, np.complex64)
