"""Kernels chosen to break things, drawn by hypothesis: every promise in float32 against float64 dense matrices.

Shapes come from a small pool, so that each property compiles once a shape and a case takes milliseconds. With ``-m attack``
14,000 cases run; see docs/guarantees.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import count_case, trial
from hypothesis import event, given
from hypothesis import strategies as st

import opnorm_jax as oj

POOL = [  # kernel, conv, in as few compilations as cover every branch
    ((3, 3, 3, 2), oj.Conv((6, 5), padding="CIRCULAR")),
    ((3, 3, 2, 6), oj.Conv((4, 4), strides=2, padding="CIRCULAR")),
    ((3, 3, 6, 5), oj.Conv((5, 5), padding="SAME")),
    ((2, 3, 2, 4), oj.Conv((5, 4), padding="VALID", kernel_dilation=(2, 1))),
    ((3, 3, 2, 2), oj.Conv((4, 3), padding=((1, 1), (2, 0)), input_dilation=2)),
    ((3, 3, 1, 6), oj.Conv((5, 4), padding="SAME", strides=2, feature_group_count=3)),
    ((5, 3, 4), oj.Conv((7,), padding="SAME")),
    ((2, 2, 2, 2, 2), oj.Conv((3, 3, 2), padding="CIRCULAR")),
    ((6, 5), oj.Conv(())),
]
CIRCULAR = [case for case in POOL if case[1].padding == "CIRCULAR"]
KINDS = (
    "normal",
    "rank one",
    "all equal",
    "one hot",
    "identity",
    "orthogonal",
    "zero",
    "signs",
    "ill-conditioned",
    "mixed scales",
    "cancelling",
    "one tap",
    "nearly tied",
)


def draw_kernel(kind, seed, shape):
    """Unit scale, float64."""
    rng = np.random.default_rng(seed)
    i, o = shape[-2:]
    if kind == "rank one":
        return rng.standard_normal((*shape[:-2], 1, 1)) * rng.standard_normal((i, 1)) * rng.standard_normal(o)
    if kind == "all equal":
        return np.ones(shape)
    if kind in ("one hot", "zero"):
        kernel = np.zeros(shape)
        kernel.flat[rng.integers(kernel.size)] = kind == "one hot"
        return kernel
    if kind in ("identity", "orthogonal", "nearly tied", "one tap"):  # at one tap: the same block at every frequency
        kernel = np.zeros(shape)
        matrix = rng.standard_normal((i, o))
        if kind in ("orthogonal", "nearly tied"):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            matrix = (left * (1 - 1e-5 * (kind == "nearly tied") * rng.random(values.shape))) @ right
        kernel[tuple(n // 2 for n in shape[:-2])] = np.eye(i, o) if kind == "identity" else matrix
        return kernel
    if kind == "signs":
        return rng.choice([-1.0, 0.0, 1.0], shape)
    if kind == "ill-conditioned":
        return rng.standard_normal((*shape[:-1], 1)) + 1e-6 * rng.standard_normal(shape)
    if kind == "mixed scales":
        return rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 0, shape)
    if kind == "cancelling":
        return 1e3 * (-1.0) ** np.arange(shape[0]).reshape(-1, *(1 for _ in shape[1:])) + rng.standard_normal(shape)
    return rng.standard_normal(shape)


kinds, seeds, scales = st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(-30, 30)


def truth(kernel, conv):
    if not conv.input_shape:
        return np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    return oracle.dense_singular_values(
        kernel,
        conv.input_shape,
        strides=conv.strides,
        padding=conv.padding,
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=conv.feature_group_count,
    )


@functools.cache
def compiled(function, case):
    """One of the functions below for one case of the pool, jitted."""
    return jax.jit(functools.partial(function, POOL[case][1]))


def bounds_and_norm(conv, kernel):
    return oj.operator_norm_bounds(kernel, conv), oj.operator_norm(kernel, conv)


@pytest.mark.attack
@given(case=st.integers(0, len(POOL) - 1), kind=kinds, seed=seeds, scale=scales)
@trial("certificates")
def test_bounds(case, kind, seed, scale):
    """lower <= true <= upper and the norm to 1e-5, from 1e-30 to 1e30."""
    shape, conv = POOL[case]
    kernel = (draw_kernel(kind, seed, shape) * 10.0**scale).astype(np.float32)
    true = truth(kernel, conv)[0]
    (lower, upper), norm = jax.device_get(compiled(bounds_and_norm, case)(kernel))
    assert lower <= true * (1 + 1e-14) and true <= upper * (1 + 1e-14), (lower, true, upper)
    assert abs(norm - true) <= 1e-5 * true
    assert lower <= norm * (1 + 1e-5) and norm <= upper
    event(kind)
    count_case("bounds", kind)


@pytest.mark.attack
@given(case=st.integers(0, len(POOL) - 1), kind=kinds, seed=seeds, size=st.floats(1e-45, 1e-37))
@trial("certificates")
def test_denormals(case, kind, seed, size):
    """Around the smallest normal number: never NaN, and right for the kernel without the entries below it, which count
    as zero on a CPU, or with them. Results below it may be zero too."""
    shape, conv = POOL[case]
    kernel = draw_kernel(kind, seed, shape)
    kernel = (kernel / max(np.abs(kernel).max(), 1e-300) * size).astype(np.float32)
    tiny = float(np.finfo(np.float32).tiny)
    truths = truth(kernel, conv)[0], truth(np.where(np.abs(kernel) < tiny, 0, kernel), conv)[0]
    (lower, upper), norm = jax.device_get(compiled(bounds_and_norm, case)(kernel))
    assert any(lower <= true <= upper + tiny for true in truths), (lower, truths, upper)
    assert any(abs(norm - true) <= 1e-5 * true + tiny for true in truths)
    count_case("denormals", kind)


def constrained(conv, kernel, bound):
    """Each method, and again what it gives back."""
    once = {name: getattr(oj, f"{name}_operator_norm") for name in ("clip", "rescale")}
    once = {name: function(kernel, conv, bound) for name, function in once.items()}
    once["project"] = oj.project_operator_norm(kernel, conv, bound, max_iterations=10)
    twice = oj.rescale_operator_norm(once["rescale"], conv, bound)
    return once, twice, oj.rescale_operator_norm(once["project"], conv, bound)


@pytest.mark.slow
@pytest.mark.attack
@given(case=st.integers(0, len(POOL) - 1), kind=kinds, seed=seeds, scale=scales, ratio=st.floats(0.01, 3))
@trial("certificates")
def test_inside_after_each_method(case, kind, seed, scale, ratio):
    """Certified methods end inside, as a dense matrix; a kernel inside comes back bit for bit; again changes nothing."""
    shape, conv = POOL[case]
    kernel = (draw_kernel(kind, seed, shape) * 10.0**scale).astype(np.float32)
    true = truth(kernel, conv)[0]
    bound = np.float32(ratio * true) if true > 0 else np.float32(ratio)
    once, *twice = jax.device_get(compiled(constrained, case)(kernel, bound))
    for name in ("rescale", "project"):
        assert truth(once[name], conv)[0] <= float(bound) * (1 + 4e-7), name
    circle = float(compiled(bounds_and_norm, case)(kernel)[0].upper)
    if circle <= bound:
        for name, result in once.items():
            assert result.tobytes() == kernel.tobytes(), name
    for result, again in zip((once["rescale"], once["project"]), twice, strict=True):
        assert result.tobytes() == again.tobytes()
    count_case("constrained", kind)


@pytest.mark.attack
@given(case=st.integers(0, len(CIRCULAR) - 1), kind=kinds, seed=seeds, scale=scales)
@trial("certificates")
def test_spectrum(case, kind, seed, scale):
    """All values of circular layers, to 1e-5 of the largest."""
    shape, conv = CIRCULAR[case]
    kernel = (draw_kernel(kind, seed, shape) * 10.0**scale).astype(np.float32)
    true = truth(kernel, conv)
    values = np.sort(np.ravel(compiled(lambda_of_spectrum, POOL.index(CIRCULAR[case]))(kernel)))[::-1]
    padded = np.zeros(max(len(true), len(values)))
    padded[: len(values)] = values
    assert np.abs(padded[: len(true)] - true).max() <= 1e-5 * true[0] + 1e-44
    count_case("spectrum", kind)


def lambda_of_spectrum(conv, kernel):
    return oj.singular_values(kernel, conv)


@pytest.mark.slow
@pytest.mark.attack
@given(
    case=st.integers(0, len(POOL) - 1),
    seed=seeds,
    kind=kinds,
    values=st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=4),
)
@trial("certificates")
def test_not_finite(case, seed, kind, values):
    """NaN out of every function, throughout; no exception and no hang."""
    shape, _ = POOL[case]
    kernel = draw_kernel(kind, seed, shape).astype(np.float32)
    at = np.random.default_rng(seed).integers(kernel.size, size=len(values))
    kernel.flat[at] = values
    once, *_ = compiled(constrained, case)(kernel, np.float32(1))
    for leaf in jax.tree.leaves(jax.device_get((compiled(bounds_and_norm, case)(kernel), once))):
        assert np.isnan(leaf).all()
    count_case("not finite", str(values[-1]))


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]


@pytest.mark.slow
@pytest.mark.attack
@given(
    pair=st.tuples(st.sampled_from(DTYPES), st.sampled_from([*DTYPES, float])),
    kind=kinds,
    seed=seeds,
    ratio=st.floats(0.1, 2),
)
@trial("certificates")
def test_dtype_pairs(pair, kind, seed, ratio):
    """The kernel's dtype comes back whatever the bound's; inside to 4 eps of it."""
    with jax.enable_x64(True):
        dtype, of_bound = pair
        shape, conv = POOL[2]
        kernel = jnp.asarray(draw_kernel(kind, seed, shape), dtype)
        true = truth(np.asarray(kernel, np.float64), conv)[0]
        bound = min(ratio * max(float(true), 0.5), 6e4)  # finite in float16
        bound = bound if of_bound is float else jnp.asarray(bound, of_bound)
        result = _rescale_of_any_dtype(kernel, bound)
        assert result.dtype == dtype
        limit = float(bound) * (1 + 4 * float(jnp.finfo(dtype).eps))
        assert truth(np.asarray(result, np.float64), conv)[0] <= limit
    count_case("dtype pairs", f"{jnp.dtype(dtype).name}, {getattr(of_bound, '__name__', of_bound)}")


@jax.jit
def _rescale_of_any_dtype(kernel, bound):
    return oj.rescale_operator_norm(kernel, POOL[2][1], bound)


@pytest.mark.attack
@given(bad=st.integers(0, 2), seed=seeds, value=st.sampled_from([np.nan, np.inf]))
@trial("certificates")
def test_not_finite_stays_in_its_layer(bad, seed, value):
    """Two of the three layers share one batched call."""
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal((3, 3, 2, 3)).astype(np.float32) for name in "ab"}
    params["c"] = rng.standard_normal((3, 3, 1, 2)).astype(np.float32)
    clean = jax.device_get(_constrain(params))
    name = "abc"[bad]
    params[name] = params[name].copy()
    params[name].flat[rng.integers(params[name].size)] = value
    dirty = jax.device_get(_constrain(params))
    assert np.isnan(dirty[name]).all()
    for other in set("abc") - {name}:
        np.testing.assert_array_equal(dirty[other], clean[other])
    count_case("one layer not finite", str(value))


@jax.jit
def _constrain(params):
    return oj.constrain(
        params,
        1.0,
        {
            "a": oj.Conv((5, 5), padding="CIRCULAR"),
            "b": oj.Conv((5, 5), padding="CIRCULAR"),
            "c": oj.Conv((4, 4), padding="CIRCULAR"),
        },
        constraint="clip",
    )


def test_empty_trees():
    """A tree without a single Conv is a mistake, named as such; empty subtrees beside one are not."""
    for params, convs in (({}, {}), ({"a": {}}, {"a": {}}), ({"bias": jnp.ones(3)}, {"bias": None})):
        with pytest.raises(ValueError, match="no Conv at all"):
            oj.constrain(params, 1.0, convs)
        with pytest.raises(ValueError, match="no Conv at all"):
            oj.constrain_operator_norm(1.0, convs)
    params = {"a": {}, "k": jnp.ones((3, 3, 1, 1)), "b": []}
    convs = {"a": {}, "k": oj.Conv((4, 4), padding="CIRCULAR"), "b": []}
    assert jax.tree.structure(oj.constrain(params, 1.0, convs)) == jax.tree.structure(params)
    tx = oj.constrain_operator_norm(1.0, convs, every=2)
    updates, state = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params) and state.count == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int64])
def test_unsigned_input_shapes(dtype):
    """NumPy integers of any kind: no wrap-around in any of the arithmetic of shapes."""
    sizes = dtype(5), dtype(6)
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
    for options in ({}, {"padding": "SAME", "strides": dtype(2)}, {"padding": ((dtype(1), dtype(0)), (0, 1))}):
        padding = options.get("padding", "SAME")
        padding = padding if isinstance(padding, str) else ((1, 0), (0, 1))
        plain = {"padding": padding, "strides": int(options.get("strides", 1))}
        conv = oj.Conv(sizes, **options)
        assert conv == oj.Conv((5, 6), **plain)
        true = oracle.dense_singular_values(kernel, (5, 6), **plain)[0]
        lower, upper = oj.operator_norm_bounds(kernel, conv)
        assert lower <= true <= upper


@pytest.mark.parametrize("shape", [(3, 3, 0, 2), (3, 3, 2, 0), (0, 3, 2, 2), (), (3,)], ids=str)
def test_zero_sized_and_0_d(shape):
    """An error that says so, from each function."""
    kernel = jnp.zeros(shape)
    for function in (oj.singular_values, oj.operator_norm, oj.operator_norm_bounds):
        with pytest.raises(ValueError, match="expected"):
            function(kernel, (4, 4))
    for function in (oj.clip_operator_norm, oj.rescale_operator_norm, oj.project_operator_norm):
        with pytest.raises(ValueError, match="expected"):
            function(kernel, (4, 4), 1.0)
