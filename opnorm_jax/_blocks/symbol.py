"""From a kernel to its symbol's blocks, one small matrix per frequency, and back (see _geometry.py for the formula).

Frequencies are evaluated by direct phases, one real matrix product. No FFT is used: ``jnp.fft`` crops kernels larger
than the image, and it can deadlock on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from opnorm_jax._execution import Execution
from opnorm_jax._geometry import Plan, couplings, half_grid


def block_taps(kernel: Float[Array, "*taps i o"], plan: Plan) -> Float[Array, "tau g m n"]:
    """Returns the kernel as taps of the coarse convolution of stride 1, with m inputs and n outputs per group."""
    return _couple(kernel, plan, [couplings(axis).place for axis in plan.axes])


def kernel_from_block_taps(
    blocks: Float[Array, "tau g m n"], plan: Plan, channels: tuple[int, ...], *, adjoint: bool = False
) -> Float[Array, "*taps i o"]:
    """Returns the kernel whose block taps are nearest to ``blocks``; with ``adjoint``, the transpose of block_taps.

    The two agree unless taps fold onto one another, that is, unless the kernel is larger than the circle.
    """
    factors = []
    for axis in plan.axes:
        place = couplings(axis).place
        matrix = place.reshape(-1, axis.taps).astype(np.float64)
        inverse = matrix.T if adjoint else np.linalg.pinv(matrix)
        factors.append(inverse.reshape(axis.taps, *place.shape[:3]))
    return _uncouple(blocks, plan, channels, factors)


def squared_norm_of_coupling(plan: Plan) -> float:
    """Returns the squared operator norm of :func:`block_taps`: 1 unless taps fold onto one another."""
    matrices = [couplings(axis).place.reshape(-1, axis.taps).astype(np.float64) for axis in plan.axes]
    return float(np.prod([np.linalg.norm(matrix, 2) ** 2 for matrix in matrices]))


def _trivial(place: np.ndarray) -> bool:
    return place.shape[1] == place.shape[2] == 1 and np.array_equal(place[:, 0, 0, :], np.eye(place.shape[3]))


def _couple(kernel: jax.Array, plan: Plan, places: list[np.ndarray]) -> jax.Array:
    *taps, i, o = kernel.shape
    g, rank = plan.groups, len(taps)
    if all(_trivial(place) for place in places):
        blocks = kernel.reshape(math.prod(taps), i, g, o // g)
        return blocks.swapaxes(1, 2)
    out = kernel
    for place in reversed(places):  # each step consumes the last tap axis and puts (tau, v, u) in front
        matrix = jnp.asarray(place, kernel.dtype)
        axis = out.ndim - 3
        out = jnp.tensordot(matrix, out, axes=((3,), (axis,)), precision=lax.Precision.HIGHEST)
    # now (tau1, v1, u1, tau2, v2, u2, ..., i, o)
    taus, vs, us = (list(range(start, 3 * rank, 3)) for start in range(3))
    shape = out.shape
    out = out.reshape(*shape[:-1], g, o // g)
    out = out.transpose(*taus, 3 * rank + 1, *vs, 3 * rank, *us, 3 * rank + 2)
    m, n = math.prod([shape[a] for a in vs]) * i, math.prod([shape[a] for a in us]) * (o // g)
    return out.reshape(math.prod([shape[a] for a in taus]), g, m, n)


def _uncouple(blocks: jax.Array, plan: Plan, channels: tuple[int, ...], factors: list[np.ndarray]) -> jax.Array:
    i, o = channels
    g, rank = plan.groups, len(plan.axes)
    if all(factor.shape[2] == factor.shape[3] == 1 and _trivial(np.moveaxis(factor, 0, 3)) for factor in factors):
        return blocks.swapaxes(1, 2).reshape(*(axis.taps for axis in plan.axes), i, o)
    taus, vs, us = ([factor.shape[a] for factor in factors] for a in (1, 2, 3))
    out = blocks.reshape(*taus, g, *vs, i, *us, o // g)
    first_v, first_u = rank + 1, 2 * rank + 2
    order = [a for r in range(rank) for a in (r, first_v + r, first_u + r)]
    out = out.transpose(*order, 2 * rank + 1, rank, 3 * rank + 2)
    out = out.reshape(*(size for sizes in zip(taus, vs, us, strict=True) for size in sizes), i, o)
    for factor in reversed(factors):  # each step consumes the last (tau, v, u) and puts the taps in front
        matrix = jnp.asarray(factor, blocks.dtype)
        last = out.ndim - 2
        out = jnp.tensordot(
            matrix, out, axes=((1, 2, 3), (last - 3, last - 2, last - 1)), precision=lax.Precision.HIGHEST
        )
    return out


def phases(frequencies: jax.Array, plan: Plan, dtype: Any) -> Float[Array, "2c tau"]:
    """Returns cosines, then sines, of the angle omega . tau, for the rows of ``frequencies`` and every block tap."""
    cos, sin = jnp.ones((frequencies.shape[0], 1), dtype), jnp.zeros((frequencies.shape[0], 1), dtype)
    for a, axis in enumerate(plan.axes):
        n = plan.grid[a]
        # The angle is reduced modulo the grid in exact integers: no loss of digits at high frequencies.
        turns = np.outer(np.arange(n), couplings(axis).offsets) % n
        angles = 2 * np.pi * turns / n
        c = jnp.asarray(np.cos(angles), dtype)[frequencies[:, a]]
        s = jnp.asarray(np.sin(angles), dtype)[frequencies[:, a]]
        cos, sin = (
            (
                (cos[:, :, None] * c[:, None] - sin[:, :, None] * s[:, None]).reshape(len(frequencies), -1),
                (cos[:, :, None] * s[:, None] + sin[:, :, None] * c[:, None]).reshape(len(frequencies), -1),
            )
            if a
            else (c, s)
        )
    return jnp.concatenate([cos, sin])


def symbol(taps: Float[Array, "tau g m n"], phase: Float[Array, "2c tau"]) -> Complex[Array, "c g m n"]:
    """Computes the blocks at the frequencies whose phases are given."""
    t, *block = taps.shape
    parts = jnp.matmul(phase, taps.reshape(t, -1), precision=lax.Precision.HIGHEST).reshape(2, -1, *block)
    return lax.complex(parts[0], parts[1])


def symbol_adjoint(blocks: Complex[Array, "c g m n"], phase: Float[Array, "2c tau"]) -> Float[Array, "tau g m n"]:
    """Applies the transpose of :func:`symbol` over the reals."""
    c, *block = blocks.shape
    parts = jnp.concatenate([blocks.real.reshape(c, -1), blocks.imag.reshape(c, -1)])
    return jnp.matmul(phase.T, parts, precision=lax.Precision.HIGHEST).reshape(-1, *block)


def scan_frequencies(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    taps: Float[Array, "tau g m n"],
    plan: Plan,
    execution: Execution,
    xs: Any = None,
) -> tuple[Any, Any]:
    """Runs ``carry, out = step(carry, blocks, phase, weights, x)`` over the half grid, in chunks of bounded size.

    ``weights`` are zero on the padding of the last chunk (which repeats the frequency 0). ``xs`` is an optional tree
    with one row per frequency. Returns the last carry and the outs, one row per frequency of the half grid. The carry
    must be a sum that starts at zero: with a mesh, each device has its own share of the frequencies, and the devices'
    sums are added.
    """
    half = half_grid(plan.grid)
    nf, devices = len(half.frequencies), execution.mesh.size if execution.mesh else 1
    fitting = execution.chunk_bytes // (2 * taps.dtype.itemsize * math.prod(taps.shape[1:]))
    chunk = max(1, min(-(-nf // devices), fitting))
    chunks = -(-nf // (devices * chunk))
    pad = devices * chunks * chunk - nf
    # The barrier keeps XLA from folding the phases into a constant the size of the whole grid.
    frequencies = lax.optimization_barrier(jnp.asarray(np.pad(half.frequencies, ((0, pad), (0, 0)))))
    weights = jnp.asarray(np.pad(half.weights, (0, pad)), taps.dtype)
    xs = jax.tree.map(lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)), xs) if pad else xs

    def body(carry, item):
        frequencies, weights, x = item
        phase = phases(frequencies, plan, taps.dtype)
        return step(carry, symbol(taps, phase), phase, weights, x)

    def share(carry, items):
        if chunks == 1:
            return body(carry, items)
        split = jax.tree.map(lambda a: a.reshape(chunks, chunk, *a.shape[1:]), items)
        carry, outs = lax.scan(body, carry, split)
        return carry, jax.tree.map(lambda a: a.reshape(chunks * chunk, *a.shape[2:]), outs)

    if execution.mesh is None:
        carry, outs = share(carry, (frequencies, weights, xs))
    else:
        names = execution.mesh.axis_names
        together = lambda carry, items: (lambda sums, outs: (lax.psum(sums, names), outs))(*share(carry, items))
        specs = jax.P(), jax.P(names)
        mesh = execution.automatic_mesh
        run = jax.shard_map(together, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
        carry, outs = run(carry, (frequencies, weights, xs))
    return carry, jax.tree.map(lambda a: a[:nf], outs) if pad else outs
