"""Networks whose training steps are timed: the paper's ResNet-32, ResNet-18 on 32x32 images, and a wide ResNet-14."""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import opnorm_jax as oj

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from resnet import ResNet  # noqa: E402


class ResNet18(nn.Module):
    """The one for 32x32 images: a 3x3 stem, no pooling, widths 64 to 512."""

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(64, (3, 3), use_bias=False)(x)))
        for stage in range(4):
            for block in range(2):
                width, stride = 64 * 2**stage, 2 if stage and not block else 1
                y = nn.relu(norm()(nn.Conv(width, (3, 3), stride, use_bias=False)(x)))
                y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
                if x.shape != y.shape:
                    x = norm()(nn.Conv(width, (1, 1), stride, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


NETWORKS = {
    "ResNet-32": lambda: ResNet(32),
    "ResNet-18": ResNet18,
    "ResNet-14, 8 times as wide": lambda: ResNet(14, width=128),
    "ResNet-20": lambda: ResNet(20),
    "ResNet-8": lambda: ResNet(8),
}


def largest_jacobian(fn, params, points, steps):
    """The largest norm of the Jacobian at the points, from below, by so many steps of power iteration each."""

    @jax.jit
    def at(point, key):
        vector = jax.random.normal(key, point.shape, point.dtype)
        out, forward = jax.linearize(lambda x: fn(params, x), point)
        backward = jax.linear_transpose(forward, point)
        unit = lambda v: v / jnp.linalg.norm(v.ravel())
        vector = jax.lax.fori_loop(0, steps, lambda _, v: unit(backward(forward(v))[0]), unit(vector))
        return jnp.linalg.norm(forward(vector).ravel())

    keys = jax.random.split(jax.random.key(1), len(points))
    return max(float(at(point[None], key)) for point, key in zip(points, keys))


class Training:
    """One network with its data, its convolutions and its step functions."""

    def __init__(self, name, batch):
        self.model = NETWORKS[name]()
        self.images = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
        self.labels = jnp.arange(batch) % 10
        variables = self.model.init(jax.random.key(1), self.images[:1], train=True)
        self.params, self.statistics = variables["params"], variables["batch_stats"]
        apply = lambda params, x: self.model.apply({"params": params, "batch_stats": self.statistics}, x, train=False)
        self.convs = oj.find_convs(apply, self.params, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
        # As in the midst of training: inside the ball, and moved a little by the optimizer.
        self.params = jax.jit(lambda params: oj.constrain(params, 1.0, self.convs))(self.params)

    def constraint(self, constraint, every):
        return oj.constrain_operator_norm(1.0, self.convs, constraint=constraint, every=every)

    def step(self, tx, normalized=False):
        """One jitted step of SGD with momentum and ``tx`` last: a function of the optimizer's state, and that state."""
        forward = lambda params: self.model.apply(
            {"params": params, "batch_stats": self.statistics}, self.images, train=True, mutable=["batch_stats"]
        )
        forward = oj.normalize(forward) if normalized else forward
        tx = optax.chain(optax.sgd(0.1, momentum=0.9), *([tx] if tx else []))

        @jax.jit
        def step(params, state):
            def loss(params):
                logits, mutated = forward(params)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.labels)
                return losses.mean(), mutated

            gradient, mutated = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, mutated

        return step, tx.init(self.params)

    def alone(self, tx):
        """The constraint by itself, after a step of plain SGD: a jitted function, and its arguments."""
        step, state = self.step(None)
        moved = jax.block_until_ready(step(self.params, state)[0])
        updates = jax.tree.map(jnp.subtract, moved, self.params)
        return jax.jit(tx.update), (updates, tx.init(self.params), self.params)


def chained(act, updates, state, params):
    """A function of nothing that hands the updates and the state on from call to call, in place.

    As in a training step, where neither is copied because nobody else reads them.
    """
    act = jax.jit(act, donate_argnums=(0, 1))
    held = jax.tree.map(jnp.copy, (updates, state))

    def call():
        nonlocal held
        held = act(*held, params)
        return held

    return call
