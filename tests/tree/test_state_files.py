"""The optimizer's state in other tools' files, and exported functions that hold or return named tuples."""

import contextlib
import pickle

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opnorm_jax as oj

CONVS = {"kernel": oj.Conv((8, 8)), "bias": None}
CHAINS = {
    "constrain": lambda: optax.chain(
        optax.sgd(0.1, momentum=0.9), oj.constrain_operator_norm(1.0, CONVS, every=2, log_norms=True)
    ),
    "muon": lambda: optax.chain(oj.scale_by_conv_muon({"kernel": oj.Conv((8, 8))}), optax.scale(-0.1)),
}


def problem(name):
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 2, 3)), "bias": jnp.ones(3)}
    if name == "muon":
        params.pop("bias")
    return params, CHAINS[name]()


def stepped(tx, params, state):
    gradient = jax.tree.map(jnp.sin, params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def by_flax(state, template, folder):
    serialization = pytest.importorskip("flax.serialization")
    return serialization.from_bytes(template, serialization.to_bytes(state))


def by_orbax(state, template, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


def by_cloudpickle(state, template, folder):
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(state))


FILES = {
    "pickle": lambda state, template, folder: pickle.loads(pickle.dumps(state)),
    "cloudpickle": by_cloudpickle,
    "flax.serialization": by_flax,
    "orbax": by_orbax,
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("tool", FILES)
def test_a_state_goes_on_to_the_same_bits(tool, name, tmp_path):
    params, tx = problem(name)
    with jax.numpy_dtype_promotion("standard"):
        params, state = stepped(tx, params, tx.init(params))
        found = FILES[tool](state, tx.init(params), tmp_path)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(stepped(tx, params, found)), jax.tree.leaves(stepped(tx, params, state))):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


EXPORTED = {
    "Bounds": lambda kernel: oj.operator_norm_bounds(kernel, (6, 6)),
    "ProjectionInfo": lambda kernel: oj.project_operator_norm_info(kernel, (6, 6), 1.0),
    "Steepest": lambda kernel: oj.steepest_direction(kernel, (6, 6)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_named_tuples_come_back_from_an_exported_function(name):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 3))
    data = jax.export.export(jax.jit(EXPORTED[name]))(kernel).serialize()
    found, want = jax.export.deserialize(data).call(kernel), EXPORTED[name](kernel)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_an_exported_step_takes_and_returns_the_state(name):
    params, tx = problem(name)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for own in (optax.EmptyState, optax.TraceState):  # optax leaves its named tuples to its users
            with contextlib.suppress(ValueError):  # registered by the test before
                jax.export.register_namedtuple_serialization(own, serialized_name=f"optax.{own.__name__}")
        data = jax.export.export(jax.jit(lambda p, s: stepped(tx, p, s)))(params, state).serialize()
        found, want = jax.export.deserialize(data).call(params, state), stepped(tx, params, state)
    assert jax.tree.structure(found) == jax.tree.structure(want)
