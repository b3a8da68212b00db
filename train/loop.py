"""The jitted training step, many of them per call, with the data and the augmentation on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parallel

import opnorm_jax as oj


class TrainState(NamedTuple):
    """Everything that training changes; all of it is arrays, so that it can be saved and resumed."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array  # shape=(), int32
    key: jax.Array  # the run's key; step and epoch are folded in, so a resumed run draws what it would have drawn


def schedule(learning_rate: Any, steps: int, decay_steps: int | None = None) -> optax.Schedule:
    """Divided by 10 at 40 %, 60 % and 80 % of the steps (epochs 100, 150 and 200 of 250), or every ``decay_steps``."""
    if decay_steps is not None:
        return optax.exponential_decay(learning_rate, decay_steps, 0.1, staircase=True)
    return optax.piecewise_constant_schedule(learning_rate, {int(steps * share): 0.1 for share in (0.4, 0.6, 0.8)})


def optimizer(name: str, rate: Any, weight_decay: float, convs: Any, constraint: Any) -> Any:
    """Makes the optimizer of this name. A constraint that is not None comes last.

    ``sgd`` has momentum 0.9, and L2 on all trainables enters before the momentum. In ``conv-muon`` weight decay is
    decoupled, and AdamW updates what is no convolution, at a tenth of the rate.
    """
    if name == "conv-muon":
        adam = {"adam_learning_rate": lambda count: 0.1 * rate(count), "adam_weight_decay": weight_decay}
        parts = [oj.conv_muon(rate, convs, weight_decay=weight_decay, **adam)]
    else:
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


class Batches(NamedTuple):
    """How batches are drawn from the training images."""

    size: int
    per_epoch: int
    pad: int  # pixels of zeros around an image before a crop of its own size
    flip: bool


def make_run_steps(
    forward: Any, tx: Any, batches: Batches, layout: parallel.Layout | None = None, axes: Any = None
) -> Any:
    """Makes ``run(state, images, labels, steps)``, which takes ``steps`` (static) training steps.

    ``forward(params, batch_stats, images, **options)`` is the network. The call returns the state, the mean loss and
    the mean accuracy. ``layout`` says over which devices each batch is split; ``axes`` are those of a stacked state, to
    train several seeds.
    """
    batch_size, per_epoch, pad, flip = batches
    over_seeds = lambda function, in_axes, out_axes=0: (
        function if axes is None else jax.vmap(function, in_axes=in_axes, out_axes=out_axes)
    )

    def shuffle(key, epoch, images):
        return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), len(images))

    def draw(key, order, step, images, labels):
        rows = jax.lax.dynamic_slice(order, ((step % per_epoch) * batch_size,), (batch_size,))
        rows = rows if layout is None else jax.lax.with_sharding_constraint(rows, layout.split)
        key = jax.random.fold_in(jax.random.fold_in(key, 1), step)
        return standardise(augment(key, images[rows], pad, flip)), labels[rows]

    def loss_of(params, batch_stats, images, labels):
        logits, changed = forward(params, batch_stats, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (loss, changed.get("batch_stats", {}), (logits.argmax(-1) == labels).mean())

    gradient = gradient_of_each(loss_of, axes is not None, jax.default_backend())

    def move(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def run(state: TrainState, images: jax.Array, labels: jax.Array, steps: int):
        epoch = state.step // per_epoch  # a call never straddles two epochs
        order = over_seeds(shuffle, (0, None, None))(state.key, epoch, images)
        opt_axes = None if axes is None else axes.opt_state

        def one(state, _):
            batch = over_seeds(draw, (0, 0, None, None, None))(state.key, order, state.step, images, labels)
            grads, (loss, batch_stats, accuracy) = gradient(state.params, state.batch_stats, *batch)
            moved = over_seeds(move, (0, opt_axes, 0), (0, opt_axes))
            params, opt_state = moved(state.params, state.opt_state, grads)
            return TrainState(params, batch_stats, opt_state, state.step + 1, state.key), (loss, accuracy)

        if steps == 1:
            state, (loss, accuracy) = one(state, None)
            return state, loss, accuracy
        state, (losses, accuracies) = jax.lax.scan(one, state, None, length=steps)
        return state, losses.mean(0), accuracies.mean(0)

    placed = {} if layout is None else {"out_shardings": layout.everywhere}
    return jax.jit(run, static_argnames="steps", donate_argnums=0, **placed)


def gradient_of_each(loss_of: Any, stacked: bool, platform: str) -> Any:
    """``jax.grad(loss_of, has_aux=True)``, for each of a stack of networks if they are one.

    Of a stack it is, on a GPU, the gradient of the losses' sum: of gradients under ``vmap`` XLA does not see that they
    are a convolution's, and calls none of cuDNN's routines for them. On a CPU that was measured four times slower.
    """
    if not stacked:
        return jax.grad(loss_of, has_aux=True)
    if platform == "cpu":
        return jax.vmap(jax.grad(loss_of, has_aux=True))

    def total(*args):
        losses, aux = jax.vmap(loss_of)(*args)
        return losses.sum(), aux

    return jax.grad(total, has_aux=True)


def make_evaluate(forward: Any, batch_size: int, layout: parallel.Layout | None = None, stacked: bool = False) -> Any:
    """``evaluate(params, batch_stats, images, labels)``: the share of images classified wrongly, for each seed."""
    if layout is not None:
        batch_size = -(-batch_size // layout.devices) * layout.devices

    def wrong(params, batch_stats, images, labels, start):
        rows = start + jnp.arange(batch_size)
        rows = rows if layout is None else jax.lax.with_sharding_constraint(rows, layout.split)
        valid, rows = rows < len(images), jnp.minimum(rows, len(images) - 1)

        def one(params, batch_stats):
            logits = forward(params, batch_stats, standardise(images[rows]), train=False)
            return ((logits.argmax(-1) != labels[rows]) & valid).sum()

        return (jax.vmap(one) if stacked else one)(params, batch_stats)

    wrong = jax.jit(wrong, **({} if layout is None else {"out_shardings": layout.everywhere}))

    def evaluate(params, batch_stats, images, labels):
        starts = range(0, len(images), batch_size)
        counts = [wrong(params, batch_stats, images, labels, start) for start in starts]
        share = sum(np.asarray(count, np.int64) for count in counts) / len(images)
        return share if stacked else float(share)

    return evaluate


def call_ends(per_epoch: int, platform: str) -> list[int]:
    """After which steps of an epoch a call to the device ends: short ones keep the progress bar alive.

    On a CPU one step a call: inside a loop XLA compiles convolutions to code that was measured 60 times slower.
    Elsewhere about 50, all of one length where that divides the epoch, since each length is compiled.
    """
    length = 1 if platform == "cpu" else min(per_epoch, 50)
    length = next((n for n in range(length, length // 2, -1) if per_epoch % n == 0), length)
    return [*range(length, per_epoch, length), per_epoch]
