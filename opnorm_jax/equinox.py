"""Certified spectral normalisation for Equinox: a layer wrapper in the place of ``equinox.nn.SpectralNorm``."""

from __future__ import annotations

from typing import Any

import equinox as eqx

from opnorm_jax._execution import Execution
from opnorm_jax._tree.normalize import normalize_layer


class OperatorNorm(eqx.Module):
    """Wraps a convolution, transposed convolution or dense layer so that its operator norm is at most ``max_norm``.

    It is called like ``equinox.nn.SpectralNorm``, and the parameters have the same place (``.layer.weight``). The norm
    is that of the layer itself, padding and strides included, and certified, where ``SpectralNorm`` estimates that of
    the flattened kernel. A kernel already inside is used as it is. There is no state.

    Args:
      layer: the layer.
      weight_name, num_power_iterations, eps, inference, key: taken because ``SpectralNorm`` has them. The kernel is
        found by itself, and no power iterations are made.
      max_norm: positive.
      execution: how to compute; see :class:`opnorm_jax.Execution`.

    Raises:
      ValueError, TypeError: in a call, as :func:`opnorm_jax.find_convs`: where the layer's kernel cannot be described,
        or the layer does more than apply it once and add a bias.

    Cost, derivative: as :func:`opnorm_jax.normalize`.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, opnorm_jax as oj
      >>> layer = oj.equinox.OperatorNorm(eqx.nn.Conv2d(3, 8, 3, padding="SAME", key=jax.random.key(0)), "weight")
      >>> layer(jnp.ones((3, 8, 8))).shape
      (8, 8, 8)
    """

    layer: eqx.Module
    max_norm: float = eqx.field(static=True)
    execution: Execution = eqx.field(static=True)

    def __init__(
        self,
        layer: eqx.Module,
        weight_name: str = "weight",
        num_power_iterations: int = 1,
        eps: float = 1e-12,
        inference: bool = False,
        *,
        max_norm: float = 1.0,
        execution: Execution = Execution(),
        key: Any = None,
    ):
        del num_power_iterations, eps, inference, key
        if not hasattr(layer, weight_name):
            raise ValueError(f"expected the layer to have a parameter {weight_name!r}, got {layer!r}.")
        self.layer = layer
        self.max_norm = max_norm
        self.execution = execution

    def __call__(self, x: Any, state: Any = None, *, key: Any = None, inference: bool | None = None) -> Any:
        """Applies the layer with its kernel rescaled.

        With a ``state``, as ``SpectralNorm`` takes it, the result is ``(output, state)``; without one, the output.
        """
        del key, inference
        params, static = eqx.partition(self.layer, eqx.is_inexact_array)
        forward = lambda params, x: eqx.combine(params, static)(x)
        out = normalize_layer(forward, self.max_norm, self.execution)(params, x)
        return out if state is None else (out, state)
