"""Programs that users have reported or would write, with the values that are right for them."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from oracle import dense_singular_values

import opnorm_jax as oj

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def frameworks_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def conv(x, k, padding="SAME", **options):
    return lax.conv_general_dilated(x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def jacobian_norm(fn, shape):
    """Of a function that is linear apart from constants, in float64."""
    with jax.enable_x64(True):
        flat = lambda x: jnp.ravel(fn(x.reshape(shape)))
        return np.linalg.norm(np.asarray(jax.jacfwd(flat)(jnp.zeros(int(np.prod(shape))))), 2)


# find_convs: padding.


@pytest.mark.parametrize("mode", ["REPLICATE", "REFLECT"])
def test_equinox_padding_that_repeats_pixels(mode):
    """Only the first row counts, so that edge pixels are read three times: the truth is 1.766 times the row's norm."""
    layer = eqx.nn.Conv2d(2, 2, 5, padding="SAME", padding_mode=mode, use_bias=False, key=jax.random.key(0))
    layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.zeros((2, 2, 5, 5)).at[:, :, 0].set(1.0))
    x = jnp.ones((2, 4, 4))
    convs = oj.find_convs(lambda layer, x: layer(x), layer, x)
    assert convs.weight.padding == ("EDGE" if mode == "REPLICATE" else "REFLECT")
    held = oj.constrain(layer, 1.0, convs)
    true = np.linalg.norm(np.asarray(jax.jacobian(held)(x), np.float64).reshape(32, 32), 2)
    lower, upper = oj.operator_norm_bounds(held.weight, convs.weight)
    assert 0.2 < true <= 1 + 1e-6 and lower <= true * (1 + 1e-6) and true <= upper * (1 + 1e-6)


@pytest.mark.parametrize("mode", ["REPLICATE", "REFLECT"])
def test_equinox_padding_that_is_wider_than_the_taps_reach_is_refused(mode):
    layer = eqx.nn.Conv2d(2, 2, 3, padding=2, padding_mode=mode, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"weight \(2, 2, 3, 3\).*(edge|reflect).*write Conv\(\(8, 8\)"):
        oj.find_convs(lambda layer, x: layer(x), layer, jnp.ones((2, 4, 4)))


def test_circular_padding_written_as_tile():
    kernel = jnp.cos(2 * jnp.pi * jnp.arange(5) / 3).reshape(5, 1, 1)
    numbers = ("NWC", "WIO", "NWC")
    fn = lambda k, x: lax.conv_general_dilated(
        jnp.tile(x, (1, 3, 1))[:, 4:14], k, (1,), "VALID", dimension_numbers=numbers
    )
    found = oj.find_convs(fn, kernel, jnp.ones((1, 6, 1)))
    assert found == oj.Conv((6,), padding="CIRCULAR")
    assert np.isclose(oj.operator_norm(kernel, found), 2.784, atol=1e-3)
    assert np.isclose(oj.lipschitz_bound(fn, kernel, jnp.ones((1, 6, 1))), 2.784, atol=1e-3)


TRANSPOSED = {
    "flax, 1-D": (nn.ConvTranspose(1, (4,), (3,), padding="CIRCULAR", use_bias=False), (1, 6, 1)),
    "flax, 2-D, even": (nn.ConvTranspose(3, (4, 4), (2, 2), padding="CIRCULAR"), (1, 4, 6, 2)),
    "flax, 2-D, odd, transposed kernel": (
        nn.ConvTranspose(3, (5, 3), (2, 3), padding="CIRCULAR", transpose_kernel=True),
        (1, 5, 4, 2),
    ),
    "flax, larger than the circle": (nn.ConvTranspose(2, (9,), (2,), padding="CIRCULAR"), (1, 3, 2)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_flax_circular_transposed_layers_are_exact(name):
    layer, shape = TRANSPOSED[name]
    params = layer.init(jax.random.key(0), jnp.ones(shape))
    convs = oj.find_convs(layer.apply, params, jnp.ones(shape))
    found = convs["params"]["kernel"]
    assert found.padding == "CIRCULAR" and found.input_dilation == layer.strides
    kernel = np.asarray(params["params"]["kernel"], np.float64)
    truth = jacobian_norm(
        lambda x: (
            layer.clone(dtype=jnp.float64).apply({"params": {"kernel": kernel, "bias": jnp.zeros(layer.features)}}, x)
            - layer.clone(dtype=jnp.float64).apply(
                {"params": {"kernel": kernel, "bias": jnp.zeros(layer.features)}}, 0 * x
            )
        ),
        shape,
    )
    assert np.isclose(oj.operator_norm(params["params"]["kernel"], found), truth, rtol=1e-5)


@pytest.mark.parametrize("stride, size, padding", [(2, 4, "SAME"), (3, 5, "SAME"), (2, 3, "SAME_LOWER")])
def test_equinox_circular_transposed_layers_are_exact(stride, size, padding):
    layer = eqx.nn.ConvTranspose2d(
        2, 3, size, stride, padding=padding, padding_mode="CIRCULAR", use_bias=False, key=jax.random.key(0)
    )
    found = oj.find_convs(lambda layer, x: layer(x), layer, jnp.ones((2, 4, 5))).weight
    assert found.padding == "CIRCULAR" and found.input_dilation == (stride, stride)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64) if eqx.is_array(a) else a, layer)
    truth = jacobian_norm(lambda x: wide(x), (2, 4, 5))
    assert np.isclose(oj.operator_norm(layer.weight, found), truth, rtol=1e-5)


# find_convs: parameters.


def test_learned_queries_are_no_layer():
    params = {"latents": jnp.ones((1, 4, 8)), "proj": jnp.ones((8, 16)), "kernel": jnp.ones((3, 3, 2, 2))}
    fn = lambda p, x: (jnp.squeeze(p["latents"], 0) @ p["proj"]).sum() + conv(x, p["kernel"])
    found = oj.find_convs(fn, params, jnp.ones((1, 8, 8, 2)))
    assert found["latents"] is None and found["proj"] is None and found["kernel"] is not None
    dense = oj.find_convs(fn, params, jnp.ones((1, 8, 8, 2)), dense=True)
    assert dense["latents"] is None and dense["proj"] == oj.Conv(())


def test_depthwise_kernels_as_keras_stores_them():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 6, 1))
    fn = lambda k, x: conv(x, k.transpose(0, 1, 3, 2).reshape(3, 3, 1, 6), feature_group_count=6)
    found = oj.find_convs(fn, kernel, jnp.ones((1, 8, 8, 6)))
    assert found == oj.Conv((8, 8), padding=((1, 1), (1, 1)), feature_group_count=6, kernel_layout="HWOI")
    reshaped = lambda k, x: conv(x, k.reshape(3, 3, 1, 6), feature_group_count=6)
    assert oj.find_convs(reshaped, kernel, jnp.ones((1, 8, 8, 6))) == found
    truth = dense_singular_values(
        np.asarray(kernel).transpose(0, 1, 3, 2), (8, 8), padding="SAME", feature_group_count=6
    )
    lower, upper = oj.operator_norm_bounds(kernel, found)
    assert lower <= truth[0] * (1 + 1e-5) and truth[0] <= upper


def test_a_depthwise_multiplier_is_refused():
    kernel = jax.ShapeDtypeStruct((3, 3, 6, 2), jnp.float32)
    fn = lambda k, x: conv(x, k.reshape(3, 3, 1, 12), feature_group_count=6)
    with pytest.raises(ValueError, match=r"params \(3, 3, 6, 2\): an axis is inserted"):
        oj.find_convs(fn, kernel, jnp.ones((1, 8, 8, 6)))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="CIRCULAR")(x))
        return nn.Conv(2, (3, 3), (2, 2), feature_group_count=2)(x)


@pytest.mark.slow
def test_ensembles_under_vmap():
    x, model = jnp.ones((1, 8, 8, 3)), Small()
    one = oj.find_convs(model.apply, model.init(jax.random.key(0), x), x)
    stacked = jax.vmap(lambda key: model.init(key, x))(jax.random.split(jax.random.key(0), 5))
    apart = oj.find_convs(lambda p, x: jax.vmap(model.apply, (0, None))(p, x), stacked, x)
    every = oj.find_convs(lambda p, x: jax.vmap(model.apply)(p, x), stacked, jnp.ones((5, 1, 8, 8, 3)))
    assert apart == every
    for layer, conv in one["params"].items():
        found = apart["params"][layer]["kernel"]
        assert found.stacked == 1 and dataclasses.replace(found, stacked=0) == conv["kernel"]
    member = one["params"]["Conv_1"]["kernel"]
    kernels = oj.constrain(stacked, 0.5, apart)["params"]["Conv_1"]["kernel"]
    assert all(oj.operator_norm_bounds(kernel, member).upper <= 0.5 * (1 + 1e-5) for kernel in kernels)


def test_equinox_ensembles_under_filter_vmap():
    make = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(2, 3, 3, padding=1, key=key))
    ensemble = make(jax.random.split(jax.random.key(0), 4))
    run = lambda model, x: eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(model, x)
    found = oj.find_convs(run, ensemble, jnp.ones((2, 6, 6))).weight
    assert found == oj.Conv((6, 6), padding=1, kernel_layout="OIHW", stacked=1)


def test_modulated_kernels_are_unknown():
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "style": jnp.ones((2, 2))}
    fn = lambda p, x: conv(x, p["kernel"] * (x.mean((0, 1, 2)) @ p["style"])[:, None])
    found = oj.find_convs(fn, params, jnp.ones((1, 8, 8, 2)), on_unknown="skip")
    assert isinstance(found["kernel"], oj.Unknown) and "fn's input" in found["kernel"].reason
    assert found["style"] is None


@pytest.mark.parametrize("dtype, match", [(jnp.complex64, r"Re.*Im"), (jnp.int8, "real floating dtype")])
def test_kernels_of_other_dtypes_are_refused(dtype, match):
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 4), dtype)
    fn = lambda k, x: conv(x.astype(k.dtype), k) if dtype == jnp.complex64 else conv(x, k.astype(x.dtype))
    with pytest.raises(ValueError, match=rf"params \(3, 3, 2, 4\).*{match}"):
        oj.find_convs(fn, kernel, jnp.ones((1, 8, 8, 2)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.conv(x)))


def test_nnx_state_that_fn_changes_is_explained():
    graph, params, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    x = jnp.ones((1, 6, 6, 2))
    for function in (oj.find_convs, oj.lipschitz_bound):
        with pytest.raises(ValueError, match=r"nnx\.merge\(graph, params, rest, copy=True\)"):
            function(lambda p, x: nnx.merge(graph, p, rest)(x), params, x)
    found = oj.find_convs(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x)
    assert found["conv"]["kernel"].get_value() == oj.Conv((6, 6), padding=((1, 1), (1, 1)))


# lipschitz_bound.


ACTIVATIONS = {
    "gelu": (jax.nn.gelu, 1.128993),
    "gelu, exact": (lambda x: jax.nn.gelu(x, approximate=False), 1.128904),
    "mish": (jax.nn.mish, 1.088498),
    "hard_swish": (jax.nn.hard_swish, 1.5),
    "soft_sign": (jax.nn.soft_sign, 1),
    "silu": (jax.nn.silu, 1.099839),
    "leaky_relu": (lambda x: jax.nn.leaky_relu(x, 2.0), 2),
    "a slope per channel": (lambda x: jax.nn.leaky_relu(x, jnp.asarray([0.1, 3.0])), 3),
    "elu": (lambda x: jax.nn.elu(x, 1.5), 1.5),
    "softplus": (jax.nn.softplus, 1),
    "hard_tanh": (jax.nn.hard_tanh, 1),
    "celu": (lambda x: jax.nn.celu(x, 2.0), 1),
    "by hand": (lambda x: jnp.where(x >= 0, x, 0.1 * x), 1),
    "PReLU": (lambda x: nn.PReLU().apply({"params": {"negative_slope": jnp.float32(1.25)}}, x), 1.25),
    "softmax": (lambda x: jax.nn.softmax(x, -1), 0.5),
    "MaxMin": (
        lambda x: jnp.concatenate([jnp.maximum(x[..., :1], x[..., 1:]), jnp.minimum(x[..., :1], x[..., 1:])]),
        1,
    ),
    "MaxMin by split": (
        lambda x: (lambda a, b: jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], -1))(*jnp.split(x, 2, -1)),
        1,
    ),
    "GroupSort": (lambda x: jnp.sort(x.reshape(2, 3, 1, 2), -1), 1),
}
WAYS = {
    "plain": lambda f: f,
    "vmap": lambda f: jax.vmap(f),
    "scan": lambda f: lambda x: lax.scan(lambda _, row: (None, f(row)), None, x)[1],
    "reversed scan": lambda f: lambda x: lax.scan(lambda _, row: (None, f(row)), None, x, reverse=True)[1],
    "bfloat16": lambda f: lambda x: f(x.astype(jnp.bfloat16)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, way):
    activation, slope = ACTIVATIONS[name]
    if name == "GroupSort" and way != "plain":
        activation = lambda x: jnp.sort(x.reshape(-1, 2), -1)
    found = float(oj.lipschitz_bound(lambda _, x: WAYS[way](activation)(x), None, jnp.ones((2, 3, 2))))
    assert slope * (1 - 1e-6) <= found <= slope * (1 + (2e-3 if way == "bfloat16" else 1e-5))


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.leaky_relu, jax.nn.elu, jax.nn.softplus, jax.nn.hard_tanh])
def test_scanned_blocks(activation):
    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = lambda module, x, _: (activation(nn.Dense(3, use_bias=False, name="dense")(x)), None)
            return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)(self, x, None)[0]

    params = Blocks().init(jax.random.key(0), jnp.ones(3))
    kernels = np.asarray(params["params"]["dense"]["kernel"], np.float64)
    slope = float(oj.lipschitz_bound(lambda _, x: activation(x), None, jnp.ones(3)))
    truth = np.prod([slope * np.linalg.norm(kernel, 2) for kernel in kernels])
    assert np.isclose(oj.lipschitz_bound(Blocks().apply, params, jnp.ones(3), method="product"), truth, rtol=1e-4)


def test_a_scan_of_no_steps():
    fn = lambda _, x: lax.scan(lambda y, row: (2 * y, y), x, jnp.zeros((0, 3)))
    assert float(oj.lipschitz_bound(fn, None, jnp.ones(3))) == 1


def test_modules_of_nnx_as_params():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    net = Net(nnx.Rngs(0))
    graph, params = nnx.split(net)
    truth = np.linalg.norm(net.first.kernel[...], 2) * np.linalg.norm(net.second.kernel[...], 2)
    found = oj.lipschitz_bound(
        lambda p, x: nnx.merge(graph, p, copy=True)(x), params, jnp.ones((1, 3)), method="product"
    )
    assert truth <= found <= truth * (1 + 1e-4)


def test_modules_of_equinox_as_params():
    net = eqx.nn.MLP(3, 2, 4, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    truth = 1.129 * np.prod([np.linalg.norm(layer.weight, 2) for layer in net.layers])
    found = oj.lipschitz_bound(lambda net, x: jax.vmap(net)(x), net, jnp.ones((5, 3)), method="product")
    assert truth * (1 - 1e-4) <= found <= truth * (1 + 1e-4)


VALUES = {
    "copies along channels": (lambda x: conv(jnp.concatenate([x, x, x], -1), jnp.ones((3, 3, 3, 1))), (1, 6, 6, 1), 23.55),
    "copies along the batch": (lambda x: conv(jnp.concatenate([x, x]), jnp.ones((3, 3, 1, 1))), (1, 6, 6, 1), 11.10),
    "a sum by its own reducer": (lambda x: lax.reduce(x, 0.0, lambda a, b: a + b, (0,)), (9,), 3),
    "bfloat16 sums": (
        lambda x: lax.fori_loop(0, 100, lambda _, y: y + jnp.bfloat16(0.0039) * y, x.astype(jnp.bfloat16)),
        (3,),
        1.4767,
    ),
    "float16 underflow": (lambda x: x.astype(jnp.float16) * 1e-4 * 1e-4 * 1e4 * 1e4, (3,), 1),
    "float32 underflow": (lambda x: x * 1e-25 * 1e-25 * 1e25 * 1e25, (3,), 1),
    "stack": (lambda x: jnp.stack([x, x, x], 1), (3, 2), 3**0.5),
    "tile": (lambda x: jnp.tile(x, (2, 3)), (3, 2), 6**0.5),
    "indexing": (lambda x: x[jnp.asarray([0, 2, 2, 2])], (3, 2), 3**0.5),
    "take": (lambda x: jnp.take(x, jnp.asarray([1, 1]), axis=1), (3, 2), 2**0.5),
    "nearest resize": (lambda x: jax.image.resize(x, (6, 4), "nearest"), (3, 2), 2),
    "an integer matrix": (lambda x: x @ jnp.asarray([[3, 0], [0, 1]]), (3, 2), 3),
    "a Cayley layer": (
        lambda x: x @ jnp.linalg.solve(jnp.eye(2) + jnp.asarray([[0.0, 1], [-1, 0]]), jnp.eye(2) - jnp.asarray([[0.0, 1], [-1, 0]])),
        (3, 2),
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    fn, shape, truth = VALUES[name]
    found = float(oj.lipschitz_bound(lambda _, x: fn(x), None, jax.ShapeDtypeStruct(shape, jnp.float32)))
    assert truth * (1 - 1e-3) <= found <= truth * 1.15


def test_maxima_and_minima_beside_other_constants_are_no_pair():
    """At 3 both are the element itself: it counts twice."""
    padded = lambda x, fill: jnp.pad(x, (0, 1), constant_values=fill)
    fn = lambda x: jnp.concatenate([jnp.maximum(padded(x[:1], 1.0), x), jnp.minimum(padded(x[:1], 5.0), x)])
    assert float(oj.lipschitz_bound(lambda _, x: fn(x), None, jnp.ones(2))) >= 2**0.5 * (1 - 1e-6)


REFUSED = {
    "custom_linear_solve": lambda x: lax.custom_linear_solve(lambda v: v / 3, x, lambda _, b: 3 * b),
    "celu .*parameter out of its domain": lambda x: jax.nn.celu(x, -1.0),
    "combines elements by a function": lambda x: lax.reduce(x, 1.0, lambda a, b: a * b, (0,)),
    "shard_map": lambda x: jax.shard_map(
        lambda v: v,
        mesh=jax.make_mesh((1,), ("d",)),
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec("d"),
        check_vma=False,
    )(x),
}


@pytest.mark.parametrize("match", REFUSED)
def test_refused_by_name(match):
    with pytest.raises(ValueError, match=match):
        oj.lipschitz_bound(lambda _, x: REFUSED[match](x), None, jnp.ones(4))


def test_pools_of_equinox_by_addition():
    pool = eqx.nn.Pool(init=0.0, operation=jnp.add, num_spatial_dims=2, kernel_size=3, stride=1)
    axis = np.array([[abs(i - j) < 2 for i in range(5)] for j in range(1, 4)], np.float64)
    truth = np.linalg.norm(np.kron(axis, axis), 2)
    assert truth >= 6 and np.isclose(
        oj.lipschitz_bound(lambda _, x: pool(x), None, jnp.ones((1, 5, 5))), truth, rtol=1e-5
    )


LOOPS = {
    "fori_loop": lambda w: lax.fori_loop(0, 3, lambda _, v: v @ w, w),
    "while_loop": lambda w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, w))[1],
    "scatter": lambda w: jnp.zeros_like(w).at[jnp.arange(5)].add(w @ w @ w @ w),
    "cond": lambda w: lax.cond(w[0, 0] < 1e3, lambda w: w @ w @ w @ w, lambda w: w, w),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_over_narrow_parameters_lose_nothing(name):
    w = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (5, 5)), jnp.float16)
    found = oj.lipschitz_bound(lambda w, x: x @ LOOPS[name](w).astype(x.dtype), w, jnp.ones(5))
    truth = np.linalg.norm(np.linalg.matrix_power(np.asarray(w, np.float64), 4), 2)
    assert truth <= found <= truth * (1 + 1e-5)


def test_batch_norm_in_bfloat16_loses_nothing():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(20):
                x = nn.Conv(1, (1, 1), dtype=jnp.bfloat16, use_bias=False, kernel_init=nn.initializers.ones)(x)
                scale = nn.initializers.constant(1.0035)
                x = nn.BatchNorm(True, dtype=jnp.bfloat16, scale_init=scale, epsilon=0)(x)
            return x

    x = jnp.ones((1, 4, 4, 1))
    variables = Deep().init(jax.random.key(0), x)
    found = oj.lipschitz_bound(lambda p, x: Deep().apply(variables | {"params": p}, x), variables["params"], x)
    expected = float(np.float32(1.0035)) ** 20
    assert expected <= found <= expected * (1 + 1e-3)


def test_an_empty_piece_hides_no_copies():
    """Splitting off nothing left the rest counting as an image of its own, however it had been padded before."""

    def net(params, x):
        x = jnp.pad(x, ((0, 0), (0, 0), (3, 0), (0, 0)), mode="reflect")
        x = jnp.concatenate(jnp.split(x, [0, 3], 1)[::-1], 1)
        return jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    params, x = {"k": jnp.ones((3, 3, 1, 1))}, jnp.ones((1, 3, 4, 1))
    found = oj.find_convs(net, params, x, on_unknown="skip")["k"]
    assert isinstance(found, oj.Unknown) and "reflect" in found.reason
    matrix = jax.jacobian(lambda x: net(params, x).ravel())(x).reshape(-1, x.size)
    assert np.linalg.norm(np.asarray(matrix, np.float64), 2) <= oj.lipschitz_bound(net, params, x)


def test_a_scatter_under_jit():
    """How many updates meet at an element is counted while the parameters are traced."""
    indices = jnp.array([[0], [0], [2]])
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
    fn = lambda p, x: p * lax.scatter_add(jnp.zeros(4), indices, x, numbers)
    found = jax.jit(lambda p: oj.lipschitz_bound(fn, p, jnp.zeros(3)))(jnp.float32(1))
    assert np.isclose(found, np.sqrt(2), rtol=1e-5)


def test_numbers_that_meet_are_added():
    """A scatter that adds two of its updates moves neither to a place of its own. The third update is dropped."""
    at = jnp.array([0, 0, 9, 3])
    fn = lambda p, x: p * jnp.zeros(5).at[at].add(x)
    truth = np.linalg.norm(jax.jacobian(functools.partial(fn, 1.0))(jnp.ones(4)), 2)
    assert truth == pytest.approx(2**0.5)
    assert oj.lipschitz_bound(fn, 1.0, jnp.ones(4)) >= truth * (1 - 1e-6)


@pytest.mark.timeout(120)
def test_sorted_pairs_inside_a_scan():
    """Rows of a sorted pair led back to the pair itself, and the search for what all paths go through did not end."""

    def net(_, x):
        u, v = x[:, ::2], x[:, 1::2]
        x = jnp.stack([jnp.minimum(u, v), jnp.maximum(u, v)])
        return jnp.abs(lax.scan(lambda c, row: (row, c - row), x[0], x)[1])

    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    jacobian = np.asarray(jax.jacobian(lambda x: net(None, x))(x)).reshape(-1, x.size)
    assert np.linalg.norm(jacobian, 2) <= oj.lipschitz_bound(net, None, x) < 5
