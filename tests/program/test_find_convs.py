"""The walk finds each kernel at the right path, with the right Conv, through everything JAX can wrap around it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from oracle import dense_matrix

import opnorm_jax as oj

pytestmark = pytest.mark.quick

K = jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
X = jax.ShapeDtypeStruct((2, 8, 6, 4), jnp.float32)
MASK = jnp.broadcast_to(jnp.tri(4), (3, 3, 4, 4))
ONES = ((1, 1), (1, 1))
SAME = oj.Conv((8, 6), padding=ONES)


def conv(x, kernel, padding="SAME", strides=(1, 1), **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def chain(params, x):
    """Two layers; the second is fed by what the first gave."""
    return conv(jnp.tanh(conv(x, params["a"])), params["b"])


def scanned(params, x):
    return lax.scan(lambda y, k: (conv(y, k), None), x, params["stack"])[0]


def custom(rule):
    @rule
    def layer(x, k):
        return conv(x, k)

    if rule is jax.custom_jvp:
        layer.defjvp(lambda primals, tangents: (layer(*primals), tangents[0]))
    else:
        layer.defvjp(lambda x, k: (layer(x, k), None), lambda residual, g: (g, None))
    return lambda params, x: layer(layer(x, params["a"]), params["b"])


TWO = {"a": K, "b": K, "bias": jax.ShapeDtypeStruct((4,), jnp.float32)}
STACK = {"stack": jax.ShapeDtypeStruct((5, 3, 3, 4, 4), jnp.float32)}
CONTAINERS = {
    "plain": (chain, TWO),
    "jit": (jax.jit(chain), TWO),
    "jit within jit": (jax.jit(lambda p, x: jax.jit(chain)(p, x)), TWO),
    "checkpoint": (jax.checkpoint(chain), TWO),
    "custom_jvp": (custom(jax.custom_jvp), TWO),
    "custom_vjp": (custom(jax.custom_vjp), TWO),
    "vmap over images": (lambda p, x: jax.vmap(lambda one: chain(p, one[None]))(x), TWO),
    "cond": (lambda p, x: lax.cond(x.sum() > 0, chain, lambda p, x: conv(x, p["a"]), p, x), TWO),
    "switch": (lambda p, x: lax.switch(2, [chain, chain, lambda p, x: x], p, x), TWO),
    "while": (lambda p, x: lax.while_loop(lambda y: y.sum() < 9, lambda y: chain(p, y), x), TWO),
    "while with the parameters carried": (
        lambda p, x: lax.while_loop(lambda c: c[1].sum() < 9, lambda c: (c[0], chain(*c)), (p, x))[1],
        TWO,
    ),
    "a convolution in a loop's condition": (
        lambda p, x: lax.while_loop(lambda y: conv(y, p["a"]).sum() < 9, lambda y: conv(y, p["b"]), x),
        TWO,
    ),
    "fori_loop": (lambda p, x: lax.fori_loop(0, x.shape[0], lambda _, y: chain(p, y), x), TWO),
    "scan with the kernels constant": (lambda p, x: lax.scan(lambda y, _: (chain(p, y), None), x, None, 3)[0], TWO),
    "scan with the kernels carried": (
        lambda p, x: lax.scan(lambda c, _: ((c[0], chain(*c)), None), (p, x), None, 3)[0][1],
        TWO,
    ),
    "scan over a stack": (scanned, STACK),
    "scan over a stack, checkpointed": (
        lambda p, x: lax.scan(jax.checkpoint(lambda y, k: (conv(y, k), None)), x, p["stack"])[0],
        STACK,
    ),
    "scan of a scan": (
        lambda p, x: lax.scan(lambda y, ks: (scanned({"stack": ks}, y), None), x, p["stack"])[0],
        {"stack": jax.ShapeDtypeStruct((2, 5, 3, 3, 4, 4), jnp.float32)},
    ),
    "a stack taken apart by a Python loop": (
        lambda p, x: functools.reduce(lambda y, n: conv(y, p["stack"][n]), range(5), x),
        STACK,
    ),
    "a stack indexed by a traced number": (
        lambda p, x: lax.fori_loop(0, 5, lambda n, y: conv(y, lax.dynamic_index_in_dim(p["stack"], n, 0, False)), x),
        STACK,
    ),
    "mixed precision": (
        lambda p, x: chain(jax.tree.map(lambda k: k.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)),
        TWO,
    ),
    "barrier": (lambda p, x: chain(*lax.optimization_barrier((p, x))), TWO),
    "stop_gradient": (lambda p, x: chain(lax.stop_gradient(p), x), TWO),
    "named for a checkpoint policy": (
        lambda p, x: chain(jax.tree.map(lambda k: checkpoint_name(k, "k"), p), x),
        TWO,
    ),
    "a kernel used in a penalty too": (lambda p, x: (chain(p, x), sum((k**2).sum() for k in p.values())), TWO),
    "shared": (lambda p, x: chain({"a": p["a"], "b": p["a"]}, conv(x, p["b"])), TWO),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name):
    fn, params = CONTAINERS[name]
    stacked = lambda leaf: dataclasses.replace(SAME, stacked=len(leaf.shape) - 4)
    expected = {key: None if key == "bias" else stacked(leaf) for key, leaf in params.items()}
    assert oj.find_convs(fn, params, X) == expected


GEOMETRIES = {
    "strides, SAME on an even size": (
        lambda k, x: conv(x, k, "SAME", (2, 2)),
        oj.Conv((8, 6), strides=2, padding=((0, 1), (0, 1))),
    ),
    "VALID": (lambda k, x: conv(x, k, "VALID"), oj.Conv((8, 6), padding=0)),
    "explicit": (lambda k, x: conv(x, k, ((2, 0), (1, 3))), oj.Conv((8, 6), padding=((2, 0), (1, 3)))),
    "cropping": (lambda k, x: conv(x, k, ((-1, 0), (1, -2))), oj.Conv((8, 6), padding=((-1, 0), (1, -2)))),
    "kernel dilation": (
        lambda k, x: conv(x, k, "SAME", rhs_dilation=(2, 1)),
        oj.Conv((8, 6), padding=((2, 2), (1, 1)), kernel_dilation=(2, 1)),
    ),
    "transposed": (
        lambda k, x: lax.conv_transpose(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        oj.Conv((8, 6), padding=((2, 1), (2, 1)), input_dilation=2),
    ),
    "zeros padded on before": (
        lambda k, x: conv(jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0))), k, ((1, 0), (0, 0))),
        oj.Conv((8, 6), padding=((2, 2), (0, 3))),
    ),
    "zeros padded on before, dilated": (
        lambda k, x: conv(jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0))), k, ONES, lhs_dilation=(2, 2)),
        oj.Conv((8, 6), padding=((3, 1), (1, 3)), input_dilation=2),
    ),
    "padded, then cropped": (
        lambda k, x: conv(jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))[:, 1:-1, 2:], k, "VALID"),
        oj.Conv((8, 6), padding=((1, 1), (0, 2))),
    ),
    "spread out": (
        lambda k, x: conv(lax.pad(x, 0.0, ((0, 0, 0), (0, 1, 1), (2, 0, 1), (0, 0, 0))), k, "VALID"),
        oj.Conv((8, 6), padding=((0, 1), (2, 0)), input_dilation=2),
    ),
    "zeros joined on": (
        lambda k, x: conv(
            jnp.concatenate([jnp.zeros((len(x), 1, 6, 4)), x, jnp.zeros((len(x), 2, 6, 4))], 1), k, "VALID"
        ),
        oj.Conv((8, 6), padding=((1, 2), (0, 0))),
    ),
    "set into zeros": (
        lambda k, x: conv(jnp.zeros((len(x), 10, 9, 4)).at[:, 1:9, 3:].set(x), k, "VALID"),
        oj.Conv((8, 6), padding=((1, 1), (3, 0))),
    ),
    "added onto constants": (
        lambda k, x: conv(jnp.full((len(x), 10, 9, 4), 0.5).at[:, 1:9, 3:].add(x), k, "VALID"),
        oj.Conv((8, 6), padding=((1, 1), (3, 0))),
    ),
    "rolled, and shifted by a bias": (
        lambda k, x: conv(jnp.pad(jnp.roll(x, 3, 1) + 1, ((0, 0), (1, 0), (0, 0), (0, 0))), k, "VALID"),
        oj.Conv((8, 6), padding=((1, 0), (0, 0))),
    ),
    "a part of the image": (lambda k, x: conv(x[:, 2:, ::2], k), oj.Conv((6, 3), padding=ONES)),
    "kernel stored OIHW": (
        lambda k, x: conv(x, k.transpose(2, 3, 1, 0)),
        oj.Conv((8, 6), padding=ONES, kernel_layout="OIHW"),
    ),
    "images NCHW, kernel OIHW": (
        lambda k, x: lax.conv(x.transpose(0, 3, 1, 2), k, (1, 1), "SAME"),
        oj.Conv((8, 6), padding=ONES, kernel_layout="OIHW"),
    ),
}
SHAPES = {"kernel stored OIHW": (4, 4, 3, 3), "images NCHW, kernel OIHW": (4, 4, 3, 3)}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name):
    fn, expected = GEOMETRIES[name]
    kernel = jax.ShapeDtypeStruct(SHAPES.get(name, K.shape), jnp.float32)
    assert oj.find_convs(fn, kernel, X) == expected
    if name != "joined with its transpose":
        assert np.isclose(*_norms(fn, expected, kernel.shape), rtol=1e-4)


def _norms(fn, conv, kernel_shape):
    """The norm by the found Conv, and that of the traced function itself, as a dense matrix of its Jacobian."""
    kernel = jax.random.normal(jax.random.key(1), kernel_shape)
    jacobian = jax.jacobian(lambda x: fn(kernel, x[None])[0])(jnp.ones(X.shape[1:]))
    size = int(np.prod(X.shape[1:]))
    canonical = np.asarray(kernel).transpose([conv.kernel_layout.index(letter) for letter in "HWIO"])
    options = {"strides": conv.strides, "input_dilation": conv.input_dilation, "kernel_dilation": conv.kernel_dilation}
    found = dense_matrix(canonical, conv.input_shape, padding=conv.padding, **options)
    return np.linalg.norm(found, 2), np.linalg.norm(np.asarray(jacobian, np.float64).reshape(-1, size), 2)


def wrapped(x, low, high):
    return jnp.pad(x, ((0, 0), (low[0], high[0]), (low[1], high[1]), (0, 0)), mode="wrap")


CIRCULAR = {
    "as Flax pads": (lambda k, x: conv(wrapped(x, (1, 1), (1, 1)), k, "VALID"), oj.Conv((8, 6), padding="CIRCULAR")),
    "all on one side": (lambda k, x: conv(wrapped(x, (2, 0), (0, 2)), k, "VALID"), oj.Conv((8, 6), padding="CIRCULAR")),
    "a stride that divides": (
        lambda k, x: conv(wrapped(x, (1, 1), (0, 0)), k, "VALID", (2, 2)),
        oj.Conv((8, 6), strides=2, padding="CIRCULAR"),
    ),
    "a stride that does not": (
        lambda k, x: conv(wrapped(x, (1, 1), (1, 1)), k, "VALID", (3, 4)),
        oj.Conv((8, 6), strides=(3, 4), padding="CIRCULAR"),
    ),
    "dilated, further than the image": (
        lambda k, x: conv(wrapped(x, (9, 7), (9, 7)), k, "VALID", rhs_dilation=(9, 7)),
        oj.Conv((8, 6), kernel_dilation=(9, 7), padding="CIRCULAR"),
    ),
    "a part of the image, turned over": (
        lambda k, x: conv(wrapped(x[:, 2:, ::-1], (0, 2), (2, 0)), k[::-1], "VALID", (4, 1)),
        oj.Conv((6, 6), strides=(4, 1), padding="CIRCULAR"),
    ),
    "written with concatenate and a cast": (
        lambda k, x: conv(
            (lambda y: jnp.concatenate([y[:, :, -1:], y, y[:, :, :1]], 2).astype(jnp.float32))(
                jnp.concatenate([x[:, -1:], x, x[:, :1]], 1)
            ),
            k,
            "VALID",
        ),
        oj.Conv((8, 6), padding="CIRCULAR"),
    ),
}


@pytest.mark.parametrize("name", CIRCULAR)
def test_circular_padding_is_recognised(name):
    fn, expected = CIRCULAR[name]
    assert oj.find_convs(fn, K, X) == expected
    assert np.isclose(*_norms(fn, expected, K.shape), rtol=1e-4)


def padded(x, mode, width=1):
    return jnp.pad(x, ((0, 0), (width, width), (width, width), (0, 0)), mode=mode)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu, jax.nn.leaky_relu, jax.nn.elu, jax.nn.celu])
def test_the_input_is_what_an_activation_gives(activation):
    """Those that choose between two numbers too: not the array that was resized or padded before them."""
    resized = lambda k, x: conv(activation(jax.image.resize(x, (2, 16, 12, 4), "nearest")), k)
    assert oj.find_convs(resized, K, X) == oj.Conv((16, 12), padding=ONES)
    padded_before = lambda k, x: conv(activation(padded(x, "edge")), k, "VALID")
    assert oj.find_convs(padded_before, K, X) == oj.Conv((10, 8), padding=0)


def chosen(params, x):
    return conv(x, lax.cond(x.sum() > 0, lambda: params["a"], lambda: params["b"]))


UNKNOWN = {
    "masked": (lambda p, x: conv(x, p["a"] * MASK), {"a": "through mul"}),
    "standardised": (lambda p, x: conv(x, p["a"] - p["a"].mean()), {"a": "through .*sub"}),
    "two parameters": (lambda p, x: conv(x, p["a"] + p["b"]), {"a": "through add", "b": "through add"}),
    "chosen by a branch": (chosen, {"a": "a branch", "b": "a branch"}),
    "two geometries": (lambda p, x: conv(conv(x, p["a"]), p["a"], "VALID"), {"a": r"used with 2 geometries.*\(1, 1\)"}),
    "a part of it": (lambda p, x: conv(x[..., :1], p["a"][:, :, :1]), {"a": "takes a part of it"}),
    "half of it": (lambda p, x: conv(x[..., :2], p["a"][:, :, :2]), {"a": r"takes a part of it, \(3, 3, 2, 4\)"}),
    "changed by a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda _, c: (c[0] * 0.5, conv(c[1], c[0])), (p["a"], x))[1],
        {"a": "a loop"},
    ),
    "rounded": (
        lambda p, x: conv(x, p["a"].astype(jnp.int32).astype(jnp.float32)),
        {"a": "through convert_element_type"},
    ),
    "reflected, farther than taps reach": (
        lambda p, x: conv(padded(x, "reflect", 2), p["a"], "VALID"),
        {"a": r"copies of its own pixels \(reflect\)"},
    ),
    "edge, and zeros beyond": (lambda p, x: conv(padded(x, "edge"), p["a"]), {"a": r"\(edge\)"}),
    "symmetric": (
        lambda p, x: conv(jnp.pad(x, ((0, 0), (2, 2), (0, 0), (0, 0)), mode="symmetric"), p["a"]),
        {"a": r"\(symmetric\)"},
    ),
    "maximum": (lambda p, x: conv(padded(x, "maximum"), p["a"], "VALID"), {"a": "several arrays"}),
    "the mean beside it": (
        lambda p, x: conv(jnp.concatenate([x.mean(1, keepdims=True), x], 1), p["a"]),
        {"a": "several arrays along a spatial axis"},
    ),
    "beside its mirror image": (
        lambda p, x: conv(jnp.concatenate([x, x[:, :, ::-1]], 1), p["a"], "VALID"),
        {"a": "not axis by axis"},
    ),
    "joined with its transpose": (
        lambda p, x: conv(jnp.concatenate([x[:, :6], x[:, :6].transpose(0, 2, 1, 3)], 1), p["a"]),
        {"a": "not axis by axis"},
    ),
    "copied channels": (
        lambda p, x: conv(jnp.concatenate([x[..., :2]] * 2, -1), p["a"]),
        {"a": "copies of the same elements along the channel axis"},
    ),
    "copied examples": (
        lambda p, x: conv(jnp.concatenate([x, x], 0), p["a"]),
        {"a": r"along the batch axis.*write Conv\(\(8, 6\), .*\) by hand"},
    ),
    "resized by repetition": (
        lambda p, x: conv(jax.image.resize(x, (2, 16, 12, 4), "nearest"), p["a"]),
        {"a": r"up to 2 of each.*write Conv\(\(16, 12\)"},
    ),
    "gathered at places from the input": (
        lambda p, x: conv(x[:, jnp.argsort(x[0, :, 0, 0])], p["a"]),
        {"a": "gather at places not known"},
    ),
    "padded before a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda _, y: jnp.tanh(conv(y, p["a"])), padded(x, "edge")),
        {"a": "before it entered a loop"},
    ),
    "constant channels": (
        lambda p, x: conv(jnp.pad(x[..., :3], ((0, 0), (0, 0), (0, 0), (0, 1))), p["a"]),
        {"a": "constants along the channel axis"},
    ),
    "modulated by the input": (
        lambda p, x: conv(x, p["a"] * x.mean((0, 1, 2))[None, None, :, None]),
        {"a": "through fn's input"},
    ),
    "copies beside another array": (
        lambda p, x: conv(jnp.concatenate([jnp.repeat(x[..., :1], 2, -1), jax.nn.relu(x)[..., :2]], -1), p["a"]),
        {"a": "pieces of several arrays"},
    ),
    "turned in one branch": (
        lambda p, x: conv(x, lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["a"].transpose(1, 0, 2, 3))),
        {"a": "a branch"},
    ),
    "one of two paddings, for each pixel": (
        lambda p, x: conv(jnp.where(padded(x, "edge") > 0, padded(x, "edge"), padded(x, "reflect")), p["a"], "VALID"),
        {"a": "padded or copied before it was chosen"},
    ),
    "its output folded": (
        lambda p, x: conv(x, p["a"], "VALID")[:, :, :, :].reshape(2, 2, 3, 4, 4).sum(1),
        {"a": "wrapped around and summed"},
    ),
    "circular, then cropped": (
        lambda p, x: conv(wrapped(x, (1, 1), (1, 1)), p["a"], ((0, 0), (0, -1))),
        {"a": "not the circular one"},
    ),
    "kernels batched by vmap": (
        lambda p, x: jax.vmap(conv, (None, 0))(x, jnp.stack([p["a"], p["b"]])),
        {"a": "through", "b": "through"},
    ),
    "inside a kernel of another language": (
        lambda p, x: jax.pure_callback(lambda k: k, K, p["a"]) + conv(x, p["b"]).sum(),
        {"a": None},
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_conv_describes_is_named(name):
    fn, reasons = UNKNOWN[name]
    reasons = {key: reason for key, reason in reasons.items() if reason}
    params = {"a": K, "b": K}
    skipped = oj.find_convs(fn, params, X, on_unknown="skip")
    assert {key for key, node in skipped.items() if isinstance(node, oj.Unknown)} == set(reasons)
    for key, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"params\['{key}'\] \(3, 3, 4, 4\): .*{reason}"):
            oj.find_convs(fn, params, X)


def test_four_spatial_axes_are_named():
    kernel, x = jnp.ones((3, 3, 3, 3, 1, 1)), jnp.ones((1, 4, 4, 4, 4, 1))
    numbers = lax.ConvDimensionNumbers((0, 5, 1, 2, 3, 4), (5, 4, 0, 1, 2, 3), (0, 5, 1, 2, 3, 4))
    fn = lambda p, x: lax.conv_general_dilated(x, p, (1,) * 4, "SAME", dimension_numbers=numbers)
    with pytest.raises(ValueError, match="it has 4 spatial axes"):
        oj.find_convs(fn, kernel, x)


def test_an_inserted_axis_is_named():
    kernel = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    with pytest.raises(ValueError, match="an axis is inserted"):
        oj.find_convs(lambda p, x: conv(x, p[None]), kernel, X)


def test_a_vector_in_a_product_is_no_layer():
    params = {"kernel": K, "vector": jax.ShapeDtypeStruct((4,), jnp.float32)}
    found = oj.find_convs(lambda p, x: conv(x, p["kernel"]) @ p["vector"], params, X, dense=True)
    assert found == {"kernel": SAME, "vector": None}


def test_a_kernel_read_by_another_language_is_named():
    from jax.experimental import pallas

    def copy(source, target):
        target[...] = source[...]

    copied = pallas.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(K.shape, K.dtype), interpret=True)
    with pytest.raises(ValueError, match="enters pallas_call, whose inside is not read"):
        oj.find_convs(lambda p, x: conv(x, copied(p)), K, X)


def test_the_same_kernel_in_both_branches_is_that_kernel():
    fn = lambda p, x: conv(x, lax.cond(x.sum() > 0, lambda: p.swapaxes(2, 3), lambda: p.swapaxes(2, 3)))
    assert oj.find_convs(fn, K, X) == oj.Conv((8, 6), padding=ONES, kernel_layout="HWOI")


def test_channels_of_two_arrays():
    fn = lambda p, x: conv(jnp.concatenate([x[..., :2], jnp.tanh(x[..., 2:])], -1), p)
    assert oj.find_convs(fn, K, X) == SAME


def test_images_that_a_scan_takes_one_by_one():
    fn = lambda p, x: lax.scan(lambda carry, image: (carry, conv(image[None], p)), 0.0, x)[1]
    assert oj.find_convs(fn, K, X) == SAME


def test_captured_kernels_are_reported():
    kernel = jnp.ones(K.shape)
    with pytest.raises(ValueError, match=r"no parameter: \(3, 3, 4, 4\), captured by closure"):
        oj.find_convs(lambda p, x: conv(conv(x, p), kernel), K, X)
    assert oj.find_convs(lambda p, x: conv(conv(x, p), kernel), K, X, on_unknown="skip") == SAME
    with pytest.raises(ValueError, match="captures by closure"):
        oj.find_convs(lambda p, x: conv(x, kernel), K, X, on_unknown="skip")


def test_kernels_computed_from_the_input_are_reported():
    dynamic = lambda p, x: conv(conv(x, p), jnp.ones(K.shape) * x.mean())
    with pytest.raises(ValueError, match="computed from fn's input"):
        oj.find_convs(dynamic, K, X)


def test_a_fixed_filter_built_inside_is_no_layer():
    assert oj.find_convs(lambda p, x: conv(conv(x, p), jnp.ones(K.shape) / 9), K, X) == SAME


def test_patches_are_no_layer():
    patches = lambda p, x: conv(lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME"), p)
    image, kernel = jax.ShapeDtypeStruct((1, 4, 8, 6), jnp.float32), jax.ShapeDtypeStruct((3, 3, 6, 4), jnp.float32)
    with pytest.raises(
        ValueError, match=r"rearranged.*write Conv\(\(36, 8\), padding=\(\(1, 1\), \(1, 1\)\)\) by hand"
    ):
        oj.find_convs(patches, kernel, image)
    numbers = ("NHWC", "HWIO", "NHWC")
    cut = lambda x, size, strides: lax.conv_general_dilated_patches(
        x, (size, size), (strides, strides), "VALID", dimension_numbers=numbers
    )
    overlapping = lambda w, x: cut(x, 3, 1) @ w
    with pytest.raises(ValueError, match="copies of the same elements"):
        oj.find_convs(overlapping, jnp.ones((18, 3)), jnp.ones((1, 6, 6, 2)), dense=True)
    tiled = lambda w, x: cut(x, 2, 2) @ w
    assert oj.find_convs(tiled, jnp.ones((8, 3)), jnp.ones((1, 6, 6, 2)), dense=True) == oj.Conv(())


@pytest.mark.parametrize(
    "container", [lambda f, x: lax.map(f, x), lambda f, x: lax.scan(lambda c, r: (c, f(r)), 0, x)[1]]
)
def test_padding_inside_a_loop_is_no_padding_before_it(container):
    fn = lambda p, x: conv(
        container(lambda row: jnp.pad(row, ((1, 1), (1, 1), (0, 0)), mode="wrap"), x), p, padding="VALID"
    )
    with pytest.raises(ValueError, match="padded or copied before scan put it together"):
        oj.find_convs(fn, K, X)
    fn = lambda p, x: conv(container(jnp.tanh, x), p)
    assert oj.find_convs(fn, K, X) == SAME


def test_an_output_that_is_wrapped_for_one_user_only():
    def wrapped(y):
        return jnp.pad(y, ((0, 0), (0, 3), (0, 0))).reshape(1, 2, 5, 1).sum(1)

    layer = lambda p, x: lax.conv_general_dilated(x, p, (1,), ((2, 2),), dimension_numbers=("NWC", "WIO", "NWC"))
    k, x = jnp.ones((3, 1, 1)), jnp.ones((1, 5, 1))
    assert oj.find_convs(lambda p, x: wrapped(layer(p, x)), k, x).padding == "CIRCULAR"
    loops = [
        lambda y: (wrapped(y), lax.scan(lambda c, _: (2 * c, None), y, None, length=2)[0]),
        lambda y: (wrapped(y), lax.scan(lambda c, row: (c, row), 0, y)[1]),
        lambda y: (wrapped(y), lax.fori_loop(0, 2, lambda n, c: c + y, y)),
        lambda y: (wrapped(y), jax.jit(jnp.tanh)(y)),
        lambda y: (wrapped(y), lax.cond(True, jnp.tanh, lambda v: v, y)),
    ]
    for loop in loops:
        with pytest.raises(ValueError, match="both wrapped around and as it is"):
            oj.find_convs(lambda p, x, loop=loop: loop(layer(p, x)), k, x)
    doubled = lambda y: lax.scan(lambda c, _: (2 * c, None), wrapped(y), None, length=2)[0]
    for fine in (jax.jit(wrapped), doubled):
        assert oj.find_convs(lambda p, x, fine=fine: fine(layer(p, x)), k, x).padding == "CIRCULAR"
    for both in (
        lambda y: (wrapped(y), y),
        lambda y: wrapped(y).sum() + jnp.tanh(y),
        lambda y: (jnp.tanh(wrapped(y)), y * 2),
    ):
        with pytest.raises(ValueError, match="both wrapped around and as it is"):
            oj.find_convs(lambda p, x, both=both: both(layer(p, x)), k, x)
    by_scatter = lambda p, x: (y := layer(p, x))[:, :5].at[:, :2].add(y[:, 5:])
    with pytest.raises(ValueError, match="parts of its output are added to one another"):
        oj.find_convs(by_scatter, k, x)


MODIFIED = {
    "scaled": (lambda p, x: (x @ (5 * p["w"])) @ p["v"], {"w"}),
    "masked": (lambda p, x: (x @ (p["w"] * jnp.tril(jnp.ones((4, 4))))) @ p["v"], {"w"}),
    "of low rank beside it": (lambda p, x: x @ (p["w"] + p["v"] @ p["u"]), {"w", "v", "u"}),
    "normalised": (lambda p, x: (x @ (p["w"] / jnp.linalg.norm(p["w"]))) @ p["v"], {"w"}),
    "in eight bits": (lambda p, x: (x @ p["w"].astype(jnp.float8_e4m3fn).astype(x.dtype)) @ p["v"], {"w"}),
}


@pytest.mark.parametrize("name", MODIFIED)
def test_modified_matrices_are_named(name):
    fn, modified = MODIFIED[name]
    params = {key: jnp.eye(4) for key in "uvw"}
    found = oj.find_convs(fn, params, jnp.ones((1, 4)), dense=True, on_unknown="skip")
    assert {key for key, node in found.items() if isinstance(node, oj.Unknown)} == modified
    with pytest.raises(ValueError, match=r"\['w'\] \(4, 4\): reaches the product through .*(masked|low rank)"):
        oj.find_convs(fn, params, jnp.ones((1, 4)), dense=True)


@pytest.mark.parametrize("cast", [jnp.float8_e4m3fn, jnp.float8_e5m2, (8, 0), (4, 10)])
def test_kernels_of_eight_bits_are_refused(cast):
    rounded = lambda k: lax.reduce_precision(k, *cast) if isinstance(cast, tuple) else k.astype(cast).astype(k.dtype)
    with pytest.raises(ValueError, match="reaches the convolution through (convert_element_type|reduce_precision)"):
        oj.find_convs(lambda p, x: conv(x, rounded(p)), K, X)
    for fine in (jnp.bfloat16, jnp.float16):
        assert oj.find_convs(lambda p, x, fine=fine: conv(x, p.astype(fine).astype(p.dtype)), K, X) == SAME


def test_products_with_copies_are_refused_as_convolutions_are():
    product = lambda p, x: jnp.einsum("bhwc,co->bhwo", x, p[0, 0])
    x, kernel = jnp.ones((1, 3, 3, 2)), jnp.ones((1, 1, 2, 2))
    assert oj.find_convs(product, kernel, x) == oj.Conv((3, 3), padding=0)
    for copies in (lambda x: jnp.repeat(x, 2, 1), lambda x: jnp.concatenate([x[..., :1], x[..., :1]], -1)):
        with pytest.raises(ValueError, match="copies of the same elements"):
            oj.find_convs(lambda p, x, copies=copies: product(p, copies(x)), kernel, x)


def test_rows_of_a_table_are_an_array_of_their_own():
    fn = lambda p, tokens: lax.conv_general_dilated(
        p["e"][tokens], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    params, tokens = {"e": jnp.ones((7, 2)), "k": jnp.ones((3, 2, 2))}, jnp.array([[1, 1, 3]])
    assert oj.find_convs(fn, params, tokens) == {"e": None, "k": oj.Conv((3,), padding=((1, 1),))}


def test_kernels_mixed_by_the_input_are_unknown():
    def fn(p, x):
        kernel = jnp.einsum("e,ehwio->hwio", jax.nn.softmax(x.mean((1, 2))[0, :2]), p["experts"])
        return conv(conv(x, kernel), p["plain"])

    found = oj.find_convs(fn, {"experts": jnp.ones((2, *K.shape)), "plain": jnp.ones(K.shape)}, X, on_unknown="skip")
    assert isinstance(found["experts"], oj.Unknown) and found["plain"] == SAME


def test_a_parameter_as_the_image_is_no_kernel():
    fn = lambda p, x: conv(p["image"], p["kernel"]) + x
    found = oj.find_convs(fn, {"image": X, "kernel": K}, X)
    assert found == {"image": None, "kernel": SAME}


def test_shard_map_has_local_shapes():
    mesh = jax.make_mesh((1,), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    run = lambda split: (
        lambda p, x: jax.shard_map(conv, mesh=mesh, in_specs=(spec(None, split), spec()), out_specs=spec(None, split))(
            x, p
        )
    )
    assert oj.find_convs(run("space"), K, X) == SAME  # one device: the shapes are the global ones
    # With more than one they differ; the walk compares them.
    from opnorm_jax._program import find_convs, values

    sites = values.Sites([K], dense=False)
    program = jax.make_jaxpr(lambda k, x: conv(x, k))(K, X)
    inputs = [find_convs._parameter(0, K), values.Value(X.shape, from_input=True)]
    find_convs._walk(program, inputs, sites, True, False)
    assert "shard_map" in sites.decide(0).reason


def test_pointwise_convolutions_written_as_products():
    kernels = {
        "squeezed": jax.ShapeDtypeStruct((1, 1, 4, 7), jnp.float32),
        "einsum": jax.ShapeDtypeStruct((5, 7, 1, 1), jnp.float32),
        "stack": jax.ShapeDtypeStruct((3, 1, 1, 5, 5), jnp.float32),
    }

    def fn(p, x):
        x = x @ p["squeezed"][0, 0]
        x = jnp.einsum("nhwi,oijk->nhwo", x, p["einsum"])
        return lax.scan(lambda y, k: (y @ k.reshape(5, 5), None), x, p["stack"])[0]

    assert oj.find_convs(fn, kernels, X) == {
        "squeezed": oj.Conv((8, 6), padding=0),
        "einsum": oj.Conv((8, 6), padding=0, kernel_layout="OIHW"),
        "stack": oj.Conv((8, 6), padding=0, stacked=1),
    }


def test_dense_layers_when_asked():
    params = {
        "kernel": K,
        "dense": jax.ShapeDtypeStruct((4, 10), jnp.float32),
        "transposed": jax.ShapeDtypeStruct((5, 10), jnp.float32),
        "stack": jax.ShapeDtypeStruct((3, 5, 5), jnp.float32),
        "heads": jax.ShapeDtypeStruct((5, 2, 3), jnp.float32),
    }

    def fn(p, x, heads=True):
        x = conv(x, p["kernel"]).mean((1, 2)) @ p["dense"]
        x = x @ p["transposed"].T
        x = lax.scan(lambda y, k: (y @ k, None), x, p["stack"])[0]
        return jnp.einsum("ni,ihd->nhd", x, p["heads"]) if heads else x

    assert oj.find_convs(fn, params, X) == {**dict.fromkeys(params), "kernel": SAME}
    expected = {"kernel": SAME, "dense": oj.Conv(()), "transposed": oj.Conv((), kernel_layout="OI")}
    expected |= {"stack": oj.Conv((), stacked=1), "heads": None}
    assert oj.find_convs(fn, params, X, dense=True, heads=False) == expected
    with pytest.raises(ValueError, match=r"params\['heads'\] \(5, 2, 3\): .*no matrix"):
        oj.find_convs(fn, params, X, dense=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_dimension_and_grouping(rank, groups):
    model = nn.Conv(8, (3,) * rank, 2, padding="CIRCULAR", feature_group_count=groups)
    x = jax.ShapeDtypeStruct((1, *(8, 6, 4)[:rank], 4), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = oj.find_convs(model.apply, variables, x)["params"]
    assert found == {
        "bias": None,
        "kernel": oj.Conv((8, 6, 4)[:rank], strides=2, padding="CIRCULAR", feature_group_count=groups),
    }


def test_flipped_kernels():
    """A flipped kernel is the mirrored layer: same norm as the Conv found, and the leftover padding is not used."""
    for strides, padding in (((1, 1), "SAME"), ((2, 3), ((2, 1), (0, 2))), ((3, 2), ((0, 2), (1, 0)))):
        fn = lambda k, x: conv(x, k[::-1, ::-1], padding, strides)  # noqa: B023
        found = oj.find_convs(fn, K, X)
        assert np.isclose(*_norms(fn, found, K.shape), rtol=1e-4), (strides, padding)


def test_other_arguments():
    """Flags stay Python values; keys, keyword arguments and nested inputs are traced; the batch does not matter."""

    def fn(params, batch, train, *, rng, scale=None):
        x = batch["image"] * (2 if train else 1)
        return conv(x + jax.random.normal(rng, x.shape), params["layer"]["w"]) if scale is None else None

    params = {"layer": {"w": K}, "name": "not an array", "n": 3}
    expected = {"layer": {"w": SAME}, "name": None, "n": None}
    for batch in (1, 8):
        image = jax.ShapeDtypeStruct((batch, 8, 6, 4), jnp.float32)
        assert oj.find_convs(fn, params, {"image": image}, True, rng=jax.random.key(0)) == expected


def test_wrong_calls():
    with pytest.raises(ValueError, match="on_unknown to be 'error' or 'skip', got 'warn'"):
        oj.find_convs(chain, TWO, X, on_unknown="warn")
    with pytest.raises(TypeError, match="expected fn to be a function"):
        oj.find_convs(TWO, chain, X)
    with pytest.raises(ValueError, match="dense=True"):
        oj.find_convs(lambda p, x: x @ p, jax.ShapeDtypeStruct((4, 4), jnp.float32), X)


def test_nothing_is_computed():
    def fn(k, x):
        jax.debug.callback(lambda: pytest.fail("computed"))
        return conv(x, k)

    assert oj.find_convs(fn, jnp.ones(K.shape), jnp.ones(X.shape)) == SAME


@pytest.mark.slow
def test_stacks_and_unknowns_go_through_the_transformation():
    params = {"stack": jax.random.normal(jax.random.key(0), (5, 3, 3, 4, 4)), "masked": jnp.full((3, 3, 4, 4), 9.0)}
    fn = lambda p, x: conv(scanned(p, x), p["masked"] * MASK)
    convs = oj.find_convs(fn, params, X, on_unknown="skip")
    for method in ("rescale", "project", "clip"):
        out = oj.constrain(params, 1.0, convs, constraint=method)
        assert (out["masked"] == params["masked"]).all()
        for n in range(5):
            alone = oj.constrain(params["stack"][n], 1.0, SAME, constraint=method)
            np.testing.assert_allclose(out["stack"][n], alone, atol=1e-5)
            matrix = dense_matrix(out["stack"][n], (8, 6), padding=ONES)
            assert np.linalg.norm(matrix, 2) <= (1 + 1e-5 if method != "clip" else 1.6)
    tx = oj.constrain_operator_norm(1.0, convs, every=2, constraint="project", log_norms=True)
    state = tx.init(params)
    assert state.norms["stack"].shape == (5,)
    structure = jax.tree.structure(state)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    assert jax.tree.structure(state) == structure and state.norms["stack"].shape == (5,)
    moved = params["stack"] + updates["stack"]
    assert max(np.linalg.norm(dense_matrix(k, (8, 6), padding=ONES), 2) for k in moved) <= 1 + 1e-5


class ResNet18(nn.Module):
    """ImageNet's, in Linen: 20 convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, use_bias=False)(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (3, 3), (2, 2), "SAME")
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and not block else 1
                y = nn.Conv(64 * 2**stage, (3, 3), stride, use_bias=False)(x)
                y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
                y = nn.BatchNorm(use_running_average=True)(nn.Conv(64 * 2**stage, (3, 3), use_bias=False)(y))
                if stride == 2:
                    x = nn.Conv(64 * 2**stage, (1, 1), 2, use_bias=False)(x)
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


def test_resnet18_against_flax_itself():
    """The paths are those of the nn.Conv modules that nn.intercept_methods sees, with the inputs it sees."""
    model, x = ResNet18(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    seen = {}

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
            seen[context.module.path] = (args[0].shape[1:3], context.module.strides)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(model.apply, variables, x)
    found = oj.find_convs(model.apply, variables, x)
    paths = jax.tree_util.tree_flatten_with_path(found["params"])[0]
    described = {tuple(key.key for key in path[:-1]): conv for path, conv in paths}
    assert len(seen) == 20
    assert {path: (conv.input_shape, conv.strides) for path, conv in described.items()} == {
        path: (shape, (strides,) * 2 if isinstance(strides, int) else tuple(strides or (1, 1)))
        for path, (shape, strides) in seen.items()
    }
    assert all(conv is None for conv in jax.tree.leaves(found["batch_stats"]))


NARROW = functools.partial(lax.conv_general_dilated, window_strides=(1,), dimension_numbers=("NWC", "WIO", "NWC"))
RING = lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="wrap")
DRAWN = lambda *shape: jax.random.normal(jax.random.key(0), shape)
MATRICES = {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 5))}
MADE = {  # programs that make their image, and the kernels that they must be found to have
    "a product of constants": (lambda p: jnp.tanh(jnp.ones((3, 2)) @ DRAWN(2, 4) @ p["w"]) @ p["v"], MATRICES),
    "behind a fixed filter": (
        lambda p: NARROW(DRAWN(1, 8, 4), jnp.ones((3, 4, 4)), padding="VALID") @ p["w"] @ p["v"],
        MATRICES,
    ),
    "a scan over noise": (
        lambda p: lax.scan(lambda c, z: (jnp.tanh(z @ p["w"] + c @ p["v"]), None), jnp.zeros((2, 5)), DRAWN(3, 2, 4))[
            0
        ],
        MATRICES,
    ),
    "a loop over noise": (
        lambda p: lax.fori_loop(0, 3, lambda _, z: jnp.tanh(z), DRAWN(2, 4)) @ p["w"] @ p["v"],
        MATRICES,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_matrices_behind_images_that_fn_makes(name):
    fn, params = MADE[name]
    assert oj.find_convs(fn, params, dense=True) == dict.fromkeys(params, oj.Conv(()))


def test_images_that_fn_makes():
    k, x = {"k": jnp.ones((3, 1, 1)), "x": jnp.ones((1, 5, 1))}, jnp.ones((1, 5, 1))
    valid = lambda p, image: NARROW(image, p["k"], padding="VALID")
    shifted = lambda p: valid(p, RING(DRAWN(1, 5, 1)) + jnp.full((1, 7, 1), 2.0))
    assert oj.find_convs(shifted, k)["k"].padding == "CIRCULAR"
    edge = lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="edge")
    for image in (
        lambda p: lax.map(lambda row: RING(row[None])[0], p["x"]),
        lambda p: lax.cond(p["k"].sum() > 0, RING, edge, p["x"]),
        lambda p: lax.fori_loop(0, 2, lambda _, y: y[:, ::-1], RING(p["x"])),
    ):
        with pytest.raises(ValueError, match="padded or copied before"):
            oj.find_convs(lambda p, image=image: valid(p, image(p)), k)
    chosen = lambda p: NARROW(jax.nn.leaky_relu(x + p["x"]), p["k"], padding="SAME")
    assert oj.find_convs(chosen, k) == {"k": oj.Conv((5,), padding=((1, 1),)), "x": None}


def test_learned_images_that_a_scan_takes_apart():
    params = {"k": jnp.ones((3, 1, 1)), "x": jnp.ones((1, 3, 5, 1))}
    for images in (lambda p: jnp.moveaxis(p["x"], 1, 0), lambda p: jnp.moveaxis(p["x"], 1, 0)[:, :, ::-1]):
        each = lambda p, x: NARROW(x, p["k"], padding="SAME")
        found = oj.find_convs(lambda p: lax.scan(lambda c, x: (c, each(p, x)), 0, images(p))[1], params)  # noqa: B023
        assert found == {"k": oj.Conv((5,), padding=((1, 1),)), "x": None}


def test_what_is_no_layer_stays_none():
    """An embedding of positions, a probe of attention, a fixed random filter, rows of a table."""
    embedded = lambda p, x: NARROW(x + (jnp.ones((9, 6)) @ p["e"][0])[None], p["k"], padding="SAME")
    params, same = {"e": jnp.ones((1, 6, 2)), "k": jnp.ones((3, 2, 2))}, oj.Conv((9,), padding=((1, 1),))
    assert oj.find_convs(embedded, params, jnp.ones((1, 9, 2))) == {"e": None, "k": same}

    def pooled(p, x):
        features = NARROW(x, p["k"], padding="SAME")
        return jax.nn.softmax(jnp.tile(p["e"], (2, 1, 1)) / 2 @ features.swapaxes(1, 2)) @ features

    assert oj.find_convs(pooled, params, jnp.ones((2, 9, 2))) == {"e": None, "k": same}
    fixed = lambda p, x: NARROW(NARROW(x, DRAWN(3, 2, 2), padding="SAME"), p["k"], padding="SAME")
    assert oj.find_convs(fixed, params, jnp.ones((1, 9, 2))) == {"e": None, "k": same}
    for tokens in (lambda: jnp.array([[1, 1, 3]]), lambda: jax.random.randint(jax.random.key(0), (1, 3), 0, 6)):
        rows = lambda p, tokens=tokens: NARROW(p["e"][0][tokens()], p["k"], padding="SAME")
        assert oj.find_convs(rows, params) == {"e": None, "k": oj.Conv((3,), padding=((1, 1),))}


def test_matrices_of_copied_rows():
    """Copies of whole rows are no business of the matrix; copies within a row are."""
    w, x = jnp.ones((4, 3)), jnp.ones((2, 4))
    assert oj.find_convs(lambda w, x: jnp.repeat(x, 3, 0) @ w, w, x, dense=True) == oj.Conv(())
    with pytest.raises(ValueError, match="copies of the same elements"):
        oj.find_convs(lambda w, x: jnp.concatenate([x[:, :2], x[:, :2]], -1) @ w, w, x, dense=True)
    queries = lambda p, x: jax.nn.softmax((p["q"] @ p["w"] + 1.0) @ (x @ p["k"]).T) @ x
    found = oj.find_convs(queries, {key: jnp.ones((4, 4)) for key in "qwk"}, x, dense=True)
    assert found == {"q": None, "w": oj.Conv(()), "k": oj.Conv(())}


def test_circular_transposed_layers_in_branches_and_loops():
    layer = nn.ConvTranspose(1, (3,), padding="CIRCULAR", use_bias=False)
    params, x = {"params": {"kernel": jnp.ones((3, 1, 1))}}, jnp.ones((1, 4, 1))
    for fn in (
        lambda p, x: lax.cond(x.sum() > 0, lambda x: layer.apply(p, x), lambda x: x, x),
        lambda p, x: lax.map(lambda row: layer.apply(p, row[None])[0], x),
        lambda p, x: lax.reduce(layer.apply(p, x), 0.0, lambda a, b: a + b, (0, 1, 2)),
        lambda p, x: jnp.zeros((1, 4, 1)).at[jnp.array([0])].add(layer.apply(p, x)),
    ):
        assert oj.find_convs(fn, params, x)["params"]["kernel"].padding == "CIRCULAR"
