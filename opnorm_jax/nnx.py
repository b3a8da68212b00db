"""Certified spectral normalisation for Flax NNX: a layer wrapper in the place of ``flax.nnx.SpectralNorm``."""

from __future__ import annotations

from typing import Any

from flax import nnx

from opnorm_jax._execution import Execution
from opnorm_jax._tree.normalize import normalize_layer


class OperatorNorm(nnx.Module):
    """Wraps a convolution, transposed convolution or dense layer so that its operator norm is at most ``max_norm``.

    It is called like ``flax.nnx.SpectralNorm``, and parameters have the same names (``layer_instance.kernel``). The
    norm is that of the layer itself, padding and strides included, and certified, where ``SpectralNorm`` estimates that
    of the flattened kernel. A kernel already inside is used as it is. The stored kernel is never written to, so that
    gradients go through the norm; and there is no other state.

    Args:
      layer_instance: the layer.
      max_norm: positive.
      n_steps, epsilon, update_stats, rngs: taken because ``SpectralNorm`` has them. No power iterations are made.
      execution: how to compute; see :class:`opnorm_jax.Execution`.

    Raises:
      ValueError, TypeError: in a call, as :func:`opnorm_jax.find_convs`: where the layer's kernel cannot be described,
        or the layer does more than apply it once and add a bias.

    Cost, derivative: as :func:`opnorm_jax.normalize`.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = oj.nnx.OperatorNorm(nnx.Conv(3, 8, (3, 3), rngs=rngs), rngs=rngs)
      >>> layer(jnp.ones((1, 8, 8, 3))).shape
      (1, 8, 8, 8)
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        max_norm: float = 1.0,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        update_stats: bool = True,
        rngs: nnx.Rngs | None = None,
        execution: Execution = Execution(),
    ):
        del n_steps, epsilon, update_stats, rngs
        self.layer_instance = layer_instance
        self.max_norm = max_norm
        self.execution = execution

    def __call__(self, x: Any, update_stats: bool | None = None) -> Any:
        """Applies the layer with its kernel rescaled. ``update_stats`` is taken because ``SpectralNorm`` does."""
        del update_stats
        graph, params, rest = nnx.split(self.layer_instance, nnx.Param, ...)

        def forward(params: Any, x: Any) -> tuple[Any, Any]:
            layer = nnx.merge(graph, params, rest, copy=True)
            return layer(x), nnx.state(layer, nnx.Not(nnx.Param))

        out, after = normalize_layer(forward, self.max_norm, self.execution)(params, x)
        nnx.update(self.layer_instance, after)
        return out
