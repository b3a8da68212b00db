"""A clip of singular values from both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._blocks import factor
from opnorm_jax._blocks.guard import forbid_derivative
from opnorm_jax._blocks.linalg import adjoint
from opnorm_jax._blocks.symbol import block_taps, kernel_from_block_taps, scan_frequencies, symbol_adjoint
from opnorm_jax._conv import Conv, as_conv, canonical_shape, check_scalar
from opnorm_jax._execution import Execution, check_decomposes
from opnorm_jax._geometry import Geometry, resolve
from opnorm_jax._kernel.clip import weigh
from opnorm_jax._kernel.compiled import compiled, place
from opnorm_jax._kernel.norm import circular_extremes
from opnorm_jax._kernel.prepare import prepare, restore
from opnorm_jax._rounding import inside_tolerance

_HIGHEST = lax.Precision.HIGHEST

_once = forbid_derivative(
    "clip_singular_values has no derivative. Use it between training steps, or a penalty on singular_values inside one."
)


def clip_singular_values(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    lower: float | Float[Array, ""],
    upper: float | Float[Array, ""],
    *,
    iterations: int = 1,
    execution: Execution = Execution(),
) -> tuple[Float[Array, ...], Float[Array, " 2"]]:
    """Clips the singular values of a circular convolution from both sides, and reports what was reached.

    Every singular value of every frequency's block is moved into [lower, upper], and of the resulting convolution only
    the kernel's own taps are kept. Where these fill the whole circle (the kernel is as large as the image, 1x1 kernels,
    dense layers, patches no larger than the stride) the result is exact: the nearest layer with values in [lower,
    upper]. Elsewhere keeping the taps moves the values again, and no formula exists; more iterations come nearer.

    With ``lower == upper == 1`` it is a step towards an orthogonal layer.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels.
      lower: at least 0; may be traced.
      upper: positive and at least ``lower``; may be traced.
      iterations: how many times to clip; they stop early once all values are inside.
      execution: how to compute; see :class:`Execution`. ``"products"`` is refused.

    Returns:
      A kernel of the same shape and dtype; and the smallest and the largest singular value that it has, in the
      computing dtype. A kernel whose values are all inside (to 32 eps) comes back bit for bit. NaN throughout if
      ``kernel`` holds a NaN or an infinity, or if a traced ``lower`` is above ``upper``.

    Raises:
      ValueError: the padding is not circular, a stride does not divide the grid, the kernel does not fit ``conv``, or
        not 0 <= lower <= upper.
      TypeError: the kernel is not an array of a real floating dtype, or a bound is not a number.

    Cost: an iteration takes an SVD with vectors for each of half the grid's frequencies, and one without.

    Accuracy: on GPU and TPU values below sqrt(eps) of the largest come from noise and may not be raised.

    Differentiable: no; a derivative raises ``NotImplementedError``.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 4))
      >>> _, reached = oj.clip_singular_values(kernel, (3, 3), 0.5, 2.0)
      >>> jnp.round(reached, 4)
      Array([0.5, 2. ], dtype=float32)
    """
    check_decomposes(execution)
    conv = as_conv(conv)
    geometry = resolve(conv, canonical_shape(kernel, conv))
    check_scalar(lower, "lower")
    check_scalar(upper, "upper")
    known = [value for value in (lower, upper) if not isinstance(value, jax.core.Tracer)]
    if not all(float(value) >= 0 for value in known) or (len(known) == 2 and not 0 < float(upper) >= float(lower)):
        raise ValueError(f"expected 0 <= lower <= upper and 0 < upper, got {lower=} and {upper=}.")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"expected iterations to be a positive int, got {iterations!r}.")
    if not geometry.exact:
        raise ValueError(
            f"expected a circular convolution whose strides divide the grid, got {conv}: other layers have no formula "
            "for their smallest singular value. clip_operator_norm and project_operator_norm bound the largest."
        )
    kernel = jnp.asarray(kernel)
    out, reached = _clip(kernel, jnp.asarray(lower), jnp.asarray(upper), geometry, iterations, execution)
    return place(out, kernel), reached


@compiled(3)
def _clip(kernel, lower, upper, geometry: Geometry, iterations, execution):
    kernel, lower, upper = jax.tree.map(_once, (kernel, lower, upper))
    small, scale = prepare(kernel, geometry)
    low, high = (bound.astype(small.dtype) / scale for bound in (lower, upper))
    plan, slack = geometry.plan, inside_tolerance(small.dtype)
    channels = small.shape[-2:]

    def inside(extremes):
        smallest, largest = extremes
        return (smallest >= low * (1 - slack)) & (largest <= high * (1 + slack))

    def once(state):
        count, small, _ = state
        taps = block_taps(small, plan)
        m, n = taps.shape[2:]

        def step(carry, blocks, phase, weights, x):
            # The block of a frequency that is its own mirror image is real. Without the rounding of its imaginary part
            # so are the vectors of its zero values, which the real kernel must be able to follow.
            own = (weights < 1.5 / math.prod(plan.grid))[:, None, None, None]
            blocks = jnp.where(own, blocks.real.astype(blocks.dtype), blocks)
            left, values, right = factor.singular_vectors(blocks.reshape(-1, m, n))
            change = (jnp.clip(values, low, high) - values).astype(blocks.dtype)
            moved = jnp.matmul(left * change[..., None, :], adjoint(right), precision=_HIGHEST)
            return carry + symbol_adjoint(weigh(weights, moved.reshape(blocks.shape)), phase), None

        change, _ = scan_frequencies(step, jnp.zeros_like(taps), taps, plan, execution)
        small = small + kernel_from_block_taps(change, plan, channels)
        return count + 1, small, _extremes(small)

    _extremes = lambda small: tuple(circular_extremes(small, plan, execution)[::-1])
    start = _extremes(small)
    unchanged = inside(start)
    more = lambda state: (state[0] < iterations) & ~inside(state[2])
    _, small, (smallest, largest) = lax.while_loop(more, once, (jnp.zeros((), jnp.int32), small, start))
    valid = jnp.isfinite(largest) & (low <= high)
    out = restore(jnp.where(valid, scale * small, jnp.nan), kernel, geometry)
    reached = jnp.where(valid, scale * jnp.stack([smallest, largest]), jnp.nan)
    return jnp.where(unchanged & valid, kernel, out), reached
