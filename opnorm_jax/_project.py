"""Bringing a kernel's operator norm down: the paper's clip, the nearest projection, and plain rescaling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax import _linalg
from opnorm_jax._bounds import certifying_plan, check_output
from opnorm_jax._conv import Conv, as_conv, canonical_kernel, check_max_norm, restore_kernel
from opnorm_jax._spectrum import check_chunk_bytes, circular_norm, normalise, rounding
from opnorm_jax._symbol import (
    DEFAULT_CHUNK_BYTES,
    Plan,
    block_taps,
    half_grid,
    kernel_from_block_taps,
    scan_frequencies,
    squared_norm_of_coupling,
    symbol,
    symbol_adjoint,
)

_HIGHEST = lax.Precision.HIGHEST


class Constrained(NamedTuple):
    """A kernel after a constraint, with what was learnt on the way."""

    kernel: jax.Array
    norm: jax.Array  # shape=(): its norm before, on the certifying circle
    changed: jax.Array  # shape=(), bool: False if the kernel was inside and came back as it was


class ProjectionInfo(NamedTuple):
    """How near to nearest a projection came."""

    distance: jax.Array  # shape=(): |result - kernel|, Frobenius
    gap: jax.Array  # shape=(): distance less a lower bound on the distance of *any* kernel inside the ball; >= 0
    iterations: jax.Array  # shape=(), int32
    norm: jax.Array  # shape=(): the kernel's norm before, on the certifying circle


def inside_tolerance(dtype) -> float:
    """Relative excess of a computed norm over the bound that is put down to rounding: 32 eps (4e-6 in float32).

    Without it a kernel on the sphere, such as the result of an earlier projection, would not come back bit for bit.
    """
    return 32 * float(jnp.finfo(dtype).eps)


def rescale_operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Float[Array, ...]:
    """kernel * min(1, max_norm / upper bound): the cheapest way inside the ball, and a certified one.

    The upper bound is :func:`operator_norm_bounds`'s, so the norm of the layer really used, padding and strides
    included, is at most ``max_norm``, besides the final rounding to the kernel's dtype. A kernel inside already (its
    norm on the certifying circle at most ``max_norm``, to 32 eps) comes back bit for bit.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      max_norm: positive; may be traced.
      chunk_bytes: see :func:`singular_values`.

    Returns:
      A kernel of the same shape and dtype. NaN throughout if ``kernel`` holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or ``max_norm`` is not a positive scalar.

    Cost: one upper bound.

    Differentiable: once, both modes, in the kernel and in ``max_norm``; at the boundary the derivative is the inside's.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = oj.rescale_operator_norm(jnp.ones((3, 3, 1, 1)), (8, 8), 1.0)
      >>> bool(abs(oj.operator_norm(kernel, (8, 8)) - 1) < 1e-5)
      True
    """
    return constrained("rescale", kernel, conv, max_norm, chunk_bytes=chunk_bytes).kernel


def clip_operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Float[Array, ...]:
    r"""The paper's clip (Appendix A), one shot: it does **not** bring the norm under ``max_norm``.

    Every singular value of every frequency's block is cut at ``max_norm``, and of the resulting convolution only the
    kernel's own taps are kept. Keeping them moves the values again: the result's norm is typically 1.2 to 1.4 times
    ``max_norm``. For a bound that holds use :func:`project_operator_norm` (nearest) or :func:`rescale_operator_norm`.

    For zero padding the blocks are those of the certifying circle (see :func:`operator_norm_bounds`).

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      max_norm: positive; may be traced.
      chunk_bytes: see :func:`singular_values`.

    Returns:
      A kernel of the same shape and dtype; one whose norm is at most ``max_norm`` (to 32 eps) comes back bit for bit.
      NaN throughout if ``kernel`` holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or ``max_norm`` is not a positive scalar.

    Cost: for half of the frequencies the eigendecomposition of a Gram matrix on the smaller channel side.

    Differentiable: once, both modes, in the kernel and in ``max_norm`` (divided differences: finite at ties).

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = jnp.ones((3, 3, 1, 1))
      >>> bool((oj.clip_operator_norm(kernel, (8, 8), 9.0) == kernel).all())
      True

    References:
      Sedghi, Gupta and Long, `The Singular Values of Convolutional Layers <https://arxiv.org/abs/1805.10408>`_, 2019.
    """
    return constrained("clip", kernel, conv, max_norm, chunk_bytes=chunk_bytes).kernel


def project_operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Float[Array, ...]:
    r"""The nearest kernel (Frobenius distance) whose operator norm is at most ``max_norm``.

    The norm is that on the certifying circle of :func:`operator_norm_bounds`, so the bound holds for the layer really
    used. Solves

    .. math:: \min_{K'} \tfrac12 \|K' - K\|^2 \quad\text{subject to}\quad \|F_{K'}(\omega)\| \le max\_norm
        \text{ at every frequency}

    by accelerated proximal gradient on its dual, restarted where the momentum points uphill. Each feasible kernel's
    distance, against the dual value, gives a certificate of how far from nearest it can be. The result is rescaled by
    its own certified norm at the end: the bound holds also when the iterations run out.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      max_norm: positive; may be traced.
      tolerance: stop once distance <= (1 + tolerance) * (a lower bound on every feasible kernel's distance).
      max_iterations: and after this many iterations at the latest, rounded up to a multiple of 10.
      chunk_bytes: bounds the blocks of one chunk; the dual variable (half the grid's blocks) is held whole, thrice.

    Returns:
      A kernel of the same shape and dtype; one inside already (to 32 eps) comes back bit for bit.
      NaN throughout if ``kernel`` holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or an option is not a positive number.

    Cost: each iteration costs one :func:`clip_operator_norm`; every tenth also a norm.

    Differentiable: no; a derivative raises ``NotImplementedError``. Inside a differentiated function use
    :func:`rescale_operator_norm`, or the norm as a penalty.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = oj.project_operator_norm(jnp.ones((3, 3, 1, 1)), oj.Conv((8, 8), padding="SAME"), 1.0)
      >>> bool(oj.operator_norm_bounds(kernel, oj.Conv((8, 8), padding="SAME")).upper <= 1 + 1e-5)
      True

    References:
      Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009.
      O'Donoghue and Candes, Adaptive restart for accelerated gradient schemes, 2015.
    """
    return project_operator_norm_info(
        kernel, conv, max_norm, tolerance=tolerance, max_iterations=max_iterations, chunk_bytes=chunk_bytes
    )[0]


def project_operator_norm_info(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Float[Array, ...], ProjectionInfo]:
    """:func:`project_operator_norm`, with its certificate.

    Args, Raises, Cost: as there.

    Returns:
      The kernel and a :class:`ProjectionInfo`: the distance moved, the gap (how much nearer any kernel inside the ball
      could be, at most), the iterations, and the norm before. In float32 gaps below about 1e-6 * |kernel|² / distance
      are rounding.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> _, info = oj.project_operator_norm_info(jnp.ones((3, 3, 1, 1)), (8, 8), 1.0)
      >>> bool(info.gap <= 1e-3 * info.distance)
      True
    """
    for name, value in (("tolerance", tolerance), ("max_iterations", max_iterations)):
        if isinstance(value, bool) or not isinstance(value, (int, float) if name == "tolerance" else int):
            raise TypeError(f"expected {name} to be a number that is static under jit, got {value!r}.")
        if not value > 0:
            raise ValueError(f"expected {name} to be positive, got {value}.")
    out, info = _constrain_static(
        "project", kernel, conv, max_norm, (float(tolerance), int(max_iterations)), chunk_bytes
    )
    assert info is not None  # the method is "project"
    return out.kernel, info


def constrained(method: str, kernel, conv, max_norm, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Constrained:
    """One of the three constraints by name, with the norm found on the way and whether anything changed."""
    return _constrain_static(method, kernel, conv, max_norm, (1e-3, 200), chunk_bytes)[0]


def _constrain_static(method, kernel, conv, max_norm, options, chunk_bytes):
    conv = as_conv(conv)
    check_chunk_bytes(chunk_bytes)
    check_max_norm(max_norm)
    canonical = canonical_kernel(kernel, conv)
    check_output(conv, canonical.shape)
    plan = certifying_plan(conv, canonical.shape[:-2])
    small, scale = normalise(canonical)
    bound = jnp.asarray(max_norm).astype(small.dtype) / scale
    info = None
    if method == "rescale":
        norm = circular_norm(small, plan, chunk_bytes)
        moved = _fit(small, norm, bound, plan)
    elif method == "clip":
        correction, norm = _clip(small, bound, plan, chunk_bytes)
        moved = small + correction
    else:
        moved, info = _project(small, bound, plan, options, chunk_bytes)
        norm = info.norm
    # NaN compares false, so that a NaN kernel takes the changed branch and comes out NaN throughout.
    changed = ~(norm <= bound * (1 + inside_tolerance(small.dtype)))
    moved = jnp.where(jnp.isfinite(norm), moved, jnp.nan)
    result = restore_kernel(scale * moved, conv, kernel.dtype)
    result = jnp.where(changed, result, kernel)
    if info is not None:
        distance = jnp.where(changed, info.distance, 0)
        info = ProjectionInfo(scale * distance, scale * jnp.where(changed, info.gap, 0), info.iterations, scale * norm)
    return Constrained(result, scale * norm, changed), info


def _fit(kernel: jax.Array, norm: jax.Array, bound: jax.Array, plan: Plan) -> jax.Array:
    """The kernel scaled so that its norm, with its rounding allowed for, is at most ``bound``."""
    upper = norm * (1 + rounding(kernel.shape, plan, kernel.dtype))
    return kernel * jnp.minimum(1, bound / jnp.where(upper > 0, upper, 1))


# --- clip ---------------------------------------------------------------------------------------------------------


def _channels(kernel: jax.Array, plan: Plan) -> tuple[int, int]:
    return kernel.shape[-2], kernel.shape[-1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _clip(kernel, bound, plan: Plan, chunk_bytes: int):
    """What one clip adds to the kernel, and the norm before."""

    def step(carry, blocks, phase, weights, x):
        values, vectors = _gram_spectrum(blocks)
        factor = jnp.minimum(0, bound / jnp.where(values > 0, values, 1) - 1)
        factor = jnp.where(values > bound * (1 + inside_tolerance(kernel.dtype)), factor, 0)
        change = _weigh(weights, _apply_spectral(blocks, vectors, factor))
        return carry + symbol_adjoint(change, phase), jnp.max(values, axis=(1, 2))

    taps = block_taps(kernel, plan)
    change, norms = scan_frequencies(step, jnp.zeros_like(taps), taps, plan, chunk_bytes=chunk_bytes)
    return kernel_from_block_taps(change, plan, _channels(kernel, plan)), jnp.max(norms)


@_clip.defjvp
def _clip_jvp(plan, chunk_bytes, primals, tangents):
    r"""The derivative of F phi(FᴴF), phi(l) = min(1, c / sqrt l), by divided differences of phi (Daleckii and Krein).

    They are written without cancellation, and 0 / 0 at the kink (a value equal to c, twice) is taken from inside.
    """
    (kernel, bound), (kernel_dot, bound_dot) = primals, tangents
    taps, taps_dot = block_taps(kernel, plan), block_taps(kernel_dot, plan)

    def step(carry, f, phase, weights, x):
        f_dot = symbol(taps_dot, phase)
        values, vectors = _gram_spectrum(f)
        outside = values > bound * (1 + inside_tolerance(kernel.dtype))
        safe = jnp.where(values > 0, values, 1)
        phi = jnp.where(outside, bound / safe, 1)
        a, b = values[..., :, None], values[..., None, :]
        out_a, out_b = outside[..., :, None], outside[..., None, :]
        low, high = jnp.minimum(a, b), jnp.maximum(a, b)
        span = jnp.where(high > low, high - low, 1)
        mixed = -((high - bound) / span) / jnp.where(high > 0, high * (low + high), 1)
        both_out = -bound / jnp.where(out_a & out_b, a * b * (a + b), 1)
        divided = jnp.where(out_a & out_b, both_out, jnp.where(out_a | out_b, mixed, 0))
        adjoint = lambda z: z.conj().swapaxes(-1, -2)
        mul = lambda *zs: functools.reduce(lambda p, q: jnp.matmul(p, q, precision=_HIGHEST), zs)
        left = f.shape[-1] > f.shape[-2]  # the Gram matrix is on the left side: transpose the problem
        h, h_dot = (adjoint(f), adjoint(f_dot)) if left else (f, f_dot)
        gram_dot = mul(adjoint(h_dot), h) + mul(adjoint(h), h_dot)
        phi_dot = divided.astype(f.dtype) * mul(adjoint(vectors), gram_dot, vectors)
        phi_dot = phi_dot + _diagonal(jnp.where(outside, bound_dot / safe, 0).astype(f.dtype))
        change = mul(h_dot, vectors * (phi - 1)[..., None, :].astype(f.dtype), adjoint(vectors))
        change = change + mul(h, vectors, phi_dot, adjoint(vectors))
        change = adjoint(change) if left else change
        value = _apply_spectral(f, vectors, phi - 1)
        add, add_dot = carry
        add = add + symbol_adjoint(_weigh(weights, value), phase)
        add_dot = add_dot + symbol_adjoint(_weigh(weights, change), phase)
        at = jnp.argmax(values.reshape(values.shape[0], -1), axis=1)
        slopes = jnp.sum((mul(h, vectors).conj() * mul(h_dot, vectors)).real, -2) / safe
        pick = lambda z: jnp.take_along_axis(z.reshape(z.shape[0], -1), at[:, None], 1)[:, 0]
        return (add, add_dot), (pick(values), pick(slopes))

    carry = (jnp.zeros_like(taps), jnp.zeros_like(taps))
    (add, add_dot), (norms, slopes) = scan_frequencies(step, carry, taps, plan, chunk_bytes=chunk_bytes)
    back = lambda z: kernel_from_block_taps(z, plan, _channels(kernel, plan))
    at = jnp.argmax(norms)
    return (back(add), norms[at]), (back(add_dot), slopes[at])


def _weigh(weights, blocks):
    return weights[:, None, None, None].astype(blocks.dtype) * blocks


def _diagonal(values):
    size = values.shape[-1]
    return jnp.where(np.eye(size, dtype=bool), jnp.broadcast_to(values[..., None], (*values.shape, size)), 0)


def _gram_spectrum(blocks):
    """Singular values (ascending) of the blocks (c, g, m, n) and the vectors on their smaller side."""
    c, g, m, n = blocks.shape
    values, vectors = _linalg.eigh(_linalg.gram(blocks).reshape(c * g, min(m, n), min(m, n)))
    return jnp.sqrt(jnp.maximum(values, 0)).reshape(c, g, -1), vectors.reshape(c, g, *vectors.shape[1:])


def _apply_spectral(blocks, vectors, factor):
    """F V diag(factor) Vᴴ, or V diag(factor) Vᴴ F where the vectors are the left ones."""
    weighted = vectors * factor[..., None, :].astype(vectors.dtype)
    scaled = jnp.matmul(weighted, vectors.conj().swapaxes(-1, -2), precision=_HIGHEST)
    pair = (blocks, scaled) if blocks.shape[-1] <= blocks.shape[-2] else (scaled, blocks)
    return jnp.matmul(*pair, precision=_HIGHEST)


# --- projection ---------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _project(kernel, bound, plan: Plan, options: tuple[float, int], chunk_bytes: int):
    """Accelerated proximal gradient on the dual; see project_operator_norm.

    With M the map from a kernel to its blocks (scaled to an isometry) and p the dual variable, one block a frequency:
    K = kernel - Mᵀp, and p <- (q + M K) - clip(q + M K) with Nesterov's extrapolation q. Blocks are stacked per
    frequency of the half grid, so every sum over frequencies carries their weights.
    """
    tolerance, max_iterations = options
    taps = block_taps(kernel, plan)
    block = taps.shape[1:]
    nf = len(half_grid(plan.grid).frequencies)
    rate = 1 / squared_norm_of_coupling(plan)
    channels = _channels(kernel, plan)
    dual = jnp.zeros((nf, *block), lax.complex(taps, taps).dtype)

    def iterate(state, _):
        k, p, q, momentum, _ = state

        def step(carry, blocks, phase, weights, item):
            p, q = item
            back, nuclear, uphill = carry
            z = q + jnp.asarray(rate, blocks.dtype) * blocks
            values, vectors = _gram_spectrum(z)
            excess = jnp.maximum(values - rate * bound, 0)
            new = _apply_spectral(z, vectors, excess / jnp.where(values > 0, values, 1))
            back = back + symbol_adjoint(_weigh(weights, new), phase)
            nuclear = nuclear + jnp.sum(weights[:, None, None] * excess)
            uphill = uphill + jnp.sum(weights[:, None, None, None] * ((q - new).conj() * (new - p)).real)
            return (back, nuclear, uphill), new

        zero = jnp.zeros((), taps.dtype)
        (back, nuclear, uphill), new = scan_frequencies(
            step, (jnp.zeros_like(taps), zero, zero), block_taps(k, plan), plan, chunk_bytes=chunk_bytes, xs=(p, q)
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
        """A kernel inside the ball, and a lower bound on every such kernel's squared distance."""
        k = kernel - drawn
        inside = _fit(k, circular_norm(k, plan, chunk_bytes), bound, plan)
        dual_value = jnp.sum(drawn * kernel) - 0.5 * jnp.sum(drawn * drawn) - bound * nuclear
        return inside, jnp.sqrt(jnp.maximum(2 * dual_value, 0))

    def going(state):
        _, best, nearest, distance, iterations, _ = state
        return (distance > (1 + tolerance) * nearest) & (iterations < max_iterations)

    def ten(state):
        inner, best, nearest, distance, iterations, norm = state
        inner, _ = lax.scan(iterate, inner, None, length=10)
        inside, bound_below = certify(*inner[4])
        moved = jnp.sqrt(jnp.sum((inside - kernel) ** 2))
        best = jnp.where(moved < distance, inside, best)
        return inner, best, jnp.maximum(nearest, bound_below), jnp.minimum(distance, moved), iterations + 10, norm

    zero = jnp.zeros((), taps.dtype)
    norm = circular_norm(kernel, plan, chunk_bytes)
    start = _fit(kernel, norm, bound, plan)
    distance = jnp.sqrt(jnp.sum((start - kernel) ** 2))
    # A kernel that is inside (or not finite) takes no iteration.
    distance = jnp.where(norm > bound * (1 + inside_tolerance(taps.dtype)), distance, 0)
    inner = (kernel, dual, dual, jnp.ones((), taps.dtype), (jnp.zeros_like(kernel), zero))
    state = (inner, start, zero, distance, jnp.zeros((), jnp.int32), norm)
    _, best, nearest, distance, iterations, norm = lax.while_loop(going, ten, state)
    return best, ProjectionInfo(distance, jnp.maximum(distance - nearest, 0), iterations, norm)


@_project.defjvp
def _project_jvp(plan, options, chunk_bytes, primals, tangents):
    raise NotImplementedError(
        "project_operator_norm has no derivative. Differentiate through rescale_operator_norm instead, or penalise "
        "operator_norm in the loss; to project between gradient steps, call it outside the differentiated function "
        "(constrain_operator_norm does)."
    )
