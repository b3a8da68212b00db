"""What a Lipschitz constant says of a classifier's decisions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opnorm_jax._rounding import eps


def certified_radius(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], lipschitz: Any
) -> Float[Array, "*batch"]:
    r"""Computes how far an input may move before a classifier can give it another class than its label.

    If the logits have the Lipschitz constant L, the difference of two of them has :math:`\sqrt 2 L`. So no input nearer
    than

    .. math:: \frac{\text{logit of the label} - \text{largest other logit}}{\sqrt 2 L}

    has another class. This radius is exact for a linear classifier of two classes whose logits are opposite; otherwise
    it is a lower bound. It is rounded downwards. The rounding of computing the logits themselves is not in it.

    Args:
      logits: the classifier's outputs.
      labels: the right classes, integers from 0 to ``classes - 1``.
      lipschitz: an upper bound on the Lipschitz constant of the logits, such as that of :func:`lipschitz_bound`, in the
        units in which inputs are measured. If inputs are divided by 255 before the network, a constant for the
        network is 255 times that for the pixels.

    Returns:
      The radius of each example, in the units of the input, float32 or float64; 0 where another class has at least as
      large a logit as the label; NaN where a logit is NaN, or where ``lipschitz`` is negative or NaN.

    Raises:
      ValueError: there are fewer than two classes, the shapes do not match, or ``lipschitz`` is a number below 0.
      TypeError: ``logits`` are no floating numbers, or ``labels`` no integers.

    Cost: a pass over the logits. Differentiable in ``logits`` and ``lipschitz``; may be inside ``jit`` and ``vmap``.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> oj.certified_radius(jnp.array([[3.0, 1.0], [0.0, 1.0]]), jnp.array([0, 0]), 1.0).round(3)
      Array([1.414, 0.   ], dtype=float32)

    References:
      Tsuzuku, Sato and Sugiyama, Lipschitz-margin training, 2018.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"expected logits of a floating dtype, got {logits.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"expected labels to be the classes' numbers, integers, got {labels.dtype}. Take one-hot rows' argmax."
        )
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"expected labels of shape {logits.shape[:-1]} for {logits.shape=}, got {labels.shape=}.")
    if logits.shape[-1] < 2:
        raise ValueError(f"expected at least two classes along the last axis of logits, got {logits.shape=}.")
    if not isinstance(lipschitz, jax.core.Tracer) and jnp.size(lipschitz) == 1 and float(lipschitz) < 0:
        raise ValueError(f"expected lipschitz to be at least 0, got {lipschitz}.")
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    logits, lipschitz = logits.astype(dtype), jnp.asarray(lipschitz, dtype)
    own = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype).reshape((1,) * labels.ndim + (-1,))
    right = jnp.sum(jnp.where(own, logits, 0), axis=-1)
    other = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    margin = jnp.maximum(right - other, 0) * (1 - 8 * eps(dtype))
    radius = margin / (math.sqrt(2) * lipschitz)
    known = own.any(-1) & (lipschitz >= 0)  # a label that is no class has no radius
    return jnp.where(known, jnp.where(margin > 0, radius, 0 * margin), jnp.nan)
