"""Kernels stacked along any axes of a parameter: found, described, and each held on its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import THOROUGH, count_case
from flax import nnx
from jacobian import linear_norm
from jax import lax

import opnorm_jax as oj

CASES = 300 if THOROUGH else 6
BATCH = 6
USES = ("scan", "index", "traced index", "vmap", "vmap of images", "scan of an ensemble")
LAYERS = [  # input shape, window strides, padding, groups
    ((6,), (1,), "SAME", 1),
    ((5,), (2,), "VALID", 1),
    ((5, 4), (1, 1), "SAME", 1),
    ((4, 5), (1, 1), ((2, 0), (1, 1)), 2),
]


class Case:
    """A random parameter of stacked kernels, and a program that uses every one of them."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.shape, self.strides, self.padding, self.groups = LAYERS[rng.integers(len(LAYERS))]
        self.use = USES[rng.integers(len(USES))]
        letters = "HW"[2 - len(self.shape) :]
        self.layout = str(rng.choice([letters + "IO", "OI" + letters, letters[:1] + "OI" + letters[1:]]))
        self.letters = letters
        sizes = dict.fromkeys(letters, 3) | {"I": 2 // self.groups, "O": 2}
        self.counts = [3, 2] if self.use == "scan of an ensemble" else [3]
        axes = rng.choice(len(sizes) + len(self.counts), len(self.counts), replace=False)
        self.axes = [int(axis) for axis in axes]  # where those of self.counts are
        places = dict(zip(self.axes, self.counts))
        rest = iter(sizes[letter] for letter in self.layout)
        shape = [places[n] if n in places else next(rest) for n in range(len(sizes) + len(places))]
        self.param = rng.standard_normal(shape).astype(np.float32)

    def layer(self, kernel, x):
        numbers = (f"N{self.letters}C", self.layout, f"N{self.letters}C")
        return lax.conv_general_dilated(
            x, kernel, self.strides, self.padding, dimension_numbers=numbers, feature_group_count=self.groups
        )

    def fn(self, param, x):
        (axis, *more), pick = self.axes, lax.dynamic_index_in_dim
        if self.use == "index":
            return [self.layer(lax.index_in_dim(param, n, axis, False), x) for n in range(3)]
        if self.use == "traced index":
            return lax.fori_loop(0, 3, lambda n, s: s + self.layer(pick(param, n, axis, False), x).sum(), 0.0)
        if self.use == "vmap":
            return jax.vmap(self.layer, (axis, None))(param, x)
        if self.use == "vmap of images":
            return jax.vmap(self.layer, (axis, 0))(param, x)
        one = lambda kernel: self.layer(kernel, x)
        if more:
            one = jax.vmap(one, more[0] - (more[0] > axis))
        return lax.scan(lambda c, kernel: (c, one(kernel)), 0, jnp.moveaxis(param, axis, 0))[1]

    def members(self, param):
        """The kernels, by their index along the stacked axes in ascending order."""
        axes = sorted(self.axes)
        front = np.moveaxis(np.asarray(param), axes, range(len(axes)))
        return {index: front[index] for index in np.ndindex(*front.shape[: len(axes)])}

    def norm(self, kernel):
        """The norm of a member, from the matrix of the layer itself."""
        return linear_norm(lambda x: self.layer(np.asarray(kernel, np.float64), x), (*self.shape, 2))


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BATCH, CASES, BATCH))])
def test_every_member_is_found_and_held(start):
    seen = set()
    for seed in range(start, start + BATCH):
        case = Case(seed)
        images = (3,) if case.use == "vmap of images" else ()
        x = jax.ShapeDtypeStruct((*images, 1, *case.shape, 2), jnp.float32)
        conv = oj.find_convs(case.fn, case.param, x)
        leading = sorted(case.axes) == list(range(len(case.axes)))
        assert conv.stacked == (len(case.axes) if leading else tuple(sorted(case.axes))), (seed, conv)
        norms = {index: case.norm(kernel) for index, kernel in case.members(case.param).items()}
        bound = 1.01 * float(np.median(list(norms.values())))
        held = case.members(oj.constrain(case.param, bound, conv))
        assert held.keys() == norms.keys()
        for index, kernel in case.members(case.param).items():
            assert case.norm(held[index]) <= bound * (1 + 1e-6), (seed, index)
            if norms[index] <= 0.5 * bound:  # far enough inside for its upper bound
                assert held[index].tobytes() == kernel.tobytes(), (seed, index)
        for row, norm in zip(oj.spectral_report(case.param, conv).layers if seed % 4 == 0 else (), norms.values()):
            assert row.lower * (1 - 1e-6) <= norm <= row.upper * (1 + 1e-6), (seed, row)
        seen.add((case.use, leading))
        count_case("stacked kernels", case.use)
    assert len(seen) > 2


def test_the_functions_of_trees():
    """A stack along an inner axis gets what the same kernels get along the first."""
    rng, inner = np.random.default_rng(0), oj.Conv((6, 6), stacked=(2,))
    param = jnp.asarray(rng.standard_normal((3, 3, 5, 2, 4)), jnp.float32)
    first, leading = jnp.moveaxis(param, 2, 0), oj.Conv((6, 6), stacked=1)
    update = -0.1 * param
    for make in (
        lambda conv: oj.constrain_operator_norm(1.0, conv, log_norms=True),
        lambda conv: oj.scale_by_conv_muon(conv),
    ):
        one, other = make(inner), make(leading)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            moved, state = jax.jit(one.update)(update, one.init(param), param)
            expected, expected_state = jax.jit(other.update)(jnp.moveaxis(update, 2, 0), other.init(first), first)
        np.testing.assert_array_equal(jnp.moveaxis(moved, 2, 0), expected)
        norms = optax.tree.get(state, "norms", None), optax.tree.get(expected_state, "norms", None)
        if norms[0] is not None:
            np.testing.assert_array_equal(*norms)
    factors = jnp.asarray(rng.uniform(0.5, 2, (5, 4)), jnp.float32)
    rows = [oj.spectral_report(p, conv, scales=factors).layers for p, conv in ((param, inner), (first, leading))]
    assert [(row.lower, row.upper) for row in rows[0]] == [(row.lower, row.upper) for row in rows[1]]

    def net(stack, x):
        layer = lambda kernel: lax.conv(x, kernel.transpose(3, 2, 0, 1), (1, 1), "SAME")
        return lax.map(layer, stack)

    x = jnp.asarray(rng.standard_normal((1, 2, 6, 6)), jnp.float32)
    of_inner = oj.normalize(lambda param, x: net(jnp.moveaxis(param, 2, 0), x))
    np.testing.assert_array_equal(of_inner(param, x), oj.normalize(net)(first, x))


def test_flax_scan_and_vmap_along_inner_axes():
    """Flax may keep the members of a scan, and of an ensemble within it, along any axes of the parameters."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Conv(4, (3, 3))(x)), None

    ensemble = nn.vmap(Block, in_axes=(0, None), out_axes=0, variable_axes={"params": 1}, split_rngs={"params": True})
    model = nn.scan(
        ensemble, variable_axes={"params": 2}, split_rngs={"params": True}, length=3, in_axes=nn.broadcast
    )()
    x = jnp.ones((2, 1, 6, 6, 4))
    params = model.init(jax.random.key(0), x, None)
    (kernel,) = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 3]
    convs = oj.find_convs(lambda params, x: model.apply(params, x, None), params, x)
    (conv,) = jax.tree.leaves(convs)
    assert sorted(np.take(kernel.shape, conv.stacked)) == [2, 3]
    held = oj.constrain(params, 0.5, convs)
    rows = oj.spectral_report(held, convs).layers
    assert len(rows) == 6 and max(row.upper for row in rows) <= 0.5 * (1 + 1e-6)


def test_a_stack_of_matrices():
    stack = jax.ShapeDtypeStruct((4, 5, 4), jnp.float32)
    fn = lambda p, x: lax.scan(lambda y, k: (y @ k, None), x, jnp.moveaxis(p, 1, 0))[0]
    assert oj.find_convs(fn, stack, jnp.ones((1, 4)), dense=True) == oj.Conv((), stacked=(1,))


def test_spellings_of_stacked():
    assert oj.Conv((8, 8), stacked=(0, 1)).stacked == 2
    assert oj.Conv((8, 8), stacked=[4, 1]).stacked == oj.Conv((8, 8), stacked=(1, -2)).stacked == (1, 4)
    assert oj.Conv((8, 8), stacked=()) == oj.Conv((8, 8))
    for axes in ((0, 6), (-7, 1), (1, 1), (1, -5)):
        with pytest.raises(ValueError, match="different axes of a parameter with 6 axes"):
            oj.Conv((8, 8), stacked=axes)
    with pytest.raises(TypeError, match="stacked to be made of ints"):
        oj.Conv((8, 8), stacked=(1.5,))
    with pytest.raises(ValueError, match=r"params\['k'\] \(3, 3, 2\)"):
        oj.constrain({"k": jnp.ones((3, 3, 2))}, 1.0, {"k": oj.Conv((8, 8), stacked=(4,))})


def test_members_with_images_of_their_own_are_told_from_groups():
    """vmap merges a stack into output channels, and then one order may stand for two kinds of stacks."""
    conv = lambda x, kernel, groups=1: lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"), feature_group_count=groups
    )
    x = jnp.ones((1, 5, 5, 3))
    each = jnp.ones((2, 1, 5, 5, 3))
    last = jax.ShapeDtypeStruct((4, 3, 3, 3, 2), jnp.float32)
    alone = lambda param, xs: jax.vmap(conv, (0, 4))(xs, param)
    assert oj.find_convs(alone, last, each).stacked == (4,)
    assert oj.find_convs(lambda p, x: jax.vmap(conv, (None, 4))(x, p), last, x).stacked == (4,)
    # Right behind another convolution the channels may have been merged before.
    square = jax.ShapeDtypeStruct((3, 3, 3, 3, 2), jnp.float32)
    twice = lambda p, xs: jax.vmap(lambda x, k: conv(conv(x, k), k), (0, 4))(xs, p)
    assert oj.find_convs(twice, square, each).stacked == (4,)
    depthwise = jax.ShapeDtypeStruct((2, 3, 1, 3, 3), jnp.float32)
    found = oj.find_convs(lambda p, x: jax.vmap(lambda k: conv(x, k, 3))(p), depthwise, x)
    assert (found.stacked, found.feature_group_count) == (1, 3)
    found = oj.find_convs(lambda p, xs: jax.vmap(lambda x, k: conv(x, k, 3))(xs, p), depthwise, each)
    assert (found.stacked, found.feature_group_count) == (1, 3)


def test_axes_that_become_one_layer_are_no_stack():
    """Heads that are merged into output channels are one layer, whose norm is not that of the largest."""
    conv = lambda x, kernel: lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, heads = jnp.ones((1, 5, 5, 3)), jax.ShapeDtypeStruct((2, 3, 3, 3, 4), jnp.float32)
    merged = lambda p, x: jax.nn.relu(conv(x, jnp.moveaxis(p, 0, 3).reshape(3, 3, 3, 8)))
    with pytest.raises(ValueError, match="several of its axes become one"):
        oj.find_convs(merged, heads, x)
    with pytest.raises(ValueError, match="several of its axes become one"):
        oj.find_convs(
            lambda p, x: merged(jnp.moveaxis(p, 3, 0), x), jax.ShapeDtypeStruct((3, 3, 3, 2, 4), jnp.float32), x
        )


@pytest.mark.parametrize("axis", [0, 1])
def test_an_nnx_ensemble(axis):
    axes = nnx.StateAxes({nnx.Param: axis})

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=axes)
    def make(rngs):
        return nnx.Conv(2, 4, (3, 3), rngs=rngs)

    graph, params = nnx.split(make(nnx.Rngs(0)))
    forward = nnx.vmap(lambda layer, x: nnx.relu(layer(x)), in_axes=(axes, None))
    fn = lambda params, x: forward(nnx.merge(graph, params, copy=True), x)
    x = jnp.ones((1, 6, 6, 2))
    convs = oj.find_convs(fn, params, x)
    (conv,) = jax.tree.leaves(convs)
    assert conv.stacked == (1 if axis == 0 else (1,))
    held = oj.constrain(params, 0.5, convs)
    assert [layer.upper <= 0.5 * (1 + 1e-6) for layer in oj.spectral_report(held, convs).layers] == [True] * 3
