"""Muon for convolutions: certified steps, and optax's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opnorm_jax as oj


@pytest.fixture(autouse=True)
def promotion():
    """optax's own bias correction promotes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def norm(kernel, conv):
    return float(oj.operator_norm_bounds(kernel, conv).upper)


PARAMS = {
    "a": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.zeros(4)},
    "b": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.zeros(4)},
    "stack": jnp.ones((2, 3, 4, 4)),
    "dense": jnp.ones((4, 6)),
}
CONVS = {
    "a": {"kernel": oj.Conv((8, 8)), "bias": None},
    "b": {"kernel": oj.Conv((8, 8)), "bias": None},
    "stack": oj.Conv((9,), stacked=1),
    "dense": oj.Conv(()),
}


def random_like(tree, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)])


@pytest.mark.parametrize("exact", [False, True])
def test_every_step_moves_each_layer_by_the_learning_rate_at_most(exact):
    tx = oj.conv_muon(0.1, CONVS, exact=exact, adam_learning_rate=1e-3)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for seed in range(3):
        updates, state = update(random_like(params, seed), state, params)
        for name in ("a", "b"):
            assert 0.099 < norm(updates[name]["kernel"], CONVS[name]["kernel"]) <= 0.1 * (1 + 1e-5)
            assert jnp.abs(updates[name]["bias"]).max() <= 1.2e-3
        for member in updates["stack"]:
            assert 0.099 < norm(member, oj.Conv((9,))) <= 0.1 * (1 + 1e-5)
        np.testing.assert_allclose(np.linalg.svd(updates["dense"])[1], 0.1, rtol=1e-4)
        params = optax.apply_updates(params, updates)


def test_dense_layers_are_those_of_optax():
    """With the polar factor in place of five Newton-Schulz steps, which leave singular values between 0.7 and 1.2."""
    params = {"w": jnp.zeros((4, 6))}
    ours = oj.scale_by_conv_muon({"w": oj.Conv(())})
    dimensions = {"w": optax.contrib.MuonDimensionNumbers()}
    stock = optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions)
    state, stock_state = ours.init(params), stock.init(params)
    for seed in range(3):
        gradient = random_like(params, seed)
        updates, state = ours.update(gradient, state, params)
        theirs, stock_state = stock.update(gradient, stock_state, params)
        left, _, right = np.linalg.svd(theirs["w"], full_matrices=False)
        np.testing.assert_allclose(updates["w"], left @ right, atol=1e-3)


@pytest.mark.slow
def test_optax_conventions():
    """State and dtypes are stable under jit and scan; masks, partitions, MultiSteps, injected hyperparameters."""
    kernels = {"kernel": jnp.ones((3, 3, 4, 4))}
    convs = {"kernel": oj.Conv((8, 8))}
    gradient = random_like(kernels)
    tx = oj.scale_by_conv_muon(convs)
    state = tx.init(kernels)
    updates, after = jax.jit(tx.update)(gradient, state, kernels)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(lambda a: a.dtype, after)
    assert after.count == 1
    body = lambda state, _: (tx.update(gradient, state)[1], None)
    scanned, _ = jax.lax.scan(body, state, None, length=3)
    assert scanned.count == 3
    half = oj.scale_by_conv_muon(convs, mu_dtype=jnp.bfloat16)
    narrow, state = half.update(gradient, half.init(kernels))
    assert state.mu["kernel"].dtype == jnp.bfloat16 and narrow["kernel"].dtype == jnp.float32
    with_bias = {**kernels, "bias": jnp.zeros(4)}
    both = {**gradient, "bias": jnp.ones(4)}
    masked = optax.masked(oj.scale_by_conv_muon({**convs, "bias": None}), {"kernel": True, "bias": False})
    out, _ = masked.update(both, masked.init(with_bias), with_bias)
    np.testing.assert_array_equal(out["bias"], 1)
    np.testing.assert_allclose(out["kernel"], updates["kernel"], atol=1e-6)
    steps = optax.MultiSteps(oj.conv_muon(0.1, {**convs, "bias": None}), 2)
    out, state = steps.update(both, steps.init(with_bias), with_bias)
    assert not out["kernel"].any()
    out, _ = steps.update(both, state, with_bias)
    np.testing.assert_allclose(out["kernel"], -0.1 * updates["kernel"], atol=1e-6)
    injected = optax.inject_hyperparams(lambda rate: oj.conv_muon(rate, {**convs, "bias": None}))(rate=0.1)
    out, _ = jax.jit(injected.update)(both, injected.init(with_bias), with_bias)
    np.testing.assert_allclose(out["kernel"], -0.1 * updates["kernel"], atol=1e-6)
    scheduled = oj.conv_muon(optax.linear_schedule(0.1, 0.0, 10), {**convs, "bias": None}, weight_decay=0.1)
    out, _ = scheduled.update(both, scheduled.init(with_bias), with_bias)
    np.testing.assert_allclose(out["kernel"], -0.1 * (updates["kernel"] + 0.1), atol=1e-6)


def test_nesterov_and_momentum_by_hand():
    kernels, convs = {"kernel": jnp.zeros((3, 3, 4, 4))}, {"kernel": oj.Conv((8, 8))}
    first, second = random_like(kernels, 1)["kernel"], random_like(kernels, 2)["kernel"]
    sign = lambda g: oj.steepest_direction(g, convs["kernel"]).direction
    for nesterov in (False, True):
        tx = oj.scale_by_conv_muon(convs, beta=0.9, nesterov=nesterov)
        _, state = tx.update({"kernel": first}, tx.init(kernels))
        out, _ = tx.update({"kernel": second}, state)
        moment = 0.9 * 0.1 * first + 0.1 * second
        ahead = 0.9 * moment / (1 - 0.9**3) + 0.1 * second / (1 - 0.9**2)
        np.testing.assert_allclose(out["kernel"], sign(ahead if nesterov else moment), atol=1e-4)


def test_wrong_calls():
    with pytest.raises(
        ValueError, match=r"params\['a'\]\['bias'\].*expected every parameter to have a Conv.*conv_muon"
    ):
        oj.scale_by_conv_muon(CONVS).init(PARAMS)
    with pytest.raises(TypeError, match="in a tree, the padding"):
        oj.scale_by_conv_muon({"kernel": (8, 8)})
    with pytest.raises(ValueError, match="holds no Conv"):
        oj.conv_muon(0.1, {"kernel": None})
    with pytest.raises(ValueError, match="'kernel'.*expected a kernel of 4 axes"):
        tx = oj.scale_by_conv_muon({"kernel": oj.Conv((8, 8))})
        tx.update({"kernel": jnp.ones((3, 4, 4))}, tx.init({"kernel": jnp.ones((3, 4, 4))}))
    with pytest.raises(TypeError, match="an opnorm_jax.Execution, got 'eigh'"):
        oj.scale_by_conv_muon({"kernel": oj.Conv((8, 8))}, execution="eigh")
    with pytest.raises(ValueError, match=r"keys \['other'\] and convs has a dict with the keys \['kernel'\]"):
        oj.conv_muon(0.1, {"kernel": oj.Conv((8, 8))}).init({"other": jnp.ones((3, 3, 4, 4))})
