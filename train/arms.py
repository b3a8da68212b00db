"""The arms of the comparison: how the kernels are constrained, inside the step and once more after the last."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import opnorm_jax as oj
from opnorm_jax._blocks import factor


def make_constraint(constraint: str, max_norm: float, convs: Any, every: int) -> optax.GradientTransformation | None:
    """The transformation, or None for the arms whose steps are not constrained."""
    if constraint in ("none", "normalize"):
        return None
    if constraint == "reshape":
        return reshape_transformation(max_norm, convs, every)
    return oj.constrain_operator_norm(max_norm, convs, constraint=constraint, every=every)


def make_finish(constraint: str, max_norm: float, convs: Any) -> Callable[[Any], Any]:
    """Parameters to constrained parameters: the last steps of a run may have left the ball."""
    if constraint == "none":
        return lambda params: params
    if constraint == "reshape":
        return lambda params: clip_reshaped(params, max_norm, convs)
    constraint = "rescale" if constraint == "normalize" else constraint  # the same function of the image
    return lambda params: oj.constrain(params, max_norm, convs, constraint=constraint)


def make_forward(model: Any, constraint: str, max_norm: float) -> Callable[..., Any]:
    """Makes ``forward(params, batch_stats, images, **options)``, with normalised kernels in that arm."""

    def forward(params, batch_stats, images, **options):
        return model.apply({"params": params, "batch_stats": batch_stats}, images, **options)

    return oj.normalize(forward, max_norm) if constraint == "normalize" else forward


class ReshapeState(NamedTuple):
    """State of :func:`reshape_transformation`."""

    count: jax.Array  # shape=(), int32: updates so far


def reshape_transformation(max_norm: float, convs: Any, every: int = 1) -> optax.GradientTransformation:
    """:func:`clip_reshaped` as the last of a chain of transformations, on the updates number 0, ``every``, ..."""

    def update(updates, state, params=None):
        def act(updates):
            moved = jax.tree.map(lambda p, u: p + u, params, updates)
            clipped = clip_reshaped(moved, max_norm, convs)
            # What was not clipped keeps its update bit for bit.
            step = lambda c, m, p, u: jnp.where((c == m).all(), u, c - p)
            return jax.tree.map(step, clipped, moved, params, updates)

        updates = jax.lax.cond(state.count % every == 0, act, lambda updates: updates, updates)
        return updates, ReshapeState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: ReshapeState(jnp.zeros((), jnp.int32)), update)  # type: ignore[arg-type]


def clip_reshaped(params: Any, max_norm: float, convs: Any) -> Any:
    """Each kernel's singular values, as an (o) x (i kh kw) matrix, cut at ``max_norm``; kernels of a shape at once.

    The baseline of Yoshida and Miyato's kind, to which the paper compares: cheap, and the same for every image size,
    but no bound on the convolution's operator norm.
    """
    leaves, treedef = jax.tree.flatten(params)
    alike: dict[tuple[int, ...], list[int]] = {}
    for n, (leaf, conv) in enumerate(zip(leaves, treedef.flatten_up_to(convs))):
        if conv is not None:
            alike.setdefault(leaf.shape, []).append(n)
    for shape, members in alike.items():
        stack = jnp.stack([leaves[n].reshape(-1, shape[-1]) for n in members])
        for n, matrix in zip(members, clip_matrices(stack, max_norm)):
            leaves[n] = matrix.reshape(shape)
    return treedef.unflatten(leaves)


def clip_matrices(stack: jax.Array, max_norm: float) -> jax.Array:
    """Singular values of (c, m, n) matrices cut at ``max_norm``; a matrix with none above it comes back bit for bit."""
    square, vectors = factor.eigh(factor.gram(stack))
    values = jnp.sqrt(jnp.maximum(square, 0))
    excess = jnp.where(values > max_norm, 1 - max_norm / values, 0)[:, None, :]
    product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    above = product(vectors * excess, vectors.swapaxes(-1, -2))
    m, n = stack.shape[-2:]
    return stack - (product(stack, above) if n <= m else product(above, stack))
