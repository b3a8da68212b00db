"""The jitted training step, many of them per call, with the data and the augmentation on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import opnorm_jax as oj


class TrainState(NamedTuple):
    """Everything that training changes; all of it is arrays, so that it can be saved and resumed."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array  # shape=(), int32
    key: jax.Array  # the run's key; step and epoch are folded in, so a resumed run draws what it would have drawn


def schedule(learning_rate: float, steps: int) -> optax.Schedule:
    """Divided by 10 at 40 %, 60 % and 80 % of the steps (epochs 100, 150 and 200 of 250)."""
    return optax.piecewise_constant_schedule(learning_rate, {int(steps * share): 0.1 for share in (0.4, 0.6, 0.8)})


def optimizer(rate: Any, weight_decay: float, constraint: optax.GradientTransformation | None) -> Any:
    """SGD with momentum 0.9; L2 on all trainables enters before the momentum. The constraint comes last."""
    parts = [optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9)]
    return optax.chain(*parts, *([constraint] if constraint is not None else []))


def standardise(images: jax.Array) -> jax.Array:
    """uint8 (N, H, W, C) to float32, each image to mean 0 and deviation 1 (floored at 1/sqrt of its size)."""
    x = images.astype(jnp.float32) / 255
    axes = tuple(range(1, x.ndim))
    x = x - x.mean(axes, keepdims=True)
    floor = 1 / (x.size / x.shape[0]) ** 0.5
    return x / jnp.maximum(jnp.sqrt((x * x).mean(axes, keepdims=True)), floor)


def augment(key: jax.Array, images: jax.Array, pad: int, flip: bool) -> jax.Array:
    """A random crop out of the zero-padded image, and a random flip; uint8 in and out."""
    n, h, w, c = images.shape
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(crop_key, (n, 2), 0, 2 * pad + 1)
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))
    out = jax.vmap(crop)(padded, corners)
    if flip:
        flips = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
        out = jnp.where(flips, out[:, :, ::-1], out)
    return out


def make_run_steps(model: Any, tx: Any, batch_size: int, pad: int, flip: bool, per_epoch: int) -> Any:
    """``run(state, images, labels, steps)`` takes ``steps`` (static) training steps; returns mean loss and accuracy."""

    def loss_fn(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (changed.get("batch_stats", {}), (logits.argmax(-1) == labels).mean())

    def run(state: TrainState, images: jax.Array, labels: jax.Array, steps: int):
        epoch = state.step // per_epoch  # a call never straddles two epochs
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(state.key, 0), epoch), len(images))

        def one(state, _):
            rows = jax.lax.dynamic_slice(order, ((state.step % per_epoch) * batch_size,), (batch_size,))
            key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
            x = standardise(augment(key, images[rows], pad, flip))
            gradient = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, (batch_stats, accuracy)), grads = gradient(state.params, state.batch_stats, x, labels[rows])
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, batch_stats, opt_state, state.step + 1, state.key), (loss, accuracy)

        if steps == 1:
            state, (loss, accuracy) = one(state, None)
            return state, loss, accuracy
        state, (losses, accuracies) = jax.lax.scan(one, state, None, length=steps)
        return state, losses.mean(), accuracies.mean()

    return jax.jit(run, static_argnames="steps", donate_argnums=0)


def make_evaluate(model: Any, batch_size: int) -> Any:
    """``evaluate(params, batch_stats, images, labels)``: the share of images classified wrongly."""

    @jax.jit
    def wrong(params, batch_stats, images, labels, valid):
        logits = model.apply({"params": params, "batch_stats": batch_stats}, standardise(images), train=False)
        return ((logits.argmax(-1) != labels) & valid).sum()

    def evaluate(params, batch_stats, images, labels) -> float:
        total = 0
        for start in range(0, len(images), batch_size):
            rows = jnp.arange(start, start + batch_size)
            valid, rows = rows < len(images), jnp.minimum(rows, len(images) - 1)
            total += int(wrong(params, batch_stats, images[rows], labels[rows], valid))
        return total / len(images)

    return evaluate


def steps_per_call(per_epoch: int, platform: str) -> list[int]:
    """How an epoch is divided into calls: short ones keep the progress bar alive.

    On a CPU one step a call: inside a loop XLA compiles convolutions to code that was measured 60 times slower.
    """
    length = 1 if platform == "cpu" else min(per_epoch, 50)
    return [length] * (per_epoch // length) + ([per_epoch % length] if per_epoch % length else [])


def make_constraint(method: str, max_norm: float, convs: Any, every: int) -> optax.GradientTransformation | None:
    """The transformation, or None for the arm without a constraint."""
    if method == "none":
        return None
    return oj.constrain_operator_norm(max_norm, convs, every=every, method=method, warm_start=method == "project")
