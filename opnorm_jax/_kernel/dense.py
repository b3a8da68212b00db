"""A certificate from the matrix of the layer itself, for layers small enough to have one."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from opnorm_jax._blocks import factor, products
from opnorm_jax._blocks.batching import one_by_one
from opnorm_jax._execution import Execution
from opnorm_jax._geometry import Geometry
from opnorm_jax._kernel import lobpcg
from opnorm_jax._rounding import dense_rounding

MAX_SIDE = 8192
"""Largest side of the Gram matrix of a group of channels: it takes 256 MiB in float32, and three such are held."""


def check_size(geometry: Geometry) -> None:
    """Raises an error if the layer's own matrix is too large."""
    side = min(_sides(geometry))
    if not geometry.attained and side > MAX_SIDE:
        raise ValueError(
            f"expected a layer with at most {MAX_SIDE} inputs or outputs per group (pixels times channels) for "
            f"tight=True, got {side}. Leave tight out: on large maps the circulant embedding is nearly as good."
        )


def tight_bound(
    kernel: jax.Array, norm: jax.Array, above: jax.Array, geometry: Geometry, execution: Execution
) -> jax.Array:
    """Returns a bound between ``norm`` and ``above``, both of which are known: the least that is certified.

    With A the layer's own matrix, u is a bound if u² I - AᵀA has a Cholesky factorisation. The u tried start just above
    ``norm``, from which they move away fourfold. The derivative is that of ``norm``, with the ratio held fixed.
    """
    fixed = lax.stop_gradient((kernel, norm, above))
    bound = one_by_one(_search, geometry, execution.factorization, execution.chunk_bytes)(*fixed)
    return norm * (bound / jnp.where(fixed[1] > 0, fixed[1], 1))


def _search(geometry, factorization, chunk_bytes, kernel, norm, above):
    groups = geometry.conv.feature_group_count
    parts = jnp.moveaxis(kernel.reshape(*kernel.shape[:-1], groups, kernel.shape[-1] // groups), -2, 0)
    own = dataclasses.replace(geometry, conv=dataclasses.replace(geometry.conv, feature_group_count=1))
    allowance = dense_rounding(min(_sides(geometry)), math.prod(parts.shape[1:]), kernel.dtype)

    def one(part):
        gram = _gram(part, own, chunk_bytes)
        if factorization == "products":
            return jnp.minimum(jnp.sqrt(products.norms(gram)) * (1 + allowance), above)

        def further(state):
            distance, _ = state
            bound = jnp.minimum(norm * (1 + distance), above)
            return 4 * distance, factor.is_below(gram, bound**2)

        going = lambda state: ~state[1] & (norm * (1 + state[0] / 4) < above)
        start = (jnp.full((), allowance, kernel.dtype), jnp.zeros((), bool))
        distance, found = lax.while_loop(going, further, start)
        return jnp.where(found, jnp.minimum(norm * (1 + distance / 4) * (1 + allowance), above), above)

    return jnp.max(lax.map(one, parts))


def _gram(kernel, geometry, chunk_bytes):
    """Returns the Gram matrix of the layer, on its smaller side: one row for each pixel and channel."""
    forward = lambda x: lobpcg.apply(kernel, x, geometry)
    inputs = (*geometry.conv.input_shape, kernel.shape[-2])
    outputs = (*(axis.outputs for axis in geometry.live), kernel.shape[-1])
    transpose = lambda y: jax.linear_transpose(forward, jax.ShapeDtypeStruct(inputs, kernel.dtype))(y)[0]
    shape, power = inputs, lambda x: transpose(forward(x))
    if math.prod(outputs) < math.prod(inputs):
        shape, power = outputs, lambda y: forward(transpose(y))
    side = math.prod(shape)

    def row(position):
        unit = jnp.zeros(side, kernel.dtype).at[position].set(1)
        return power(unit.reshape(shape)).reshape(-1)

    together = max(
        1, min(side, chunk_bytes // (4 * kernel.dtype.itemsize * max(math.prod(inputs), math.prod(outputs))))
    )
    gram = lax.map(row, jnp.arange(side, dtype=jnp.int32), batch_size=together)
    return (gram + gram.T) / 2


def _sides(geometry: Geometry) -> tuple[int, int]:
    """Returns the numbers of inputs and of outputs of the layer of one group of channels."""
    conv, (i, o) = geometry.conv, geometry.kernel_shape[-2:]
    pixels = math.prod(axis.outputs for axis in geometry.live)
    return math.prod(conv.input_shape) * i, pixels * (o // conv.feature_group_count)
