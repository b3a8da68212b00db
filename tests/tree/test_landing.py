"""The bound holds after ``apply_updates``, from however far outside, in every dtype; and nothing is lost on the way."""

import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import opnorm_jax as oj
from opnorm_jax._kernel import constrain, inside
from opnorm_jax._rounding import rounding
from opnorm_jax._tree import landing, transform

CONV = oj.Conv((6, 6), padding="SAME")
CIRCLE = (7, 7)  # a circular convolution at this size bounds the layer: its circulant embedding
KERNEL = np.random.default_rng(0).standard_normal((3, 3, 4, 5))
KERNEL /= oracle.dense_singular_values(KERNEL, CIRCLE)[0]
DTYPES = ["bfloat16", "float16", "float32", "float64"]
SIZES = [1e-30, 1e-3, 1.0, 1.01, 1.5, 3.0, 10.0, 100.0, 1e3, 1e4, 1e7, 1e10, 1e17, 1e30]


def scaled(size, dtype):
    """The kernel with a norm of ``size``; None where the dtype cannot hold it."""
    if size > 0.5 * float(jnp.finfo(dtype).max) or size < float(jnp.finfo(dtype).smallest_normal):
        return None
    return jnp.asarray((KERNEL * size).astype(jnp.dtype(dtype)))


@functools.cache
def compiled(constraint, every=1):
    tx = oj.constrain_operator_norm(1.0, {"k": CONV}, constraint=constraint, every=every)
    return tx, jax.jit(tx.update)


def step(constraint, kernel, update, every=1):
    tx, jitted = compiled(constraint, every)
    updates, _ = jitted({"k": update}, tx.init({"k": kernel}), {"k": kernel})
    assert updates["k"].dtype == jnp.promote_types(kernel.dtype, update.dtype)
    return optax.apply_updates({"k": kernel}, updates)["k"]


def check(kernel, bound=1.0):
    """Both certificates, the library's and the oracle's."""
    limit = bound * (1 + 4 * float(jnp.finfo(kernel.dtype).eps))
    assert oracle.dense_singular_values(np.asarray(kernel, np.float64), CIRCLE)[0] <= limit
    assert oj.operator_norm_bounds(kernel, CONV).upper <= limit


def finest_step(kernel):
    """The smallest distance from 0 that an update in the kernel's dtype can leave an entry at."""
    flat = np.abs(np.asarray(kernel).ravel())
    return float(np.min([x - np.nextafter(x, np.zeros_like(x)) if x else x for x in flat], initial=np.inf))


QUICK = {("bfloat16", 100.0), ("bfloat16", 1e3), ("float32", 1.5), ("float32", 1e7)}
TABLE = [
    pytest.param(
        constraint, dtype, size, marks=[] if constraint == "rescale" and (dtype, size) in QUICK else pytest.mark.slow
    )
    for constraint in ("rescale", "project")
    for dtype in DTYPES
    for size in SIZES
    if scaled(size, dtype) is not None
]


@pytest.mark.parametrize("constraint, dtype, size", TABLE)
def test_bound_holds_from_any_distance(constraint, dtype, size):
    with jax.enable_x64(dtype == "float64"):
        kernel = scaled(size, dtype)
        pure = oj.constrain({"k": kernel}, 1.0, {"k": CONV}, constraint=constraint)["k"]
        check(pure)
        assert pure.dtype == kernel.dtype and pure.any()
        # What is possible, by NumPy: some entry can be set to something other than 0 inside the ball.
        possible = finest_step(kernel) <= 0.5
        for share in (-0.4, 0.5, 0):
            out = step(constraint, kernel, (share * np.asarray(kernel, np.float64)).astype(kernel.dtype))
            check(out)
            assert np.asarray(out, np.float64).any() or not possible, share
        if size in (1.01, 1.5):  # within a factor of two of the target, an update loses nothing
            if constraint == "rescale":
                np.testing.assert_array_equal(out, pure)
            assert oracle.dense_singular_values(np.asarray(out, np.float64), CIRCLE)[0] > 0.98
        np.testing.assert_array_equal(step(constraint, out, 0 * kernel), out)  # once inside, it stays as it is


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bfloat16-100", "bfloat16-1000", "float32-1e7", "float32-1e10", "float16-1e4"])
def test_far_outside_is_not_zero(case):
    dtype, size = case.split("-")
    kernel = scaled(float(size), dtype)
    for constraint in ("rescale", "project"):
        for seed in range(5):
            mixed = jax.random.permutation(jax.random.key(seed), kernel, axis=0, independent=True)
            out = step(constraint, mixed, 0 * mixed)
            check(out)
            assert out.any()


def test_where_nothing_else_is_in_reach_it_is_zero():
    kernel = jnp.full((3, 3, 4, 5), 1e20)
    out = step("rescale", kernel, 0 * kernel)
    assert not out.any()
    mixed = kernel.at[1, 1, 2, 3].set(0.0)  # this entry can still be set to anything
    out = step("rescale", mixed, 0 * mixed)
    check(out)
    assert out[1, 1, 2, 3] == 0.5 and jnp.sum(out != 0) == 1
    tx = oj.constrain_operator_norm(1e-10, {"k": CONV})  # also to less than the unit of rounding of 1
    updates, _ = tx.update({"k": 0 * mixed}, tx.init({"k": mixed}), {"k": mixed})
    out = mixed + updates["k"]
    assert out[1, 1, 2, 3] == np.float32(5e-11) and jnp.sum(out != 0) == 1


@pytest.mark.parametrize("size", [0.5, 1.5, 30.0])
@pytest.mark.parametrize("dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])])
def test_clip_is_the_clip_of_the_sum(dtype, size, x64):
    """It has no bound to keep: what p + u rounds to is all that may differ."""
    kernel = scaled(size, dtype)
    update = (0.1 * np.asarray(kernel, np.float64)).astype(kernel.dtype)
    out = np.asarray(step("clip", kernel, update), np.float64)
    total = np.asarray(optax.apply_updates(kernel, jnp.asarray(update)), np.float64)
    want = oracle.paper_clip(total, CIRCLE, 1.0) if size > 1 else total
    half_unit = 0.5 * float(jnp.finfo(dtype).eps) * np.maximum(np.abs(np.asarray(kernel, np.float64)), np.abs(want))
    wide = 1e-5 if dtype != "float64" else 1e-12
    assert (np.abs(out - want) <= 2 * half_unit + wide).all()


@pytest.mark.parametrize("constraint", ["rescale", pytest.param("project", marks=pytest.mark.slow)])
def test_every_third_step(constraint):
    """Steps in between pass; those acted on hold the bound, though the kernel was thrown far out before."""
    tx, jitted = compiled(constraint, 3)
    params = {"k": scaled(10.0, "float32")}
    state = tx.init(params)
    for n in range(7):
        updates, state = jitted({"k": 1e3 * jnp.ones_like(params["k"])}, state, params)
        params = optax.apply_updates(params, updates)
        if n % 3 == 0:
            check(params["k"])
        else:
            assert oj.operator_norm(params["k"], CONV) > 100


@pytest.mark.parametrize("constraint", ["rescale", pytest.param("project", marks=pytest.mark.slow), "clip"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25, 3e38], ids=str)
def test_a_step_that_went_astray_spoils_no_later_one(constraint, bad):
    """The state holds nothing of it: from good parameters the next step is what it would have been."""
    tx = oj.constrain_operator_norm(1.0, {"k": CONV}, constraint=constraint, log_norms=True)
    update, kernel = jax.jit(tx.update), scaled(3.0, "float32")
    good, _ = update({"k": 0 * kernel}, tx.init({"k": kernel}), {"k": kernel})
    astray, state = update({"k": 0 * kernel + bad}, tx.init({"k": kernel}), {"k": kernel})
    if not np.isfinite(bad):
        assert jnp.isnan(astray["k"]).all()
    again, state = update({"k": 0 * kernel}, state, {"k": kernel})
    np.testing.assert_array_equal(again["k"], good["k"])
    assert state.norms["k"] == pytest.approx(3, rel=1e-5) and state.count == 2


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.scale(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"k": True, "b": False}),
    "partition": lambda tx: optax.partition({"conv": tx, "rest": optax.set_to_zero()}, {"k": "conv", "b": "rest"}),
    "multi_steps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param(w, marks=pytest.mark.slow) if w in ("alone", "chain") else w
        for w in (*WRAPPERS, "inject_hyperparams")
    ],
)
@pytest.mark.parametrize("constraint", ["rescale", pytest.param("project", marks=pytest.mark.slow)])
def test_bound_holds_in_wrappers(constraint, wrapper, dtype):
    params = {"k": scaled(30.0, dtype), "b": jnp.zeros(5)}
    options = {"constraint": constraint, "convs": {"k": CONV, "b": None}}
    with jax.numpy_dtype_promotion("standard"):  # the wrappers promote
        if wrapper == "inject_hyperparams":
            tx = optax.inject_hyperparams(oj.constrain_operator_norm)(max_norm=1.0, **options)
        else:
            tx = WRAPPERS[wrapper](oj.constrain_operator_norm(1.0, **options))
        updates, _ = jax.jit(tx.update)(jax.tree.map(lambda p: 0.1 * p, params), tx.init(params), params)
        out = optax.apply_updates(params, updates)
    check(out["k"])
    assert out["k"].dtype == jnp.dtype(dtype) and out["k"].any()


@pytest.mark.slow
@pytest.mark.parametrize("of_update", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("of_kernel", ["bfloat16", "float16", "float32"])
def test_updates_of_another_dtype(of_kernel, of_update):
    """Narrower updates come back in the kernel's dtype, which alone can carry it inside."""
    with jax.numpy_dtype_promotion("standard"):
        for size in (1.5, 100.0, 1e4):
            kernel = scaled(size, of_kernel)
            check(step("rescale", kernel, jnp.zeros(kernel.shape, of_update)))


@pytest.mark.parametrize("constraint", ["rescale", pytest.param("project", marks=pytest.mark.slow), "clip"])
def test_bounds_that_a_schedule_takes_to_zero_and_below(constraint):
    schedule = lambda count: jnp.asarray([1.0, 0.0, -1.0, jnp.nan, jnp.inf])[count]
    tx = oj.constrain_operator_norm(schedule, {"k": CONV, "small": CONV}, constraint=constraint)
    update, state = jax.jit(tx.update), tx.init({"k": KERNEL, "small": KERNEL})
    kernels = {"k": scaled(3.0, "float32"), "small": scaled(1e-6, "float32")}
    outs = []
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.zeros_like, kernels), state, kernels)
        outs.append(optax.apply_updates(kernels, updates))
    kept, zero, negative, nan, unbounded = outs
    assert (kept["k"] * kernels["k"]).sum() > 0 and (kept["small"] == kernels["small"]).all()
    assert not zero["k"].any() and not zero["small"].any()
    for out in (negative, nan):
        assert jnp.isnan(out["k"]).all() and jnp.isnan(out["small"]).all()
    assert (unbounded["k"] == kernels["k"]).all() and (unbounded["small"] == kernels["small"]).all()


@pytest.mark.parametrize("bound", [1e-30, 1e30])
def test_bounds_of_any_size(bound):
    kernel = scaled(1.0, "float32")
    out = oj.constrain({"k": kernel * 3 * bound}, bound, {"k": CONV})["k"]
    check(np.asarray(out, np.float64) / bound)
    assert oracle.dense_singular_values(np.asarray(out, np.float64) / bound, CIRCLE)[0] > 0.999


@pytest.mark.parametrize("name", ["subnormal kernel", "subnormal bound", "largest kernel"])
@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "float32"])
def test_edges_of_the_range(name, dtype):
    info = jnp.finfo(dtype)
    size, bound = {
        "subnormal kernel": (float(info.smallest_normal), 1.0),
        "subnormal bound": (1.0, float(info.smallest_normal) / 4),
        "largest kernel": (float(info.max) * 2, 1.0),
    }[name]
    kernel = scaled(size, dtype) if name != "largest kernel" else jnp.full((3, 3, 4, 5), info.max, dtype)
    tx = oj.constrain_operator_norm(bound, {"k": CONV})
    updates, _ = jax.jit(tx.update)({"k": 0 * kernel}, tx.init({"k": kernel}), {"k": kernel})
    out = np.asarray(optax.apply_updates(kernel, updates["k"]), np.float64)
    smallest = float(info.smallest_subnormal) * KERNEL.size  # below the normal numbers eps is an absolute error
    assert oracle.dense_singular_values(out, CIRCLE)[0] <= bound * (1 + 4 * float(info.eps)) + smallest
    if name == "subnormal kernel":
        assert not updates["k"].any()


@pytest.fixture
def norms_taken(monkeypatch):
    """Counts, while it runs, how often a norm is computed on a whole grid."""
    counts = []

    def counting(kernel, *args):
        jax.debug.callback(lambda: counts.append(1))
        return original(kernel, *args)

    original = inside.circular_norm
    jax.clear_caches()  # of functions traced without the counting
    for module in (inside, constrain):
        monkeypatch.setattr(module, "circular_norm", counting)

    def count(function, *args):
        counts.clear()
        jax.block_until_ready(function(*args))
        jax.effects_barrier()
        return len(counts)

    yield count
    jax.clear_caches()


@pytest.mark.parametrize("constraint", ["rescale", pytest.param("clip", marks=pytest.mark.slow)])
def test_inside_costs_only_the_certificate(constraint, norms_taken):
    conv = oj.Conv((24, 24), padding="CIRCULAR")
    kernel = {"k": jnp.asarray(KERNEL, jnp.float32)}

    def run(bound, log_norms=False):
        tx = oj.constrain_operator_norm(bound, {"k": conv}, constraint=constraint, log_norms=log_norms)
        return jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, kernel), tx.init(kernel), kernel)

    assert norms_taken(run, 10.0) == 0
    assert norms_taken(run, 10.0, True) == 1
    if constraint == "rescale":
        assert norms_taken(run, 0.5) == 1
    updates, state = run(10.0)
    assert state.norms is None and not updates["k"].any()
    _, state = run(10.0, True)
    assert state.norms["k"] == pytest.approx(float(oj.operator_norm(kernel["k"], conv)), rel=1e-5)


@pytest.mark.parametrize("geometry", range(6))
def test_the_bound_from_taps_alone(geometry):
    """At least the norm of every padding, and within a small factor of it for one entry."""
    rng = np.random.default_rng(geometry)
    groups, taps = [(1, (3, 3)), (2, (3,)), (1, (1, 5)), (3, (2, 2)), (1, (4,)), (2, (3, 1))][geometry]
    kernel = rng.standard_normal((*taps, 2, 3 * groups)) * 10.0 ** rng.integers(-20, 20)
    shape = (5,) * len(taps)
    conv = oj.Conv(shape, padding="CIRCULAR", feature_group_count=groups)
    bound = float(landing.norm_bound(jnp.asarray(kernel, jnp.float32), conv))
    for options in ({}, {"padding": "SAME"}, {"strides": 2, "padding": "SAME"}):
        assert oracle.dense_singular_values(kernel, shape, feature_group_count=groups, **options)[0] <= bound
    one = np.zeros_like(kernel)
    one.flat[3] = -2.0
    assert 2 <= landing.norm_bound(jnp.asarray(one, jnp.float32), conv) <= 2.001


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_without_casts_is_the_casts(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(20000) * 10.0 ** rng.integers(-9, 6, 20000)
    values = values.astype(np.float32)
    with np.errstate(over="ignore"):
        want = values.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(landing.round_to(jnp.asarray(values), dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_foreseen_is_what_apply_updates_does(dtype, x64):
    rng = np.random.default_rng(1)
    kernel = (rng.standard_normal(5000) * 10.0 ** rng.integers(-3, 4, 5000)).astype(jnp.dtype(dtype))
    target = rng.standard_normal(5000).astype(np.float64 if dtype == "float64" else np.float32)
    update = jax.jit(landing.round_update, static_argnums=2)(target, kernel, jnp.dtype(dtype))
    foreseen = jax.jit(landing.apply_update, static_argnums=2)(kernel, update, target.dtype)
    np.testing.assert_array_equal(foreseen, np.asarray(kernel + update).astype(target.dtype))
    near = (np.abs(kernel) <= 2 * np.abs(target)) & (2 * np.abs(kernel) >= np.abs(target)) & (kernel * target > 0)
    rounded = target.astype(jnp.dtype(dtype)).astype(target.dtype)
    assert near.sum() > 200
    np.testing.assert_array_equal(np.asarray(foreseen)[near], rounded[near])


@pytest.mark.slow
def test_frozen_dict_with_a_dict_of_convs():
    params = flax.core.FrozenDict(
        {"b": {"k": scaled(3.0, "float32")}, "a": {"k": jnp.ones((3, 3, 1, 1)), "bias": None}}
    )
    convs = {"a": {"k": oj.Conv((6, 6), padding="VALID"), "bias": None}, "b": {"k": CONV}}
    out = oj.constrain(params, 1.0, convs)
    assert isinstance(out, flax.core.FrozenDict)
    check(out["b"]["k"])
    assert oracle.dense_singular_values(out["a"]["k"], (6, 6), padding="VALID")[0] <= 1
    tx = oj.constrain_operator_norm({"a": 2.0, "b": 1.0}, convs, log_norms=True)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    check(optax.apply_updates(params, updates)["b"]["k"])
    assert state.norms["b"]["k"] == pytest.approx(3, rel=1e-5)


def test_stacks_and_empty_stacks():
    stack = jnp.stack([scaled(3.0, "float32"), scaled(0.1, "float32"), scaled(1e4, "float32")])
    conv = oj.Conv((6, 6), padding="SAME", stacked=1)
    params = {"full": stack, "empty": stack[:0]}
    convs = {"full": conv, "empty": conv}
    tx = oj.constrain_operator_norm(1.0, convs, log_norms=True)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for kernel in optax.apply_updates(params, updates)["full"]:
        check(kernel)
    assert not updates["full"][1].any() and state.norms["full"].shape == (3,) and state.norms["empty"].shape == (0,)
    empty = oj.constrain({"empty": stack[:0]}, 1.0, {"empty": conv})
    assert empty["empty"].shape == (0, 3, 3, 4, 5)


@pytest.mark.slow
def test_differentiable_to_first_order_outside_the_ball(x64):
    """The step acted on is the constraint of p + u, also for derivatives: rounding counts for nothing in them."""
    direction = np.random.default_rng(5).standard_normal(KERNEL.shape)
    tx = oj.constrain_operator_norm(1.0, {"k": CONV})

    def moved(kernel):
        updates, _ = tx.update({"k": jnp.zeros_like(kernel)}, tx.init({"k": kernel}), {"k": kernel})
        return kernel + updates["k"]

    kernel = jnp.asarray(3 * KERNEL)
    value, tangent = jax.jvp(moved, (kernel,), (direction,))
    want, want_tangent = jax.jvp(lambda k: oj.rescale_operator_norm(k, CONV, 1.0), (kernel,), (direction,))
    np.testing.assert_allclose(value, want, atol=1e-12)
    np.testing.assert_allclose(tangent, want_tangent, atol=1e-9)
    pulled = jax.vjp(moved, kernel)[1](direction)[0]
    np.testing.assert_allclose(
        pulled, jax.vjp(lambda k: oj.rescale_operator_norm(k, CONV, 1.0), kernel)[1](direction)[0], atol=1e-9
    )


def test_landing_leaves_room_for_the_rounding_of_a_norm(monkeypatch):
    """Where a target is to land is below the bound by twice what a computed norm may be off."""
    original, limits = transform.find_scale, []

    def record(target, reach, conv, bound, limit):
        jax.debug.callback(lambda limit: limits.append(float(limit)), limit)
        return original(target, reach, conv, bound, limit)

    monkeypatch.setattr(transform, "find_scale", record)
    kernel = jnp.full((3, 2, 4, 5), 7.0)  # of a shape that nothing else has, so that it is traced here
    jax.block_until_ready(oj.constrain({"k": kernel}, 1.0, {"k": CONV}))
    jax.effects_barrier()
    (limit,) = limits
    assert limit <= (1 + 2 * np.finfo(np.float32).eps) * (1 - 1.9 * rounding(kernel.shape, np.float32))
