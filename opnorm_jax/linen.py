"""Certified spectral normalisation for Flax Linen: a layer wrapper in the place of ``flax.linen.SpectralNorm``."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from opnorm_jax._execution import Execution
from opnorm_jax._program.find_convs import find_layer
from opnorm_jax._tree.normalize import rescaled


class OperatorNorm(nn.Module):
    """Wraps a convolution, transposed convolution or dense layer so that its operator norm is at most ``max_norm``.

    It is called like ``flax.linen.SpectralNorm``, and parameters have the same names, those of the wrapped layer. The
    norm is that of the layer itself, padding and strides included, and certified, where ``SpectralNorm`` estimates that
    of the flattened kernel. A kernel already inside is used as it is. There is no state: no ``batch_stats``, nothing to
    be ``mutable``.

    Args:
      layer_instance: the layer.
      max_norm: positive.
      n_steps, epsilon: taken because ``SpectralNorm`` has them. No power iterations are made.
      execution: how to compute; see :class:`opnorm_jax.Execution`.

    Raises:
      ValueError, TypeError: in a call, as :func:`opnorm_jax.find_convs`: where the layer's kernel cannot be described,
        or the layer does more than apply it once and add a bias.

    Cost, derivative: as :func:`opnorm_jax.normalize`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, opnorm_jax as oj
      >>> class Critic(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = oj.linen.OperatorNorm(nn.Conv(8, (3, 3), strides=2))(x, update_stats=train)
      ...         return oj.linen.OperatorNorm(nn.Dense(1))(nn.relu(x).reshape(len(x), -1), update_stats=train)
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> variables = Critic().init(jax.random.key(0), x, train=True)
      >>> sorted(variables), sorted(variables["params"])
      (['params'], ['Conv_0', 'Dense_0'])
    """

    layer_instance: nn.Module
    max_norm: Any = 1.0
    n_steps: int = 1
    epsilon: float = 1e-12
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Applies the layer with its kernel rescaled. ``update_stats`` is taken because ``SpectralNorm`` does."""
        del update_stats
        alone = self.layer_instance.clone(parent=None)

        def rescale(variables: Any) -> Any:
            params = variables["params"]
            forward = lambda params, *args: alone.apply({"params": params}, *args, **kwargs)
            convs = find_layer(forward, params, *args)
            return {**variables, "params": rescaled(params, self.max_norm, convs, self.execution)}

        apply = nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            "params",
            trans_in_fn=lambda variables: rescale(variables) if variables.get("params") else variables,
            init=self.is_initializing(),
            mutable=self.is_initializing(),
        )
        return apply(self.layer_instance)
