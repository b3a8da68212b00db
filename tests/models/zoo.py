"""Models from packages on PyPI: each a function, its parameters, an image, and its convolutions by another way.

Those are read off the layer objects of a model, not off its traced program.
Nothing is downloaded, and where a framework can describe parameters without making them, none are made.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported

import importlib  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402
from unittest import mock  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402


class Layer(NamedTuple):
    """A convolution as its framework's layer object says; ``None`` where that says nothing of it."""

    strides: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    input_shape: tuple[int, ...] | None


class Model(NamedTuple):
    fn: Any
    params: Any
    image: jax.ShapeDtypeStruct
    layers: list[Layer]
    model: Any = None  # the framework's own object, where a test needs it


def image(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def keras_application(name, size=224):
    keras = importlib.import_module("keras")
    zeros = lambda self, shape, dtype=None: np.zeros(shape, "float32")  # a program compiled for each shape, otherwise
    with mock.patch.object(keras.initializers.VarianceScaling, "__call__", zeros):
        model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3))
    layers = []
    for layer in model._flatten_layers(include_self=False, recursive=True):
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)):
            before = layer.input._keras_history.operation
            zeros = isinstance(before, keras.layers.ZeroPadding2D)  # its zeros are the convolution's padding
            *shape, channels = (before.input if zeros else layer.input).shape[1:]
            groups = layer.groups if type(layer) is keras.layers.Conv2D else channels
            layers.append(Layer(layer.strides, layer.dilation_rate, groups, tuple(shape)))
        if isinstance(layer, keras.layers.SeparableConv2D):
            layers.append(Layer((1, 1), (1, 1), 1, tuple(layer.output.shape[1:-1])))
    fixed = [variable.value for variable in model.non_trainable_variables]
    values = [variable.value for variable in model.trainable_variables]
    params = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]

    def fn(params, x):
        return model.stateless_call(params, fixed, x, training=False)[0]

    return Model(fn, params, image(1, size, size, 3), layers, model)


def flax_module(module, size, channels=3, input_shape=None, **options):
    """A Linen module; its layer objects are seen while the shapes of its parameters are found."""
    nn = importlib.import_module("flax.linen")
    x = image(*(input_shape or (1, size, size, channels)))
    layers = []

    def watch(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, nn.Conv) and context.method_name == "__call__":
            ones = (1,) * len(layer.kernel_size)
            strides, dilation = (
                (value,) * len(ones) if isinstance(value, int) else tuple(value or ones)
                for value in (layer.strides, layer.kernel_dilation)
            )
            layers.append(Layer(strides, dilation, layer.feature_group_count, args[0].shape[1:-1]))
        return call(*args, **kwargs)

    def init(x):
        with nn.intercept_methods(watch):
            return module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, **options)

    variables = dict(jax.eval_shape(init, x))
    params = variables.pop("params")
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)

    def fn(params, x):
        return module.apply({"params": params, **state}, x, mutable=False, **options)

    return Model(fn, params, x, layers)


def jax_resnet(name):
    package = importlib.import_module("jax_resnet")
    return flax_module(getattr(package, name)(n_classes=1000), 224)


def flaxmodel(name, size=224):
    package = importlib.import_module("flaxmodels")
    model = getattr(package, name)(output="logits", pretrained=None)
    return flax_module(model, size, train=False)


def haiku_net(name, size=224):
    hk = importlib.import_module("haiku")

    def net(x, is_training=False):
        return getattr(hk.nets, name)(num_classes=1000)(x, is_training=is_training)

    transformed = hk.without_apply_rng(hk.transform_with_state(net))
    x = image(1, size, size, 3)
    layers = []

    def watch(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, hk.ConvND) and context.method_name == "__call__":
            layers.append(Layer(layer.stride, layer.kernel_dilation, layer.feature_group_count, args[0].shape[1:-1]))
        elif isinstance(layer, hk.DepthwiseConv2D) and context.method_name == "__call__":
            *shape, channels = args[0].shape[1:]
            layers.append(Layer(layer.stride, (1, 1), channels, tuple(shape)))
        return call(*args, **kwargs)

    def init(x):
        with hk.intercept_methods(watch):
            return transformed.init(jax.random.key(0), x, is_training=True)

    params, state = jax.eval_shape(init, x)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    return Model(lambda params, x: transformed.apply(params, state, x)[0], params, x, layers)


def equimo(name, module, options=(), size=224):
    """An Equinox model, which takes one image; its layer objects do not say of what size theirs are."""
    eqx = importlib.import_module("equinox")
    build = getattr(importlib.import_module(f"equimo.vision.models.{module}"), name)
    model = eqx.filter_eval_shape(lambda key: build(key=key, **dict(options)), jax.random.key(0))
    is_layer = lambda node: isinstance(node, (eqx.nn.Conv, eqx.nn.ConvTranspose))
    found = [leaf for leaf in jax.tree.leaves(model, is_leaf=is_layer) if is_layer(leaf)]
    ones = lambda layer: (1,) * len(layer.stride)  # a transposed layer's stride dilates its input
    layers = [
        Layer(layer.stride if isinstance(layer, eqx.nn.Conv) else ones(layer), layer.dilation, layer.groups, None)
        for layer in found
    ]
    arrays = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    params, fixed = eqx.partition(model, arrays)

    def fn(params, x):
        return eqx.combine(params, fixed)(x, key=jax.random.key(0), inference=True)

    return Model(fn, params, image(3, size, size), layers)


# name: (package, builder, arguments)
MODELS = {
    "Keras ResNet50": ("keras", keras_application, ("ResNet50",)),
    "Keras MobileNetV2": ("keras", keras_application, ("MobileNetV2",)),
    "Keras EfficientNetB0": ("keras", keras_application, ("EfficientNetB0",)),
    "Keras Xception": ("keras", keras_application, ("Xception",)),
    "jax-resnet ResNet18": ("jax_resnet", jax_resnet, ("ResNet18",)),
    "jax-resnet ResNet50": ("jax_resnet", jax_resnet, ("ResNet50",)),
    "jax-resnet ResNetD50": ("jax_resnet", jax_resnet, ("ResNetD50",)),
    "jax-resnet ResNeXt50": ("jax_resnet", jax_resnet, ("ResNeXt50",)),
    "jax-resnet WideResNet50": ("jax_resnet", jax_resnet, ("WideResNet50",)),
    "jax-resnet ResNeSt50": ("jax_resnet", jax_resnet, ("ResNeSt50",)),
    "flaxmodels ResNet18": ("flaxmodels", flaxmodel, ("ResNet18",)),
    "flaxmodels ResNet50": ("flaxmodels", flaxmodel, ("ResNet50",)),
    "flaxmodels VGG16": ("flaxmodels", flaxmodel, ("VGG16",)),
    "Haiku ResNet18": ("haiku", haiku_net, ("ResNet18",)),
    "Haiku ResNet50": ("haiku", haiku_net, ("ResNet50",)),
    "Haiku MobileNetV1": ("haiku", haiku_net, ("MobileNetV1",)),
    "equimo ConvNeXt atto": ("equimo", equimo, ("convnext_atto", "convnext")),
    "equimo ConvNeXt V2 atto": ("equimo", equimo, ("convnextv2_atto", "convnext")),
    "equimo MobileNetV3 small": ("equimo", equimo, ("mobilenetv3_small", "mobilenet")),
    "equimo IFormer tiny": ("equimo", equimo, ("iformer_t", "iformer")),
    "equimo LowFormer b0": (
        "equimo",
        equimo,
        ("lowformer_backbone_b0", "lowformer", {"attention_type": "softmax"}, 256),
    ),
    "equimo ReduceFormer b1": ("equimo", equimo, ("reduceformer_backbone_b1", "reduceformer")),
    "equimo AttNet xxs": ("equimo", equimo, ("attnet_xxs", "attnet")),
    "equimo ViT tiny": ("equimo", equimo, ("vit_tiny_patch16_224", "vit")),
}


def build(name):
    _, builder, arguments = MODELS[name]
    return builder(*arguments)
