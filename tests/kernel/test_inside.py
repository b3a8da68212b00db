"""Cheap certificates that a kernel is inside: never given to one that is not, and no factorisation where given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import THOROUGH
from geometries import generate

import opnorm_jax as oj
from opnorm_jax._blocks import factor
from opnorm_jax._conv import canonical_kernel
from opnorm_jax._execution import Execution
from opnorm_jax._geometry import coarse_plan, resolve
from opnorm_jax._kernel import inside
from opnorm_jax._kernel.norm import circular_norm

RATIOS = np.float32([0.3, 0.7, 0.9, 0.99, 1 - 1e-5, 1 + 1e-5, 1.2, 1.5, 1.9, 3])
LARGE = [
    ((3, 3, 6, 6), oj.Conv((16, 16), padding="CIRCULAR")),
    ((3, 3, 5, 8), oj.Conv((17, 12), padding="SAME", strides=2)),
    ((5, 3, 8, 4), oj.Conv((24, 9), padding="VALID", kernel_dilation=2)),
    ((4, 4, 5, 5), oj.Conv((10, 10), padding="SAME", input_dilation=1, strides=(2, 3))),
    ((3, 3, 3, 6), oj.Conv((8, 8), padding=((2, 2), (2, 2)), input_dilation=2)),
    ((3, 3, 2, 8), oj.Conv((12, 12), feature_group_count=2, padding="CIRCULAR")),
    ((9, 6, 7), oj.Conv((64,), padding="SAME")),
    ((5, 5, 5, 5), oj.Conv((12, 12), padding=((4, 4), (4, 4)), input_dilation=2, strides=2)),  # offsets from -2 to 0
]


@pytest.mark.parametrize("shape, conv", LARGE, ids=str)
def test_certificate_on_large_maps(shape, conv):
    """Against the norm on the circle: never certified below it, always far above; on a smaller grid than its own."""
    kernels = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    kernels[4:] = np.random.default_rng(1).standard_normal((4, *shape[:-2], 1, 1))  # rank one, one frequency on top
    kernels[6] = 0
    kernels[6][tuple(n // 2 for n in shape[:-2])] = np.eye(*shape[-2:])  # the norm is the same at every frequency
    check_certificate(kernels, conv)
    plan = resolve(conv, shape).plan
    assert np.prod(coarse_plan(plan)[0].grid) < np.prod(plan.grid)


@pytest.mark.parametrize("seed", range(120 if THOROUGH else 8))
def test_certificate_for_every_geometry(seed):
    """The same on random geometries, small maps and folding kernels among them, against dense matrices too."""
    geometry = generate(seed)
    canonical, kernels = geometry.kernels(np.random.default_rng(seed), 4)
    norms = check_certificate(kernels, geometry.conv)
    for kernel, norm in zip(canonical, norms, strict=True):
        assert geometry.oracle(kernel)[0] <= norm * (1 + 1e-5)


def check_certificate(kernels, conv):
    def one(kernel):
        canonical = canonical_kernel(kernel, conv)
        plan = resolve(conv, canonical.shape).plan
        coarse, factor = coarse_plan(plan)
        norm = circular_norm(canonical, plan, Execution())
        far = 1.01 * factor * circular_norm(canonical, coarse, Execution())
        bounds = jnp.append(norm * RATIOS, far)
        return norm, jax.vmap(lambda b: inside.certified_inside(canonical, b, plan, Execution()))(bounds)

    norms, certified = jax.jit(lambda kernels: jax.lax.map(one, kernels))(kernels)
    assert not certified[:, :-1][:, RATIOS < 1].any(), (conv, np.asarray(certified))
    assert certified[:, -1].all()
    assert certified[:, :-1][norms > 0][:, RATIOS > 1.1].all()  # at the latest on the plan's own grid
    return np.asarray(norms)


@pytest.fixture
def factorised(monkeypatch):
    """Counts the matrices of side above 4 that are factorised, Cholesky's apart, at run time."""
    counts = {"eigh": 0, "svd": 0}

    def counting(name, function):
        def wrapped(matrix, *args, **options):
            if matrix.ndim == 2:
                jax.debug.callback(lambda: counts.update({name: counts[name] + 1}))
            return function(matrix, *args, **options)

        return wrapped

    jax.clear_caches()  # of functions traced without the counting
    monkeypatch.setattr(factor, "batched_eigh", counting("eigh", factor.batched_eigh))
    monkeypatch.setattr(jnp.linalg, "svd", counting("svd", jnp.linalg.svd))

    def count(function, *args):
        counts.update(eigh=0, svd=0)
        jax.block_until_ready(jax.jit(function)(*args))
        jax.effects_barrier()
        return sum(counts.values())

    yield count
    jax.clear_caches()


@pytest.mark.parametrize("method", ["clip", "rescale", "project"])
def test_inside_takes_no_factorisation(factorised, method):
    """Nor, in a batch, for those that are inside."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    norm = float(oj.operator_norm(kernel, (12, 12)))
    function = lambda k: getattr(oj, f"{method}_operator_norm")(k, (12, 12), 1.0)
    inside, outside = kernel / (2 * norm), kernel / (0.5 * norm)
    assert factorised(function, inside) == 0
    alone = factorised(function, outside)
    assert alone > 0
    if method != "project":  # whose loop, batched, runs for all until the last is done
        assert factorised(jax.vmap(function), np.stack([inside, outside, inside])) == alone


def test_a_norm_factorises_few(factorised):
    """74 frequencies; those below the largest are found out by Cholesky's."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    assert 1 <= factorised(lambda k: oj.operator_norm(k, (12, 12)), kernel) < 10
    stack = np.stack([kernel, 3 * kernel, kernel[::-1]])
    assert 3 <= factorised(jax.vmap(lambda k: oj.operator_norm(k, (12, 12))), stack) < 30


@pytest.mark.parametrize("method", ["clip", "rescale"])
def test_the_norm_a_transformation_reports_is_exact_inside(method):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 6, 6)), jnp.float32)
    norm = oj.operator_norm(kernel, (12, 12))
    tx = oj.constrain_operator_norm(
        3 * float(norm), {"k": oj.Conv((12, 12), padding="CIRCULAR")}, constraint=method, log_norms=True
    )
    params = {"k": kernel}
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(state.norms["k"], norm, rtol=1e-6)


@pytest.mark.parametrize("method", ["clip", "rescale"])
@pytest.mark.parametrize("channels", [(2, 3), (3, 2)], ids=str)
def test_the_norm_a_transformation_reports_has_its_derivative(method, channels, x64):
    """Outside the ball and inside, where u dA v of the dense matrix is the truth; and zero at zero."""
    rng = np.random.default_rng(0)
    kernel, direction = rng.standard_normal((2, 3, 3, *channels))
    left, values, right = np.linalg.svd(oracle.dense_matrix(kernel, (5, 5)))
    slope = left[:, 0] @ oracle.dense_matrix(direction, (5, 5)) @ right[0]

    def norm(kernel, bound):
        tx = oj.constrain_operator_norm(
            bound, {"k": oj.Conv((5, 5), padding="CIRCULAR")}, constraint=method, log_norms=True
        )
        params = {"k": kernel}
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[1].norms["k"]

    for bound in (0.5 * float(values[0]), 2 * float(values[0])):
        found, moved = jax.jvp(functools.partial(norm, bound=bound), (kernel,), (direction,))
        np.testing.assert_allclose((found, moved), (values[0], slope), rtol=1e-6)  # reported in float32
    assert jax.jvp(functools.partial(norm, bound=1.0), (0 * kernel,), (direction,)) == (0, 0)


@pytest.mark.parametrize("factorization", ["auto", "products"])
def test_every_chunk_counts(factorization):
    """One frequency is above the bound, the others far below; taken one by one."""
    kernel = np.ones((3, 3, 5, 5), np.float32)  # norm 45 at frequency 0
    execution = oj.Execution(factorization=factorization, chunk_bytes=1)
    rescaled = oj.rescale_operator_norm(kernel, (10, 10), 40.0, execution=execution)
    assert oracle.dense_singular_values(rescaled, (10, 10))[0] <= 40 * (1 + 1e-6)
    clipped = oj.clip_operator_norm(kernel, (10, 10), 40.0, execution=execution)
    np.testing.assert_allclose(clipped, oracle.paper_clip(kernel, (10, 10), 40.0), atol=1e-5)


@pytest.mark.parametrize("method", ["clip", "rescale"])
def test_small_grids_are_certified_first_only_where_that_can_end_early(method, monkeypatch):
    """With products, for one, the certificate of a small map would cost about as much as the answer."""

    def refuse(*args):
        raise AssertionError("certified")

    monkeypatch.setattr(inside, "certified_inside", refuse)
    function = getattr(oj, f"{method}_operator_norm")
    kernel = np.random.default_rng(0).standard_normal((3, 3, 5, 6)).astype(np.float32)
    products = oj.Execution(factorization="products")
    function(kernel, (4, 4), 1.0, execution=products)
    for shape, execution in (((4, 4), oj.Execution()), ((12, 12), products)):
        with pytest.raises(AssertionError, match="certified"):
            function(kernel, shape, 1.0, execution=execution)
