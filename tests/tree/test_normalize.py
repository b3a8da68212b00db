"""normalize and the layer wrappers: the layers' own Jacobians, gradients against differences, every transformation."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from flax import nnx

import opnorm_jax as oj

# name: (options of Flax's Conv, features)
CONVS = {
    "SAME": ({"padding": "SAME"}, 4),
    "VALID": ({"padding": "VALID"}, 4),
    "CIRCULAR": ({"padding": "CIRCULAR"}, 4),
    "strided": ({"padding": "SAME", "strides": 2}, 4),
    "dilated": ({"padding": "SAME", "kernel_dilation": 2}, 4),
    "grouped": ({"padding": "SAME", "feature_group_count": 2}, 4),
    "depthwise": ({"padding": "SAME", "feature_group_count": 2}, 2),
}
IMAGE = (6, 6, 2)


def norm_of(layer, shape):
    """The layer's own norm: that of its Jacobian, in float64."""
    matrix = np.asarray(jax.jacobian(layer)(jnp.zeros(shape)), np.float64)
    return np.linalg.norm(matrix.reshape(-1, int(np.prod(shape))), 2)


def linen(name):
    """A wrapped layer as (parameters, function of parameters and an image), and the stock wrapper's."""
    make = nn.ConvTranspose if name == "transposed" else nn.Dense if name == "dense" else nn.Conv
    options, features = (
        ({}, 3) if name == "dense" else ({"strides": (2, 2)}, 4) if name == "transposed" else CONVS[name]
    )
    inner = lambda: make(features) if name == "dense" else make(features, (3, 3), **options)

    def of(wrapper):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return wrapper(inner())(x, update_stats=True)

        variables = Net().init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
        rest = {key: value for key, value in variables.items() if key != "params"}
        apply = lambda params, x: Net().apply({"params": params, **rest}, x[None], mutable=["batch_stats"])[0][0]
        return variables["params"], apply

    return of(oj.linen.OperatorNorm), of(nn.SpectralNorm)


def with_nnx(name):
    options, features = (
        ({}, 3) if name == "dense" else ({"strides": (2, 2)}, 4) if name == "transposed" else CONVS[name]
    )

    def of(wrapper):
        rngs = nnx.Rngs(0)
        make = nnx.ConvTranspose if name == "transposed" else nnx.Conv
        inner = nnx.Linear(2, 3, rngs=rngs) if name == "dense" else make(2, features, (3, 3), rngs=rngs, **options)
        graph, params, rest = nnx.split(wrapper(inner, rngs=rngs), nnx.Param, ...)
        return params, lambda params, x: nnx.merge(graph, params, rest, copy=True)(x[None], update_stats=True)[0]

    return of(oj.nnx.OperatorNorm), of(nnx.SpectralNorm)


EQUINOX = {
    "SAME": functools.partial(eqx.nn.Conv2d, padding="SAME"),
    "VALID": eqx.nn.Conv2d,
    "CIRCULAR": functools.partial(eqx.nn.Conv2d, padding="SAME", padding_mode="CIRCULAR"),
    "strided": functools.partial(eqx.nn.Conv2d, padding=1, stride=2),
    "dilated": functools.partial(eqx.nn.Conv2d, padding=2, dilation=2),
    "grouped": functools.partial(eqx.nn.Conv2d, padding=1, groups=2),
    "transposed": functools.partial(eqx.nn.ConvTranspose2d, padding=1, stride=2),
    "dense": lambda i, o, k, key: eqx.nn.Linear(i, o, key=key),
}


def with_equinox(name):
    def of(wrapper):
        key = jax.random.key(0)
        layer, state = eqx.nn.make_with_state(wrapper)(EQUINOX[name](2, 4, 3, key=key), "weight", key=key)
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        def apply(params, x):
            x = x[0, 0] if name == "dense" else x.transpose(2, 0, 1)
            return eqx.combine(params, static)(x, state)[0]

        return params, apply

    return of(oj.equinox.OperatorNorm), of(eqx.nn.SpectralNorm)


FRAMEWORKS = {"linen": linen, "nnx": with_nnx, "equinox": with_equinox}
CASES = [(framework, name) for framework in FRAMEWORKS for name in [*CONVS, "transposed", "dense"]]
CASES.remove(("equinox", "depthwise"))


@pytest.mark.parametrize(("framework", "name"), CASES)
def test_the_layers_own_norm_after_every_step(framework, name):
    """Five steps of SGD that make the kernels grow; what the stock wrapper's norms are is asserted beside it."""
    (params, apply), (stock_params, stock) = FRAMEWORKS[framework](name)
    shapes = lambda tree: sorted(leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim > 1)
    assert shapes(params) == shapes(jax.tree.map(jnp.asarray, stock_params))[: len(shapes(params))]
    target = 3 * jax.random.normal(jax.random.key(1), jax.eval_shape(apply, params, jnp.zeros(IMAGE)).shape)
    x = jax.random.normal(jax.random.key(2), IMAGE)
    step = jax.jit(jax.grad(lambda params: jnp.mean((apply(params, x) - target) ** 2)))
    params = jax.tree.map(lambda leaf: 3 * leaf, params)
    for _ in range(5):
        assert norm_of(functools.partial(apply, params), IMAGE) <= 1 + 1e-5
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, step(params))
    if name not in ("dense", "VALID"):  # the norm of the flattened kernel is another
        assert norm_of(functools.partial(stock, stock_params), IMAGE) > 1.05


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Flax's own
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gradients_are_differences(framework, x64):
    (params, apply), _ = FRAMEWORKS[framework]("strided")
    params = jax.tree.map(lambda leaf: 3 * leaf.astype(jnp.float64), params)
    x = jax.random.normal(jax.random.key(2), IMAGE)
    jax.test_util.check_grads(lambda p: jnp.sum(jnp.tanh(apply(p, x))), (params,), order=1, modes=["rev"], rtol=1e-4)


def test_linen_keeps_names_and_needs_no_state():
    layer = oj.linen.OperatorNorm(nn.Conv(4, (3, 3), name="first"), max_norm=0.5)
    out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, *IMAGE)))
    assert list(variables) == ["params"]
    assert jax.tree.leaves(variables)[0].shape == (4,)
    np.testing.assert_allclose(out, layer.apply(variables, jnp.ones((1, *IMAGE))), rtol=1e-6)  # init too


def test_equinox_without_a_state():
    layer = oj.equinox.OperatorNorm(eqx.nn.Linear(3, 3, key=jax.random.key(0)), max_norm=0.1)
    assert layer(jnp.ones(3)).shape == (3,)
    assert norm_of(layer, (3,)) <= 0.1 * (1 + 1e-6)


def test_nnx_writes_nothing_and_keeps_statistics():
    layer = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
    layer.kernel[...] = 10 * layer.kernel[...]
    before = jnp.array(layer.kernel[...])
    oj.nnx.OperatorNorm(layer)(jnp.ones((1, *IMAGE)))
    np.testing.assert_array_equal(layer.kernel[...], before)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for strides in (1, 2):
            x = nn.Conv(4, (3, 3), strides=strides)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.relu(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


def network():
    x = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    variables = Net().init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: 3 * leaf, variables["params"])
    apply = lambda params, x: Net().apply({"params": params, "batch_stats": variables["batch_stats"]}, x)
    return apply, params, x


@pytest.mark.slow
def test_the_function_is_that_of_constrained_parameters():
    apply, params, x = network()
    convs = oj.find_convs(apply, params, x, dense=True)
    expected = apply(oj.constrain(params, 0.5, convs), x)
    np.testing.assert_allclose(oj.normalize(apply, 0.5, dense=True)(params, x), expected, rtol=1e-4, atol=1e-6)
    seen = {}
    oj.normalize(lambda params, x: seen.update(params=params) or apply(params, x), 0.5, dense=True)(params, x)
    for path, conv in jax.tree_util.tree_leaves_with_path(convs):
        kernel = functools.reduce(lambda node, key: node[key.key], path, seen["params"])
        assert oj.operator_norm_bounds(kernel, conv).upper <= 0.5 * (1 + 1e-5)


@pytest.mark.slow
def test_under_every_transformation():
    apply, params, x = network()
    normal = oj.normalize(apply, 0.5, dense=True)
    expected = normal(params, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(jax.jit(normal)(params, x), expected)
    close(jax.vmap(normal, (None, 0))(params, x[:, None])[:, 0], expected)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    close(jax.jit(jax.vmap(normal, (0, None)))(twice, x)[1], normal(jax.tree.map(lambda a: a[1], twice), x))
    _, outs = jax.lax.scan(lambda carry, x: (carry, normal(params, x)), 0, x[:, None])
    close(outs[:, 0], expected)
    loss = lambda apply: lambda params: jnp.sum(apply(params, x) ** 2)
    gradient = jax.grad(loss(normal))(params)
    rescaled = lambda params: jnp.sum(apply(_by_hand(apply, params, x), x) ** 2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), gradient, jax.grad(rescaled)(params)
    )
    again = jax.jit(jax.grad(loss(jax.checkpoint(normal))))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), gradient, again)


def _by_hand(apply, params, x):
    convs = oj.find_convs(apply, params, x, dense=True)
    rescale = lambda conv, kernel: kernel if conv is None else oj.rescale_operator_norm(kernel, conv, 0.5)
    return jax.tree.map(rescale, convs, params, is_leaf=lambda node: node is None)


@pytest.mark.slow
def test_batch_norm_is_folded_on_request():
    """The composed layer's own Jacobian, convolution and batch norm; without ``scales`` it is above the bound."""
    params, shape = {"Conv_0": {}, "BatchNorm_0": {}}, (6, 6, 2)
    keys = jax.random.split(jax.random.key(0), 4)
    params["Conv_0"]["kernel"] = jax.random.normal(keys[0], (3, 3, 2, 4))
    params["BatchNorm_0"]["scale"] = 3 * jax.random.normal(keys[1], (4,))
    variance = jnp.exp(jax.random.normal(keys[2], (4,)))
    scale = lambda params: params["BatchNorm_0"]["scale"] * jax.lax.rsqrt(variance + 1e-5)

    def net(params, x):
        x = nn.Conv(4, (3, 3), use_bias=False, padding="CIRCULAR").apply({"params": params["Conv_0"]}, x[None])
        return x[0] * scale(params).reshape(1, 1, 4)

    def scales(params, x):
        return {"Conv_0": {"kernel": scale(params)}, "BatchNorm_0": None}

    x = jnp.ones(shape)
    norm = lambda net: norm_of(functools.partial(net, params), shape)
    folded = oj.normalize(net, 0.7, scales=scales)
    assert norm(oj.normalize(net, 0.7)) > 0.8
    assert norm(folded) == pytest.approx(0.7, rel=1e-5)
    assert norm(jax.jit(folded)) == pytest.approx(0.7, rel=1e-5)
    np.testing.assert_array_equal(oj.normalize(net, 1e3, scales=scales)(params, x), net(params, x))  # inside: as it is
    loss = lambda net: lambda params: jnp.sum(jnp.tanh(net(params, x)))
    jax.test_util.check_grads(loss(folded), (params,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    params["BatchNorm_0"]["scale"] = jnp.zeros(4)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss(folded))(params)))


@pytest.mark.slow
def test_scales_of_stacked_kernels():
    def net(params, x):
        step = lambda x, kernel: (jax.lax.conv(x, kernel, (1, 1), "SAME"), None)
        return jax.lax.scan(step, x, params)[0]

    kernels, scale = jnp.ones((3, 2, 2, 3, 3), jnp.bfloat16), jnp.arange(1.0, 7).reshape(3, 2)
    seen = []
    oj.normalize(lambda params, x: seen.append(params) or net(params, x), scales=lambda *_: scale)(
        kernels, jnp.ones((1, 2, 5, 5), jnp.bfloat16)
    )
    assert seen[-1].dtype == jnp.bfloat16
    conv = oj.Conv((5, 5), kernel_layout="OIHW")
    for kernel, factors in zip(seen[-1], scale):
        folded = kernel.astype(jnp.float32) * factors[:, None, None, None]
        assert 0.99 < oj.operator_norm_bounds(folded, conv).upper < 1 + 2**-7


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's own
def test_it_trains():
    """The normalised network learns, and its bound holds throughout."""
    apply, params, x = network()
    normal = oj.normalize(apply, 1.0, dense=True)
    tx = optax.adam(0.05)
    state, labels = tx.init(params), jnp.array([0, 2])
    loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(normal(params, x), labels).mean()

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_programs_are_read_once_for_each_shape():
    apply, params, x = network()
    calls = []
    normal = oj.normalize(lambda params, x: calls.append(None) or apply(params, x))
    for _ in range(3):
        normal(params, x)
    assert len(calls) == 4  # one walk, three calls
    normal(params, x[:1])
    assert len(calls) == 6


def test_bounds_may_differ_and_leave_layers_free():
    """A prefix of the parameters: a layer of its own bound, one that is free, members of a stack."""
    kernels = dict(zip("abcd", jax.random.normal(jax.random.key(0), (4, 2, 2, 3, 3))))
    stack = jax.random.normal(jax.random.key(1), (3, 2, 2, 3, 3))
    params = {"one": {"a": kernels["a"], "b": kernels["b"]}, "free": {"c": kernels["c"]}, "stack": stack}
    seen = {}

    def fn(params, x):
        seen.update(params)
        for kernel in (*params["one"].values(), *params["free"].values()):
            x = jax.lax.conv(x, kernel, (1, 1), "SAME")
        return jax.lax.scan(lambda x, kernel: (jax.lax.conv(x, kernel, (1, 1), "SAME"), None), x, params["stack"])[0]

    x = jnp.ones((1, 2, 5, 5))
    conv = oj.Conv((5, 5), kernel_layout="OIHW")
    norm = lambda kernel: float(oj.operator_norm_bounds(kernel, conv).upper)
    oj.normalize(fn, {"one": {"a": 0.5, "b": 2.0}, "free": None, "stack": 1.5})(params, x)
    np.testing.assert_allclose([norm(seen["one"]["a"]), norm(seen["one"]["b"])], [0.5, 2], rtol=1e-5)
    np.testing.assert_allclose([norm(kernel) for kernel in seen["stack"]], [1.5] * 3, rtol=1e-5)
    assert seen["free"]["c"] is params["free"]["c"]
    with pytest.raises(ValueError, match="expected max_norm to have the structure of the parameters"):
        oj.normalize(fn, {"one": 1.0})(params, x)
    model = eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=jax.random.key(0))])  # a module, which can be called
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    held = oj.normalize(lambda p, x: eqx.combine(p, static)(x), jax.tree.map(lambda _: 0.5, arrays), dense=True)
    assert norm_of(lambda x: held(arrays, x), (4,)) <= 0.5 + 1e-5
    with pytest.raises(ValueError, match=r"max_norm\['one'\]: expected max_norm to be positive"):
        oj.normalize(fn, {"one": -1.0, "free": None, "stack": None})


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Conv(2, (3, 3))(x)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(2, (3, 3))
        return layer(layer(x))


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2 * nn.Conv(2, (3, 3))(x)


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.repeat(nn.Conv(2, (3, 3))(x), 2, 1)


class Gathered(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.zeros((1, 2)).at[jnp.zeros(25, int)].add(nn.Dense(2)(x).reshape(25, 2))


def shared():
    members = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.vmap(nn.Conv, in_axes=None, out_axes=0, axis_size=3, **members)(2, (3, 3))


@pytest.mark.parametrize(
    "module", [Residual, Twice, Scaled, Repeated, Gathered, shared, lambda: nn.ConvLocal(2, (3, 3))]
)
def test_wrappers_refuse_what_is_not_one_layer(module):
    with pytest.raises(ValueError, match="applies one kernel once to its input|copies of the same elements"):
        oj.linen.OperatorNorm(module()).init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))


def test_wrappers_refuse_low_rank_changes():
    layer = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="applies one kernel once to its input"):
        oj.nnx.OperatorNorm(layer)(jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="applies one kernel once to its input"):
        oj.equinox.OperatorNorm(eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0)), "layers")(jnp.ones(4))


def test_an_error_of_the_function_is_met_once():
    calls = []

    def wrong(params, x):
        calls.append(None)
        raise TypeError("the function's own")

    with pytest.raises(TypeError, match="the function's own"):
        oj.normalize(wrong)(jnp.ones((2, 2, 3, 3)), jnp.ones((1, 2, 5, 5)))
    assert len(calls) == 1


def test_stacked_and_masked_leaves_and_dtypes():
    def fn(params, x):
        step = lambda x, kernel: (jax.lax.conv(x, kernel, (1, 1), "SAME"), None)
        return jax.lax.scan(step, x, params["kernels"])[0] + params["bias"]

    params = {"kernels": jnp.ones((3, 2, 2, 3, 3), jnp.bfloat16), "bias": jnp.ones((), jnp.bfloat16), "name": None}
    x = jnp.ones((1, 2, 5, 5), jnp.bfloat16)
    seen = {}
    oj.normalize(lambda params, x: seen.update(params) or fn(params, x))(params, x)
    assert seen["kernels"].dtype == jnp.bfloat16 and seen["name"] is None
    conv = oj.Conv((5, 5), kernel_layout="OIHW")
    upper = jax.vmap(lambda kernel: oj.operator_norm_bounds(kernel, conv).upper)(seen["kernels"])
    assert (upper <= 1 + 2**-8).all() and (upper > 0.9).all()


def test_wrong_calls():
    apply, params, x = network()
    with pytest.raises(TypeError, match="expected fn to be a function"):
        oj.normalize(params)
    with pytest.raises(ValueError, match="expected max_norm to be positive"):
        oj.normalize(apply, 0.0)
    with pytest.raises(TypeError, match=r"max_norm to be a positive number, got '1' \(str\)"):
        oj.normalize(apply, "1")
    with pytest.raises(ValueError, match=r"max_norm to be a scalar, got shape \(2,\)"):
        oj.normalize(apply, jnp.ones(2))
    with pytest.raises(TypeError, match="an opnorm_jax.Execution, got None"):
        oj.normalize(apply, execution=None)
    with pytest.raises(ValueError, match="on_unknown"):
        oj.normalize(apply, on_unknown="warn")
    with pytest.raises(ValueError, match="a program in which none does"):
        oj.normalize(lambda params, x: x)(params, x)
    masked = lambda params, x: jax.lax.conv(x, params * jnp.tril(jnp.ones((1, 1, 3, 3))), (1, 1), "SAME")
    with pytest.raises(ValueError, match="cannot describe"):
        oj.normalize(masked)(jnp.ones((2, 2, 3, 3)), jnp.ones((1, 2, 5, 5)))
    with pytest.raises(TypeError, match="expected scales to be a function"):
        oj.normalize(apply, scales={"Conv_0": 1.0})
    for scale, got in ((jnp.ones(3), r"float32 of shape \(3,\)"), (jnp.ones(4, int), "int"), (2.0, "got 2.0")):
        with pytest.raises(ValueError, match=rf"'kernel'\] \(3, 3, 2, 4\): expected its scale to be .* {got}"):
            scales = {**dict.fromkeys(params), "Conv_0": {"kernel": scale, "bias": None}}
            oj.normalize(apply, scales=lambda *_, scales=scales: scales)(params, x)
    with pytest.raises(ValueError, match="expected scales to have the structure of the parameters"):
        oj.normalize(apply, scales=lambda *_: {"Conv_7": None})(params, x)
    with pytest.raises(ValueError, match="expected the layer to have a parameter 'kernel'"):
        oj.equinox.OperatorNorm(eqx.nn.Linear(3, 3, key=jax.random.key(0)), "kernel")
    assert {"equinox", "linen", "nnx"} <= set(dir(oj))
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        oj.torch  # noqa: B018
