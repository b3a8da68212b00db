"""Networks of the kinds that people bring: read, constrained, and inside by their own layers' Jacobians; or refused by name."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import opnorm_jax as oj

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def standard_promotion():
    """The models promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def steepest(layer, shape, steps=60):
    """What a layer, linear apart from constants, does to the best vector that power iterations find: never too much."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    origin = layer(jnp.zeros(shape))
    _, transpose = jax.vjp(layer, jnp.zeros(shape))
    step = jax.jit(lambda x: transpose(layer(x) - origin)[0])
    for _ in range(steps):
        x = step(x)
        x = x / max(float(jnp.linalg.norm(x)), 1e-30)
    return float(jnp.linalg.norm(layer(x) - origin))


def test_equinox_unet():
    """Strided down, transposed up, joined with what was there before."""
    eqx = pytest.importorskip("equinox")

    class UNet(eqx.Module):
        first: eqx.nn.Conv2d
        down: eqx.nn.Conv2d
        middle: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d
        last: eqx.nn.Conv2d

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.first = eqx.nn.Conv2d(2, 4, 3, padding=1, padding_mode="REPLICATE", key=keys[0])
            self.down = eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, key=keys[1])
            self.middle = eqx.nn.Conv2d(6, 6, 3, padding=1, key=keys[2])
            self.up = eqx.nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, key=keys[3])
            self.last = eqx.nn.Conv2d(8, 1, 3, padding=1, padding_mode="CIRCULAR", key=keys[4])

        def __call__(self, x):
            x = jax.nn.relu(self.first(x))
            deep = jax.nn.relu(self.middle(jax.nn.relu(self.down(x))))
            return self.last(jnp.concatenate([x, jax.nn.relu(self.up(deep))]))

    net, x = UNet(jax.random.key(0)), jnp.ones((2, 8, 8))
    net = jax.tree.map(lambda leaf: 5 * leaf if eqx.is_array(leaf) else leaf, net)
    convs = oj.find_convs(lambda net, x: net(x), net, x)
    assert convs.first.weight.padding == "EDGE" and convs.last.weight.padding == "CIRCULAR"
    assert convs.up.weight.input_dilation == (2, 2)
    held = oj.constrain(net, 0.8, convs)
    for name, shape in {"first": (2, 8, 8), "down": (4, 8, 8), "middle": (6, 4, 4), "up": (6, 4, 4)}.items():
        assert 0.3 < steepest(getattr(held, name), shape) <= 0.8 * (1 + 1e-5)
    jacobian = np.asarray(jax.jacobian(held)(x)).reshape(64, 128)
    assert np.linalg.norm(jacobian, 2) <= oj.lipschitz_bound(lambda net, x: net(x), held, x) < 1.5


class WaveNet(nn.Module):
    """Dilated causal layers with gates."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1,))(x)
        for n in range(4):
            options = {"kernel_dilation": 2**n, "padding": "CAUSAL"}
            gate = nn.tanh(nn.Conv(4, (2,), **options)(x)) * nn.sigmoid(nn.Conv(4, (2,), **options)(x))
            x = x + nn.Conv(4, (1,))(gate)
        return nn.Conv(3, (1,))(x)


def test_wavenet():
    net, x = WaveNet(), jnp.ones((1, 32, 1))
    params = net.init(jax.random.key(0), x)
    convs = oj.find_convs(net.apply, params, x)
    pads = [
        conv.padding for conv in jax.tree.leaves(convs) if isinstance(conv, oj.Conv) and conv.kernel_dilation > (1,)
    ]
    assert sorted(pads) == sorted([((2**n, 0),) for n in (1, 2, 3)] * 2)
    held = oj.constrain(params, 0.5, convs)["params"]
    conv = nn.Conv(4, (2,), kernel_dilation=8, padding="CAUSAL")
    assert steepest(lambda x: conv.apply({"params": held["Conv_11"]}, x), (1, 32, 4)) <= 0.5 * (1 + 1e-5)
    # A gate changes by as much as its tanh and a quarter as much as its sigmoid: all layers have norm 1/2 at most.
    jacobian = jax.jit(jax.jacobian(lambda x: net.apply({"params": held}, x)))
    points = [scale * jax.random.normal(jax.random.key(1), x.shape) for scale in (0.01, 1.0, 10.0)]
    seen = max(np.linalg.norm(np.asarray(jacobian(point)).reshape(96, 32), 2) for point in points)
    assert seen <= oj.lipschitz_bound(net.apply, {"params": held}, x) <= (1 + 0.5 * (0.5 + 0.5 / 4)) ** 4 / 4 + 1e-5


class Generator(nn.Module):
    """A DCGAN's, on a torus."""

    @nn.compact
    def __call__(self, z):
        x = nn.Dense(4 * 4 * 8)(z).reshape(-1, 4, 4, 8)
        for features in (6, 4):
            x = nn.relu(nn.ConvTranspose(features, (4, 4), (2, 2), padding="CIRCULAR")(x))
        return nn.tanh(nn.ConvTranspose(3, (4, 4), (2, 2), padding="CIRCULAR")(x))


def test_circular_dcgan():
    net, z = Generator(), jnp.ones((1, 5))
    params = net.init(jax.random.key(0), z)
    convs = oj.find_convs(net.apply, params, z, dense=True)
    found = [convs["params"][f"ConvTranspose_{n}"]["kernel"] for n in range(3)]
    assert [conv.input_shape for conv in found] == [(4, 4), (8, 8), (16, 16)]
    assert {conv.padding for conv in found} == {"CIRCULAR"}
    held = oj.constrain(params, 1.0, convs)
    for n, (features, channels) in enumerate(((6, 8), (4, 6), (3, 4))):
        layer = nn.ConvTranspose(features, (4, 4), (2, 2), padding="CIRCULAR")
        one = lambda x: layer.apply({"params": held["params"][f"ConvTranspose_{n}"]}, x)  # noqa: B023
        assert 0.8 < steepest(one, (1, 2 ** (n + 2), 2 ** (n + 2), channels)) <= 1 + 1e-5


def test_modulated_layers_are_refused_by_name():
    """StyleGAN2 multiplies a kernel by a style for each channel: the parameter is not what is applied."""

    def net(params, x, style):
        scaled = params["modulated"] * (style @ params["style"])[None, None, :, None]
        scaled = scaled / jnp.sqrt(jnp.sum(scaled**2, axis=(0, 1, 2)) + 1e-8)
        conv = lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return conv(jax.nn.leaky_relu(conv(x, scaled)), params["rgb"])

    params = {"modulated": jnp.ones((3, 3, 4, 4)), "style": jnp.ones((6, 4)), "rgb": jnp.ones((1, 1, 4, 3))}
    args = jnp.ones((1, 8, 8, 4)), jnp.ones(6)
    with pytest.raises(ValueError, match=r"params\['modulated'\] \(3, 3, 4, 4\): reaches the convolution through"):
        oj.find_convs(net, params, *args)
    convs = oj.find_convs(net, params, *args, on_unknown="skip")
    assert isinstance(convs["modulated"], oj.Unknown)
    held = oj.constrain(params, 1.0, convs)
    assert np.linalg.norm(held["rgb"][0, 0], 2) <= 1 + 1e-6 and held["modulated"] is params["modulated"]


needs_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed")


@needs_keras
def test_sngp_like_keras_model():
    """Residual layers under Keras's own SpectralNormalization, which sets the kernel, and layers without."""
    import keras

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same")(inputs)
    for _ in range(2):
        branch = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(x)
        x = keras.layers.Add()(
            [x, keras.layers.SpectralNormalization(keras.layers.Conv2D(4, 3, padding="same"))(branch)]
        )
    x = keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    trainable = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]
    fn = lambda params, x: model.stateless_call(params, fixed, x, training=False)[0]
    x = jnp.ones((1, 8, 8, 3))
    convs = oj.find_convs(fn, trainable, x)
    found = [conv for conv in convs if isinstance(conv, oj.Conv)]
    assert len(found) == 5 and {conv.input_shape for conv in found} == {(8, 8)}
    held = oj.constrain(trainable, 0.5, convs)
    assert oj.lipschitz_bound(fn, held, x) < oj.lipschitz_bound(fn, trainable, x)
    bounds = [oj.operator_norm_bounds(k, conv).upper for k, conv in zip(held, convs) if isinstance(conv, oj.Conv)]
    assert max(bounds) <= 0.5 * (1 + 1e-5)


FAMILIES = {"MobileNetV2": (52, 32), "MobileNetV3Small": (54, 32), "EfficientNetB0": (81, 32), "Xception": (74, 71)}


@needs_keras
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_keras_families_are_held_by_a_step(name):
    """All kernels are found and constrained in one step under jit; the layers' own Jacobians are inside."""
    import keras

    count, size = FAMILIES[name]
    found = zoo.keras_application(name, size)
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for leaf in found.params]
    convs = oj.find_convs(found.fn, params, found.image)
    kernels = [n for n, conv in enumerate(convs) if isinstance(conv, oj.Conv)]
    assert len(kernels) == count
    tx = oj.constrain_operator_norm(1.0, convs)
    step = jax.jit(lambda params, state: tx.update(jax.tree.map(jnp.zeros_like, params), state, params))
    updates, _ = step(params, tx.init(params))
    held = [np.asarray(p + u) for p, u in zip(params, updates)]
    assert all(np.array_equal(p, q) for n, (p, q) in enumerate(zip(params, held)) if n not in kernels)
    model = found.model
    for variable, value in zip(model.trainable_variables, held):
        variable.assign(value)
    kinds = keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D
    checked = 0
    for layer in model._flatten_layers(include_self=False, recursive=True):
        if isinstance(layer, kinds):
            before = layer.input._keras_history.operation
            padded = isinstance(before, keras.layers.ZeroPadding2D)  # its zeros are the convolution's padding
            whole = (lambda x: layer(before(x))) if padded else (lambda x: layer(x))  # noqa: B023
            shape = (1, *(before if padded else layer).input.shape[1:])
            assert steepest(whole, shape, 8) <= 1 + 1e-5, layer.name
            checked += 1
    assert checked >= 20
