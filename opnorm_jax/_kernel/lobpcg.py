"""The norm of the convolution really applied, through the operator and its transpose: it converges from below."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._blocks.guard import forbid_derivative
from opnorm_jax._geometry import Geometry, fills, padded_pixels
from opnorm_jax._rounding import linear_solve_tolerance, progress

MAX_ITERATIONS = 500
_PATIENCE = 50
MAX_SOLVE_ITERATIONS = 1000

_once = forbid_derivative("operator norms have no third derivative here. Take at most two.")


def apply(kernel: Float[Array, "*taps i o"], x: Float[Array, "*n i"], geometry: Geometry) -> Float[Array, "*m o"]:
    """Applies the layer itself, without batch, bias, and the outputs that meet no pixel."""
    conv, rank = geometry.conv, len(geometry.conv.input_shape)
    pads, dilation = [axis.pads for axis in geometry.live], list(conv.input_dilation)
    for a, fill in enumerate(fills(conv)):
        if fill is not None:
            pixels = padded_pixels(fill, conv.input_shape[a], dilation[a], geometry.pads[a])
            held = np.expand_dims(pixels >= 0, [b for b in range(x.ndim) if b != a])
            x = jnp.where(held, jnp.take(x, np.maximum(pixels, 0), axis=a), 0)
            pads[a], dilation[a] = (0, 0), 1
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


def norm(kernel: Float[Array, "*taps i o"], geometry: Geometry) -> Float[Array, ""]:
    """Computes |A x| / |x| at the best x found. Only the rounding of one application can put it above the true norm.

    Differentiable twice. Where the top value is tied, or so nearly that the second derivative cannot be computed, that
    is NaN.
    """
    value, x = _lobpcg(lax.stop_gradient(kernel), geometry)
    return _value_at(kernel, value, x, geometry)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _value_at(kernel, value, x, geometry):
    """Returns ``value``, the norm, which is reached at ``x``, with the derivatives of a function of the kernel."""
    return value


@_value_at.defjvp
def _value_at_jvp(geometry, primals, tangents):
    kernel, value, x = primals
    value, x = _value_at(kernel, value, x, geometry), _vector_at(kernel, x, geometry)
    y = apply(kernel, x, geometry)
    slope = jnp.sum(y * apply(tangents[0], x, geometry)) / jnp.where(value > 0, value, 1)
    return value, jnp.where(value > 0, slope, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _vector_at(kernel, x, geometry):
    """Returns ``x``, the top singular vector, with its derivative as a function of the kernel."""
    return x


@_vector_at.defjvp
def _vector_at_jvp(geometry, primals, tangents):
    """With s the top value, (s² I - AᵀA) dx = d(AᵀA) x, up to a multiple of x. Solved by conjugate gradients.

    The same equation first improves x, which is known to half the digits of its value only.
    """
    kernel, x, dot = _once(primals[0]), primals[1], tangents[0]
    power = lambda v: _transpose(kernel, apply(kernel, v, geometry), geometry)
    image = power(x)
    value = jnp.sum(x * image)
    x = x + _solve(power, value, x, image - value * x)
    x = x / jnp.sqrt(jnp.sum(x * x))
    y = apply(kernel, x, geometry)
    value = jnp.sum(y * y)
    change = _transpose(dot, y, geometry) + _transpose(kernel, apply(dot, x, geometry), geometry)
    return x, _solve(power, value, x, change)


def _solve(power, value, x, b):
    """Solves (value I - AᵀA) v = b for v orthogonal to x; NaN if that has not converged, as at ties."""
    project = lambda v: v - jnp.sum(x * v) * x
    dot = lambda a, b: jnp.sum(a * b)
    # x itself is given the value's own weight, so that the operator is positive definite.
    matvec = lambda v: value * (v + dot(x, v) * x) - power(v)

    def conjugate_gradients(matvec, b):
        goal = linear_solve_tolerance(b.dtype) ** 2 * dot(b, b)

        def step(state):
            v, r, p, square, n = state
            image = matvec(p)
            length = dot(p, image)
            alpha = square / jnp.where(length > 0, length, 1)
            v, r = v + alpha * p, r - alpha * image
            new = dot(r, r)
            return v, r, r + new / jnp.where(square > 0, square, 1) * p, new, n + 1

        going = lambda state: (state[3] > goal / 16) & (state[4] < MAX_SOLVE_ITERATIONS)
        start = (jnp.zeros_like(b), b, b, dot(b, b), jnp.zeros((), jnp.int32))
        v = lax.while_loop(going, step, start)[0]
        left = b - matvec(v)
        return jnp.where(dot(left, left) <= goal, v, jnp.nan)

    return project(lax.custom_linear_solve(matvec, project(b), conjugate_gradients, symmetric=True))


def _transpose(kernel: jax.Array, y: jax.Array, geometry: Geometry) -> jax.Array:
    """Applies the transpose of the layer."""
    shape = (*geometry.conv.input_shape, kernel.shape[-2] * geometry.conv.feature_group_count)
    forward = lambda x: apply(kernel, x, geometry)
    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, y.dtype))(y)[0]


def _lobpcg(kernel: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    r"""Finds the largest eigenvalue of AᵀA, and its vector, by LOBPCG with one vector (Knyazev 2001).

    Each step maximises :math:`|Av|` over the span of the iterate x, the gradient there and the last direction: a 3 x 3
    problem. This converges like a Krylov method with three vectors of memory. It stops once the value has gained
    less than two units of rounding over ``_PATIENCE`` steps in a row, or after ``MAX_ITERATIONS``.
    """
    dtype, conv = kernel.dtype, geometry.conv
    shape = (*conv.input_shape, kernel.shape[-2] * conv.feature_group_count)
    forward = lambda x: apply(kernel, x, geometry)
    backward = lambda y: _transpose(kernel, y, geometry)
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
        gained = size > value * (1 + progress(dtype))
        best_x = jnp.where(size > value, x, best_x)
        move = new - jnp.sum(new * x) * x
        return new, move, jnp.maximum(size, value), best_x, jnp.where(gained, 0, stale + 1), i + 1

    def going(state):
        *_, stale, i = state
        return (stale < _PATIENCE) & (i < MAX_ITERATIONS)

    # A fixed pseudo-random start is orthogonal to the top vector only for a set of kernels of measure zero.
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    x = x / length(x)
    state = (x, jnp.zeros_like(x), jnp.zeros((), dtype), x, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    _, _, value, x, _, _ = lax.while_loop(going, step, state)
    return jnp.where(jnp.isfinite(value), value, jnp.nan), x  # an infinity in the kernel is NaN here as elsewhere


def _top_of_three(matrix: Float[Array, "3 3"]) -> Float[Array, 3]:
    """Returns the top eigenvector of a symmetric matrix: the best column after repeated squaring. No LAPACK call."""

    def square(m, _):
        m = m / jnp.maximum(jnp.max(jnp.abs(m)), jnp.finfo(m.dtype).tiny)
        return jnp.matmul(m, m, precision=lax.Precision.HIGHEST), None

    power, _ = lax.scan(square, matrix, None, length=24)
    sizes = jnp.sum(power * power, axis=0)
    column = power[:, jnp.argmax(sizes)]
    usable = jnp.max(sizes) > 0
    column = jnp.where(usable, column, jnp.zeros(3, matrix.dtype).at[0].set(1))
    return column / jnp.sqrt(jnp.sum(column * column))
