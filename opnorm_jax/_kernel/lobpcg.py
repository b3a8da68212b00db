"""The norm of the convolution really applied, through the operator and its transpose: converged from below."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._conv import Conv

MAX_ITERATIONS = 500
_PATIENCE = 50


def explicit_padding(conv: Conv, taps: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The (low, high) pairs in effect; for circular padding, those of Flax's wrap-around."""
    pairs = []
    for a, (n, k, s, d) in enumerate(zip(conv.input_shape, taps, conv.strides, conv.kernel_dilation, strict=True)):
        span = d * (k - 1)
        if conv.padding == "CIRCULAR":
            pairs.append((span // 2, span - span // 2))
        elif conv.padding == "SAME":
            total = max((math.ceil(n / s) - 1) * s + span + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        elif conv.padding == "VALID":
            pairs.append((0, 0))
        else:
            pairs.append(conv.padding[a])  # type: ignore[arg-type]
    return tuple(pairs)  # type: ignore[return-value]


def output_shape(conv: Conv, taps: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial shape of the output."""
    if conv.padding == "CIRCULAR":
        return tuple(
            math.ceil(n * e / s) for n, e, s in zip(conv.input_shape, conv.input_dilation, conv.strides, strict=True)
        )
    pads = explicit_padding(conv, taps)
    return tuple(
        ((n - 1) * e + 1 + low + high - d * (k - 1) - 1) // s + 1
        for n, e, s, d, k, (low, high) in zip(
            conv.input_shape, conv.input_dilation, conv.strides, conv.kernel_dilation, taps, pads, strict=True
        )
    )


def apply(kernel: Float[Array, "*taps i o"], x: Float[Array, "*n i"], conv: Conv) -> Float[Array, "*m o"]:
    """The layer itself, without batch or bias."""
    rank, taps = len(conv.input_shape), kernel.shape[:-2]
    pads, dilation = explicit_padding(conv, taps), conv.input_dilation
    if conv.padding == "CIRCULAR":
        for a, (n, e, (low, high)) in enumerate(zip(conv.input_shape, conv.input_dilation, pads, strict=True)):
            index = np.arange(-low, n * e + high) % (n * e)
            # Pixels between those of the input are the dilation's zeros.
            held = np.expand_dims(index % e == 0, [b for b in range(x.ndim) if b != a])
            x = jnp.where(held, jnp.take(x, index // e, axis=a), 0)
        pads, dilation = ((0, 0),) * rank, (1,) * rank
    letters = "DHW"[3 - rank :]
    return lax.conv_general_dilated(
        x[None],
        kernel,
        conv.strides,
        pads,
        lhs_dilation=dilation,
        rhs_dilation=conv.kernel_dilation,
        dimension_numbers=("N" + letters + "C", letters + "IO", "N" + letters + "C"),
        feature_group_count=conv.feature_group_count,
        precision=lax.Precision.HIGHEST,
    )[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(kernel: Float[Array, "*taps i o"], conv: Conv) -> Float[Array, ""]:
    """|A x| / |x| at the best x found: never above the true norm but by the rounding of one application."""
    return _top_vector(kernel, conv)[0]


@norm.defjvp
def _norm_jvp(conv, primals, tangents):
    (kernel,), (tangent,) = primals, tangents
    value, x = _top_vector(kernel, conv)
    y = apply(kernel, x, conv)
    slope = jnp.sum(y * apply(tangent, x, conv)) / jnp.where(value > 0, value, 1)
    return value, jnp.where(value > 0, slope, 0)


def _top_vector(kernel: jax.Array, conv: Conv) -> tuple[jax.Array, jax.Array]:
    r"""Locally optimal conjugate gradient for the largest eigenvalue of AᵀA.

    Each step maximises :math:`|Av|` over the span of the iterate x, the gradient there and the last direction (a 3 x 3
    problem): Krylov-like convergence with three vectors of memory. It stops once the value has gained less than two
    units of rounding over ``_PATIENCE`` steps in a row, or after ``MAX_ITERATIONS``.
    """
    kernel = lax.stop_gradient(kernel)
    dtype, groups = kernel.dtype, conv.feature_group_count
    shape = (*conv.input_shape, kernel.shape[-2] * groups)
    forward = lambda x: apply(kernel, x, conv)
    transpose = jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, dtype))
    backward = lambda y: transpose(y)[0]
    length = lambda v: jnp.sqrt(jnp.sum(v * v))

    def orthonormal(v, basis):
        for _ in range(2):  # twice is enough, in floating point too
            for b in basis:
                v = v - jnp.sum(v * b) * b
        size = length(v)
        tiny = jnp.finfo(dtype).tiny ** 0.5
        return jnp.where(size > tiny, v / jnp.where(size > tiny, size, 1), 0)

    def step(state):
        x, direction, value, best_x, stale, i = state
        ax = forward(x)
        gradient = backward(ax)
        g = orthonormal(gradient, (x,))
        p = orthonormal(direction, (x, g))
        basis = jnp.stack([x, g, p])
        images = jnp.stack([ax, forward(g), forward(p)]).reshape(3, -1)
        small = jnp.matmul(images, images.T, precision=lax.Precision.HIGHEST)
        weights = _top_of_three(small)
        new = jnp.tensordot(weights, basis, 1)
        new = new / length(new)
        size = length(ax)
        gained = size > value * (1 + 2 * jnp.finfo(dtype).eps)
        best_x = jnp.where(size > value, x, best_x)
        move = new - jnp.sum(new * x) * x
        return new, move, jnp.maximum(size, value), best_x, jnp.where(gained, 0, stale + 1), i + 1

    def going(state):
        *_, stale, i = state
        return (stale < _PATIENCE) & (i < MAX_ITERATIONS)

    # A fixed pseudo-random start: it is not orthogonal to the top vector but on a set of measure zero.
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    x = x / length(x)
    state = (x, jnp.zeros_like(x), jnp.zeros((), dtype), x, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    _, _, value, x, _, _ = lax.while_loop(going, step, state)
    return jnp.where(jnp.isfinite(value), value, jnp.nan), x  # an infinity in the kernel is NaN here as elsewhere


def _top_of_three(matrix: Float[Array, "3 3"]) -> Float[Array, 3]:
    """Top eigenvector of a symmetric matrix by repeated squaring, then its best column: no LAPACK call."""

    def square(m, _):
        m = m / jnp.maximum(jnp.max(jnp.abs(m)), jnp.finfo(m.dtype).tiny)
        return jnp.matmul(m, m, precision=lax.Precision.HIGHEST), None

    power, _ = lax.scan(square, matrix, None, length=24)
    sizes = jnp.sum(power * power, axis=0)
    column = power[:, jnp.argmax(sizes)]
    usable = jnp.max(sizes) > 0
    column = jnp.where(usable, column, jnp.zeros(3, matrix.dtype).at[0].set(1))
    return column / jnp.sqrt(jnp.sum(column * column))
