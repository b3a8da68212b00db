"""What Flax's SpectralNorm leaves of a layer's own norm, and what exact normalisation costs a training step.

    python -m benchmarks spectral_norm [--quick]

Layers of 16 channels on 16 x 16 pixels with random kernels, after 600 power iterations of the stock wrapper. Norms are
those of the layer's own Jacobian, by 300 power iterations through it. A step is one of SGD with momentum; normalised,
every kernel is rescaled into the unit ball in the forward pass, and the gradient goes through the norm.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import opnorm_jax as oj
from benchmarks.measure import interleaved, show
from benchmarks.networks import Training

LAYERS = {
    "3 x 3": (nn.Conv, (3, 3), {}),
    "5 x 5": (nn.Conv, (5, 5), {}),
    "3 x 3, stride 2": (nn.Conv, (3, 3), {"strides": 2}),
    "3 x 3, dilation 2": (nn.Conv, (3, 3), {"kernel_dilation": 2}),
    "3 x 3, depthwise": (nn.Conv, (3, 3), {"feature_group_count": 16}),
    "4 x 4 transposed, stride 2": (nn.ConvTranspose, (4, 4), {"strides": (2, 2)}),
    "2 x 2, stride 2": (nn.Conv, (2, 2), {"strides": 2}),
}
SHAPE = (1, 16, 16, 16)


def norm_of(fn):
    """The norm of a linear function of an image."""
    forward = jax.jit(lambda x: fn(x) - fn(jnp.zeros(SHAPE)))
    backward = jax.jit(jax.linear_transpose(forward, jnp.zeros(SHAPE)))
    vector = jax.random.normal(jax.random.key(5), SHAPE)
    for _ in range(300):
        vector = backward(forward(vector / jnp.linalg.norm(vector.ravel())))[0]
    return float(jnp.linalg.norm(forward(vector / jnp.linalg.norm(vector.ravel())).ravel()))


def norms(name):
    """The norms that the two wrappers leave."""
    layer, taps, options = LAYERS[name]

    def of(wrapper, **more):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return wrapper(layer(16, taps, **options), **more)(x, update_stats=True)

        variables = Net().init(jax.random.key(0), jnp.zeros(SHAPE))
        apply = lambda variables, x: Net().apply(variables, x, mutable=["batch_stats"])
        for _ in range(3):
            variables = {**variables, **apply(variables, jnp.zeros(SHAPE))[1]}
        return norm_of(lambda x: apply(variables, x)[0])

    row = {"layer": name, "SpectralNorm": of(nn.SpectralNorm, n_steps=200), "OperatorNorm": of(oj.linen.OperatorNorm)}
    show(row)
    return row


def step(name, batch, repeats):
    """A training step with and without normalisation."""
    training = Training(name, batch)
    functions = {}
    for kind in ("plain", "normalized"):
        one, state = training.step(None, normalized=kind == "normalized")
        functions[kind] = lambda one=one, state=state: one(training.params, state)
    seconds = interleaved(functions, repeats)
    row = {"network": name, "batch": batch, "share": seconds["normalized"] / seconds["plain"] - 1, "seconds": seconds}
    show(row)
    return row


def run(options):
    """All rows."""
    layers = list(LAYERS)[:1] if options.quick else LAYERS
    return [norms(name) for name in layers] + [step("ResNet-8" if options.quick else "ResNet-32", 128, options.repeats)]
