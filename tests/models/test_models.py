"""Every convolution of published models is found, as their own layer objects describe it."""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import pytest
import zoo

import opnorm_jax as oj


@pytest.fixture(autouse=True)
def standard_promotion():
    """The models promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def described(convs):
    """All that was found, and all that was not, by its path."""
    is_leaf = lambda node: node is None or isinstance(node, (oj.Conv, oj.Unknown))
    leaves = jax.tree_util.tree_leaves_with_path(convs, is_leaf=is_leaf)
    found = [leaf for _, leaf in leaves if isinstance(leaf, oj.Conv)]
    unknown = {jax.tree_util.keystr(path): leaf.reason for path, leaf in leaves if isinstance(leaf, oj.Unknown)}
    return found, unknown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_all_kernels_are_found(name):
    package = zoo.MODELS[name][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install opnorm-jax[models]")
    model = zoo.build(name)
    found, unknown = described(oj.find_convs(model.fn, model.params, model.image, on_unknown="skip"))
    assert not unknown
    facts = collections.Counter()
    wanted = collections.Counter(model.layers)
    shapes = all(layer.input_shape is not None for layer in model.layers)
    for conv in found:
        shape = conv.input_shape if shapes else None
        facts[zoo.Layer(conv.strides, conv.kernel_dilation, conv.feature_group_count, shape)] += 1
    assert facts == wanted and len(found) >= 1


@pytest.mark.filterwarnings("ignore")
def test_standardised_kernels_are_refused_by_name():
    """Big Transfer's layers standardise their kernels: the parameter is not what is applied."""
    nn = pytest.importorskip("flax.linen")

    class StandardisedConv(nn.Conv):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            if name == "kernel":
                value = value - jnp.mean(value, axis=[0, 1, 2])
                value = value / (jnp.std(value, axis=[0, 1, 2]) + 1e-5)
            return value

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(4)(StandardisedConv(8, (3, 3), use_bias=False, name="root")(x)))
            return nn.Conv(4, (3, 3), name="head")(x)

    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    fn = lambda params, x: Net().apply({"params": params}, x)
    convs = oj.find_convs(fn, params, x, on_unknown="skip")
    assert isinstance(convs["head"]["kernel"], oj.Conv)
    assert isinstance(convs["root"]["kernel"], oj.Unknown) and "standardised" in convs["root"]["kernel"].reason
    with pytest.raises(ValueError, match=r"params\['root'\]\['kernel'\]"):
        oj.find_convs(fn, params, x)
