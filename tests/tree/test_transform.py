"""The property table of optax transformations, and what constraining a whole tree promises."""

import contextlib
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import opnorm_jax as oj

SAME = oj.Conv((6, 6), padding="SAME")
CIRCLE = oj.Conv((5, 5), padding="CIRCULAR")
CONVS = {
    "a": {"kernel": SAME, "bias": None},
    "b": {"kernel": SAME, "bias": None},
    "c": {"kernel": CIRCLE},
    "dense": None,
}


def make_params(dtype="float32", scale=1.0):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: (scale * jax.random.normal(next(keys), shape)).astype(dtype)
    return {
        "a": {"kernel": normal(3, 3, 2, 3), "bias": normal(3)},
        "b": {"kernel": normal(3, 3, 2, 3), "bias": None},
        "c": {"kernel": normal(3, 3, 3, 4)},
        "dense": {"kernel": normal(4, 5), "bias": normal(5)},
    }


def zeros_like(params):
    return jax.tree.map(jnp.zeros_like, params)


def check_norms(params, bound, tolerance=1e-5):
    """By the oracle, not by the library."""
    for name, options in (("a", {"padding": "SAME"}), ("b", {"padding": "SAME"}), ("c", {})):
        shape = (5, 5) if name == "c" else (6, 6)
        kernel = np.asarray(params[name]["kernel"], np.float64)
        assert oracle.dense_singular_values(kernel, shape, **options)[0] <= bound * (1 + tolerance), name


@functools.cache
def transformation(**options):
    return oj.constrain_operator_norm(1.0, CONVS, **options)


@functools.cache
def jitted(tx):
    """One compilation for all tests that use the same transformation."""
    return jax.jit(tx.update)


def run(tx, params, steps=1, state=None, updates=None):
    state = tx.init(params) if state is None else state
    update = jitted(tx)
    for _ in range(steps):
        moves, state = update(zeros_like(params) if updates is None else updates, state, params)
        params = optax.apply_updates(params, moves)
    return params, state


@pytest.mark.parametrize("constraint", ["rescale", "project", "clip"])
def test_constrains_every_kernel_and_nothing_else(constraint):
    params = make_params()
    out, state = run(transformation(constraint=constraint, log_norms=True), params)
    check_norms(out, 1.0 if constraint != "clip" else 1.6)
    chex.assert_trees_all_equal(out["dense"], params["dense"])
    assert (out["a"]["bias"] == params["a"]["bias"]).all() and out["b"]["bias"] is None
    for name in "abc":
        assert state.norms[name]["kernel"] > 1 and state.norms[name]["kernel"].dtype == jnp.float32
    pure = oj.constrain(params, 1.0, CONVS, constraint=constraint)
    chex.assert_trees_all_close(pure, out, atol=1e-6)


def test_last_in_a_chain_with_momentum_and_weight_decay():
    params = make_params()
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.5, momentum=0.9), transformation(log_norms=True))
    out, state = run(tx, params, 5, updates=jax.tree.map(lambda p: -p, params))
    check_norms(out, 1.0)
    norms = optax.tree.get(state, "norms")
    assert norms["a"]["kernel"] >= 1 and optax.tree.get(state[-1], "count") == 5


def test_inside_with_zero_update_is_unchanged_bitwise():
    params = make_params(scale=1e-3)
    out, _ = run(transformation(), params, 3)
    chex.assert_trees_all_equal(out, params)
    constrained, _ = run(transformation(), make_params())
    again, _ = run(transformation(), constrained, 3)
    chex.assert_trees_all_equal(again, constrained)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every(every):
    params, tx = make_params(), transformation(every=every)
    state, update = tx.init(params), jitted(tx)
    for count in range(5):
        moves, state = update(zeros_like(params), state, params)
        acted = any((leaf != 0).any() for leaf in jax.tree.leaves(moves))
        assert acted == (count % every == 0)
        assert state.count == count + 1


def test_steps_in_between_factorise_nothing():
    """The work sits in one branch of a cond; the other only passes values on."""
    params, tx = make_params(), transformation(constraint="clip", every=100)
    jaxpr = jax.make_jaxpr(tx.update)(zeros_like(params), tx.init(params), params).jaxpr
    conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    assert len(conds) == 1
    outside = [eqn for eqn in jaxpr.eqns if eqn.primitive.name != "cond"]
    assert all("eigh" not in str(eqn) for eqn in outside)
    idle, busy = sorted((str(branch) for branch in conds[0].params["branches"]), key=len)
    assert "eigh" in busy and "eigh" not in idle and "dot_general" not in idle


@pytest.mark.slow
def test_schedule_and_prefix_trees_of_bounds():
    params = make_params()
    schedule = optax.linear_schedule(2.0, 1.0, 3)
    out, state = run(oj.constrain_operator_norm(schedule, CONVS), params)
    assert oj.operator_norm(out["c"]["kernel"], (5, 5)) == pytest.approx(2, rel=1e-4)
    constant, _ = run(oj.constrain_operator_norm(lambda count: 1.0, CONVS), params)
    chex.assert_trees_all_equal(constant, run(transformation(), params)[0])
    bounds = {"a": 0.5, "b": {"kernel": schedule, "bias": None}, "c": None, "dense": None}
    out, _ = run(oj.constrain_operator_norm(bounds, CONVS), params)
    assert oj.operator_norm_bounds(out["a"]["kernel"], SAME).upper == pytest.approx(0.5, rel=1e-4)
    assert oj.operator_norm_bounds(out["b"]["kernel"], SAME).upper == pytest.approx(2.0, rel=1e-4)
    assert (out["c"]["kernel"] == params["c"]["kernel"]).all()


def test_accepts_unknown_extra_args():
    params, tx = make_params(), transformation()
    tx.update(zeros_like(params), tx.init(params), params, value=1.0, anything=None)


@contextlib.contextmanager
def compilations():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield records
    finally:
        logger.removeHandler(handler)


@pytest.mark.filterwarnings("ignore:Finished")
@pytest.mark.parametrize(
    "constraint", ["rescale", *(pytest.param(c, marks=pytest.mark.slow) for c in ("clip", "project"))]
)
def test_second_call_compiles_nothing(constraint):
    params, tx = make_params(), transformation(constraint=constraint, every=2)
    update, updates = jax.jit(tx.update), zeros_like(params)
    with compilations() as first:
        moves, state = update(updates, tx.init(params), params)
    assert any("Compiling" in message for message in first)
    params = jax.jit(optax.apply_updates)(params, moves)
    with compilations() as second:
        for _ in range(3):
            _, state = update(updates, state, params)
    assert not second


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "float32", "float64"))]
)
def test_dtypes_and_state_types_are_stable(dtype, x64):
    params, tx = make_params(dtype), transformation(every=2, log_norms=True)
    state = tx.init(params)
    moves, new_state = jax.jit(tx.update)(zeros_like(params), state, params)
    typed = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert typed(state) == typed(new_state)
    assert jax.tree.map(lambda m: m.dtype, moves) == jax.tree.map(lambda p: p.dtype, params)
    jax.lax.cond(True, lambda s: tx.update(zeros_like(params), s, params)[1], lambda s: s, state)
    check_norms(optax.apply_updates(params, moves), 1.0, 8 * float(jnp.finfo(dtype).eps) + 1e-6)


def test_float32_updates_on_bfloat16_parameters():
    params, tx = make_params("bfloat16"), transformation()
    with jax.numpy_dtype_promotion("standard"):
        moves, _ = tx.update(jax.tree.map(lambda p: jnp.zeros(p.shape), params), tx.init(params), params)
    assert all(move.dtype == jnp.float32 for move in jax.tree.leaves(moves))


def test_map_params_is_identity():
    params, tx = make_params(), optax.chain(optax.adam(1e-3), transformation(log_norms=True))
    state = tx.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda v: v, state), state)


def test_init_with_abstract_input_and_under_jit():
    params, tx = make_params(), transformation(log_norms=True)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(tx.init(abstract), tx.init(params))
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), tx.init(params))


@pytest.mark.slow
def test_inject_hyperparams():
    params = make_params()
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.inject_hyperparams(oj.constrain_operator_norm)(max_norm=1.0, convs=CONVS, every=2)
        moves, state = jax.jit(tx.update)(zeros_like(params), tx.init(params), params)
        want, want_state = transformation(every=2).update(
            zeros_like(params), transformation(every=2).init(params), params
        )
        chex.assert_trees_all_close(moves, want, atol=1e-7)
        chex.assert_trees_all_close(state.inner_state, want_state, rtol=1e-6)
        state.hyperparams["max_norm"] = jnp.asarray(3.0)
        moves, _ = tx.update(
            zeros_like(params), state._replace(inner_state=want_state._replace(count=jnp.int32(0))), params
        )
    out = optax.apply_updates(params, moves)
    assert oj.operator_norm(out["c"]["kernel"], (5, 5)) == pytest.approx(3, rel=1e-4)


def test_multi_steps():
    params = make_params()
    tx = optax.MultiSteps(transformation(), every_k_schedule=4)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(4):
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps itself promotes
            moves, state = update(zeros_like(params), state, params)
        assert any((leaf != 0).any() for leaf in jax.tree.leaves(moves)) == (k == 3)
    check_norms(optax.apply_updates(params, moves), 1.0)


def test_masked():
    params = make_params()
    mask = {"a": {"kernel": True, "bias": False}, "b": {"kernel": False, "bias": None}, "c": True, "dense": False}
    out, state = run(optax.masked(transformation(log_norms=True), mask), params)
    assert oj.operator_norm(out["c"]["kernel"], (5, 5)) <= 1 + 1e-5
    assert (out["b"]["kernel"] == params["b"]["kernel"]).all()
    assert state.inner_state.norms["b"]["kernel"] == 0 < state.inner_state.norms["a"]["kernel"]


def test_partition():
    params = make_params()
    labels = jax.tree.map(lambda p: "conv" if p.ndim == 4 else "rest", params)
    tx = optax.partition({"conv": optax.chain(optax.sgd(0.1), transformation()), "rest": optax.adam(1e-3)}, labels)
    with jax.numpy_dtype_promotion("standard"):  # adam itself promotes
        out, _ = run(tx, params)
    check_norms(out, 1.0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.conditionally_transform(tx, lambda step: step < 1),
        optax.with_extra_args_support,
        lambda tx: optax.chain(tx, optax.identity()),
    ],
    ids=["apply_if_finite", "conditionally_transform", "extra_args", "chain"],
)
def test_other_wrappers(wrap):
    out, _ = run(wrap(transformation()), make_params())
    check_norms(out, 1.0)


@pytest.mark.slow
def test_under_scan_and_vmap():
    params, tx = make_params(), transformation(every=2)

    def body(carry, _):
        params, state = carry
        moves, state = tx.update(jax.tree.map(lambda p: 0.1 * p, params), state, params)
        return (optax.apply_updates(params, moves), state), None

    (out, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, None, length=5))((params, tx.init(params)))
    check_norms(out, 1.0)
    assert state.count == 5
    stack = jax.tree.map(lambda p: jnp.stack([p, p * 0.001]), params)
    outs, _ = jax.vmap(lambda p: tx.update(zeros_like(p), tx.init(p), p))(stack)
    check_norms(jax.tree.map(lambda p, m: (p + m)[0], stack, outs), 1.0)
    assert (outs["c"]["kernel"][1] == 0).all()


def test_nan_stays_in_its_layer():
    params = make_params()
    params["a"]["kernel"] = params["a"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    out, _ = run(transformation(), params)
    assert jnp.isnan(out["a"]["kernel"]).all()
    assert jnp.isfinite(out["b"]["kernel"]).all() and jnp.isfinite(out["c"]["kernel"]).all()


def test_equal_layers_share_one_call():
    """12 equal layers take as many factorisations in the program as 2."""

    def count(layers):
        params = {str(n): jnp.ones((3, 3, 4, 4)) for n in range(layers)} | {"other": jnp.ones((3, 3, 2, 5))}
        convs = {name: oj.Conv((6, 6), padding="CIRCULAR") for name in params}
        return str(jax.make_jaxpr(lambda p: oj.constrain(p, 1.0, convs, constraint="clip"))(params)).count("eigh[")

    assert count(12) == count(2) > 0


def test_empty_trees_and_scalar_parameters():
    tx = oj.constrain_operator_norm(1.0, {"k": oj.Conv((4, 4), padding="CIRCULAR"), "s": None})
    params = {"k": jnp.ones((3, 3, 1, 1)), "s": jnp.asarray(2.0)}
    out, _ = run(tx, params)
    assert out["s"] == 2 and oj.operator_norm(out["k"], (4, 4)) <= 1 + 1e-5
    single, _ = run(oj.constrain_operator_norm(1.0, oj.Conv((4, 4), padding="CIRCULAR")), jnp.ones((3, 3, 1, 1)))
    assert single.shape == (3, 3, 1, 1)


def test_a_box_around_a_subtree():
    """Its convs are given without the box."""
    box = lambda tree: linen.Partitioned(tree, names=(None,))
    params = {"m": box({"k": jnp.ones((3, 3, 1, 1)), "b": jnp.ones(1)})}
    out = oj.constrain(params, 1.0, {"m": {"k": oj.Conv((4, 4), padding="CIRCULAR"), "b": None}})
    assert jax.tree.structure(out) == jax.tree.structure(params)
    assert oracle.dense_singular_values(out["m"].value["k"], (4, 4))[0] <= 1 + 1e-6


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax, oracle, opnorm_jax as oj
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

explicit = sys.argv[1] == "explicit"
mesh = jax.make_mesh((4, 2), ("x", "y"), **({} if explicit else {"axis_types": (AxisType.Auto,) * 2}))
flat = jax.make_mesh((8,), ("d",), **({} if explicit else {"axis_types": (AxisType.Auto,)}))
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
conv, stacked = oj.Conv((6, 6), padding="SAME"), oj.Conv((6, 6), padding="SAME", stacked=1)
draw = lambda n, *shape: 30 * jax.random.normal(jax.random.key(n), shape)
host = {
    "taps": draw(0, 4, 2, 8, 16), "in": draw(1, 3, 3, 8, 16), "out": draw(2, 3, 3, 8, 16), "both": draw(3, 3, 3, 8, 16),
    "stack": draw(4, 4, 3, 3, 8, 16), "whole": draw(5, 3, 3, 8, 16), "bias": draw(6, 16),
}
specs = {
    "taps": ("x", "y"), "in": (None, None, "y"), "out": (None, None, None, ("x", "y")),
    "both": (None, None, "y", "x"), "stack": ("x", None, None, "y"), "whole": (), "bias": ("x",),
}
params = {name: put(array, *specs[name]) for name, array in host.items()}
convs = {name: {"bias": None, "stack": stacked}.get(name, conv) for name in params}
typed = lambda tree: jax.tree.map(lambda a: str(jax.typeof(a)), tree)  # explicit shardings are part of it
for constraint, every, execution in [
    ("rescale", 1, oj.Execution()),
    ("rescale", 2, oj.Execution(factorization="products")),
    ("clip", 2, oj.Execution()),
]:
    tx = oj.constrain_operator_norm(
        1.0, convs, constraint=constraint, every=every, log_norms=True, execution=execution
    )
    want, want_state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, host), tx.init(host), host)
    state = tx.init(params)
    where = jax.tree.map(lambda p: p.sharding, params)
    jitted = jax.jit(tx.update, **({} if explicit else {"out_shardings": (where, None)}))
    moves, new = jitted(jax.tree.map(jnp.zeros_like, params), state, params)
    assert typed(new) == typed(state), (typed(new), typed(state))
    assert typed(moves) == typed(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim), moves, params)))
    jax.tree.map(lambda m, w: np.testing.assert_allclose(m, w, atol=1e-4), moves, want)
    jax.tree.map(lambda m, w: np.testing.assert_allclose(m, w, rtol=1e-5), new.norms, want_state.norms)
    if constraint == "rescale":
        out = jax.device_get(optax.apply_updates(params, moves))
        for name in ("in", "both"):
            norm = oracle.dense_singular_values(np.asarray(out[name], np.float64), (6, 6), padding="SAME")[0]
            assert 0.9 < norm <= 1 + 4e-7, (name, norm)
    print(constraint, every, execution.factorization, "same")
# The frequencies divided among the devices.
execution = oj.Execution(mesh=flat)
divided = jax.jit(lambda p: oj.constrain(p, 1.0, convs, execution=execution))(host)
jax.tree.map(lambda m, w: np.testing.assert_allclose(m, w, atol=1e-5), divided, oj.constrain(host, 1.0, convs))
# On the very mesh on which the parameters lie.
execution = oj.Execution(mesh=mesh)
tx = oj.constrain_operator_norm(1.0, convs, every=2, execution=execution)
moves, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
want, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, host), tx.init(host), host)
jax.tree.map(lambda m, w: np.testing.assert_allclose(m, w, atol=1e-4), moves, want)
print("all the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["explicit", "auto"])
def test_kernels_sharded_on_any_axis_of_eight_devices(axes):
    """The same updates, where the parameters are and typed as they are; also with the frequencies divided."""
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    out = subprocess.run([sys.executable, "-c", MESHES, axes], env=env, capture_output=True, text=True, timeout=500)
    assert "all the same" in out.stdout, out.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["project", "clip", "rescale"])
@pytest.mark.parametrize("size", [0.5, 2.0])
def test_logged_norms_are_those_before_the_constraint(constraint, size):
    """Of a kernel inside too, which needs no norm to be left as it is."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 3))
    conv = oj.Conv((6, 6))
    kernel = kernel * (size / oj.operator_norm_upper_bound(kernel))
    tx = oj.constrain_operator_norm(1.0, {"k": conv}, constraint=constraint, log_norms=True)
    zero = {"k": jnp.zeros_like(kernel)}
    _, state = tx.update(zero, tx.init({"k": kernel}), {"k": kernel})
    (logged,) = jax.tree.leaves(state.norms)
    bounds = oj.operator_norm_bounds(kernel, conv)
    assert bounds.lower <= logged * (1 + 1e-5) and logged <= bounds.upper * (1 + 1e-5)
