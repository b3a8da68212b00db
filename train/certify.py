"""Certified accuracy of a trained network, and an attack that puts the certificate to the test.

Distances are Euclidean, between images whose pixels lie between 0 and 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from loop import standardise

import opnorm_jax as oj

RADII = (36 / 255, 72 / 255, 108 / 255)
STEPS = 20  # of the attack


def certify(
    forward: Callable[..., Any], params: Any, batch_stats: Any, images: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Returns what summary.json holds under "certificate".

    Args:
      forward: ``forward(params, batch_stats, images, train=False)`` gives logits of standardised images.
      params, batch_stats: of one network.
      images: uint8 (N, H, W, C).
      labels: integers (N,).

    Returns:
      The Lipschitz constant from standardised images to logits by both methods; the share of images that are classified
      rightly; for each radius the shares that are certified by either constant, and that are still classified rightly
      when attacked; and how many attacks inside an image's own certified radius succeeded, which must be none.
    """
    logits_of = jax.jit(lambda params, pixels: forward(params, batch_stats, standardise(pixels), train=False))
    network = lambda params, x: forward(params, batch_stats, x, train=False)
    pixels, labels = images.astype(np.float32), jnp.asarray(labels)
    like = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    constants = {name: float(oj.lipschitz_bound(network, params, like, method=name)) for name in ("product", "sdp")}
    with jax.default_matmul_precision("highest"):
        logits = jnp.asarray(logits_of(params, pixels), jnp.float32)
        radii = {
            name: np.asarray(pixel_radius(oj.certified_radius(logits, labels, constant), pixels / 255))
            for name, constant in constants.items()
        }
        resists = make_attack(logits_of, params, pixels, labels)
        survives = lambda radius: np.asarray(resists(jnp.float32(radius)))
        rows = [
            {
                "radius": radius,
                "certified": float((radii["sdp"] > radius).mean()),
                "certified_by_product": float((radii["product"] > radius).mean()),
                "under_attack": float(survives(np.full(len(labels), radius)).mean()),
            }
            for radius in RADII
        ]
        inside = radii["sdp"] > 0
        held = survives(0.999 * radii["sdp"])
    right = np.asarray(logits.argmax(-1) == labels)
    return {
        "images": len(labels),
        "lipschitz": constants,
        "right": float(right.mean()),
        "median_radius": float(np.median(radii["sdp"])),
        "radii": rows,
        "attacks_inside": {"tried": int(inside.sum()), "succeeded": int((inside & ~held).sum())},
    }


def pixel_radius(radius: Any, pixels: Any) -> Any:
    """How far an image of pixels between 0 and 1 may move if its standardised image may move by ``radius``.

    Of n numbers with deviation s, standardisation divides by max(s, 1/√n). An image that has moved by r has a deviation
    of at least s - r/√n. So on the way there it is stretched by at most 1 / max(s - r/√n, 1/√n), and r times that is at
    most R if r = max(R s / (1 + R/√n), R/√n).
    """
    floor = 1 / np.prod(pixels.shape[1:]) ** 0.5
    deviation = jnp.asarray(pixels).std(axis=tuple(range(1, pixels.ndim)))
    return jnp.maximum(radius * deviation / (1 + radius * floor), radius * floor)


def make_attack(logits_of: Callable[..., Any], params: Any, pixels: Any, labels: Any) -> Callable[[Any], Any]:
    """Makes ``resists(radius)``: whether each image keeps its label under projected gradient steps in a ball around it.

    ``radius`` (N,) holds one radius for each image. ``pixels`` are between 0 and 255, as ``logits_of`` takes
    them. The balls are not cut at black and white, which can only help the attack.
    """
    lengths = lambda x: jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
    project = jax.vmap(optax.projections.projection_l2_ball)
    widen = lambda radius: radius.reshape(-1, *(1,) * (pixels.ndim - 1))

    def loss(change):
        logits = logits_of(params, pixels + 255 * change)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), logits.argmax(-1) == labels

    @jax.jit
    def step(change, held, radius):
        gradient, right = jax.grad(loss, has_aux=True)(change)
        gradient = gradient / jnp.maximum(lengths(gradient), jnp.finfo(jnp.float32).tiny)
        return project(change + 2.5 / STEPS * widen(radius) * gradient, radius), held & right

    def resists(radius):
        change = jax.random.normal(jax.random.key(0), pixels.shape)
        change, held = change * widen(radius) / lengths(change), jnp.ones(len(labels), bool)
        for _ in range(STEPS):
            change, held = step(change, held, radius)
        return held & loss(change)[1]

    return resists
