"""clip, project, rescale: feasibility, nearness against independent solvers, bit-identity inside, derivatives."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from conftest import THOROUGH
from geometries import generate

import opnorm_jax as oj
from opnorm_jax._kernel import newton

FUNCTIONS = {
    "clip": oj.clip_operator_norm,
    "project": oj.project_operator_norm,
    "rescale": oj.rescale_operator_norm,
}
CERTIFIED = ("project", "rescale")


def random_kernel(shape, seed=0, norm=None, image=None):
    kernel = np.random.default_rng(seed).standard_normal(shape)
    if norm is not None:
        kernel *= norm / oracle.dense_singular_values(kernel, image)[0]
    return kernel.astype(np.float32)


def dykstra(kernel, image, bound, steps):
    """The nearest kernel by Dykstra's algorithm, in float64 by NumPy's FFT: slow, independent of the library."""
    k = kernel.shape[:2]
    x = np.zeros((*image, *kernel.shape[2:]))
    x[: k[0], : k[1]] = kernel
    mask = np.zeros((*image, 1, 1))
    mask[: k[0], : k[1]] = 1
    correction = np.zeros_like(x)
    for _ in range(steps):
        left, values, right = np.linalg.svd(np.fft.fft2(x + correction, axes=[0, 1]), full_matrices=False)
        clipped = np.fft.ifft2((left * np.minimum(values, bound)[..., None, :]) @ right, axes=[0, 1]).real
        correction = x + correction - clipped
        x = clipped * mask  # a subspace: its own correction is orthogonal to it and drops out
    return x[: k[0], : k[1]]


def test_options_may_be_numpys():
    kernel = np.ones((3, 3, 1, 1), np.float32)
    plain = oj.project_operator_norm(kernel, (8, 8), 1.0, tolerance=0.125, max_iterations=9)
    given = oj.project_operator_norm(kernel, (8, 8), 1.0, tolerance=np.float32(0.125), max_iterations=np.int64(9))
    np.testing.assert_array_equal(plain, given)


@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (3, 3, 3, 2), (3, 4, 2, 2), (2, 3, 4, 4), (1, 1, 3, 3), (5, 5, 1, 2)])
@pytest.mark.parametrize("image", [(8, 8), (6, 9)], ids=str)
def test_clip_is_the_papers(shape, image):
    kernel = random_kernel(shape)
    bound = 0.6 * oracle.dense_singular_values(kernel, image)[0]
    got = jax.jit(lambda k: oj.clip_operator_norm(k, image, bound))(kernel)
    np.testing.assert_allclose(got, oracle.paper_clip(kernel, image, bound), atol=1e-5 * np.abs(kernel).max())


def test_clip_is_the_papers_in_float64(x64):
    kernel = np.random.default_rng(0).standard_normal((3, 3, 4, 3))
    got = oj.clip_operator_norm(kernel, (8, 8), 2.0)
    np.testing.assert_allclose(got, oracle.paper_clip(kernel, (8, 8), 2.0), atol=1e-13)


@pytest.mark.slow
def test_clip_overshoots_and_the_others_do_not():
    kernel = random_kernel((3, 3, 16, 16), norm=2.01, image=(8, 8))
    norms = {name: oracle.dense_singular_values(f(kernel, (8, 8), 1.0), (8, 8))[0] for name, f in FUNCTIONS.items()}
    assert norms["clip"] > 1.15
    assert norms["project"] <= 1 + 1e-6 and norms["rescale"] <= 1 + 1e-6
    assert norms["rescale"] > 1 - 1e-4


def test_kernel_larger_than_the_image_is_clipped_exactly():
    """All frequencies are reached by the taps, so nothing is lost on the way back."""
    kernel = random_kernel((3, 3, 2, 2))
    for f in (oj.clip_operator_norm, functools.partial(oj.project_operator_norm, tolerance=1e-6)):
        clipped = f(kernel, (2, 2), 1.0)
        np.testing.assert_allclose(oracle.dense_singular_values(clipped, (2, 2))[0], 1, rtol=2e-5)


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_inside_comes_back_bit_for_bit(method, padding, dtype):
    conv = oj.Conv((6, 6), padding=padding)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4)).astype(dtype).at[0, 0, 0, 0].set(-0.0)
    norm = oj.operator_norm_bounds(kernel, (7, 7) if padding == "SAME" else (6, 6)).lower
    function = jax.jit(FUNCTIONS[method], static_argnums=1)
    for bound in (norm, norm * 2, jnp.inf):
        out = function(kernel, conv, bound)
        assert out.dtype == kernel.dtype
        assert np.asarray(out).tobytes() == np.asarray(kernel).tobytes()
    assert not (function(kernel, conv, norm * 0.9) == kernel).all()
    zero = jnp.zeros_like(kernel)
    assert (function(zero, conv, 1.0) == 0).all()


@pytest.mark.parametrize("seed", range(16))
def test_certified_for_every_geometry(seed):
    """Oracle's norm <= bound for the padding really used; and doing it twice is doing it once, bit for bit."""
    geometry = generate(seed + 500)
    canonical, kernels = geometry.kernels(np.random.default_rng(seed), 1)
    letters = {1: "W", 2: "HW", 3: "DHW"}[len(geometry.taps)] + "IO"
    true = geometry.oracle(canonical[0])[0]
    for method in CERTIFIED:
        function = jax.jit(FUNCTIONS[method], static_argnums=1)
        out = function(kernels[0], geometry.conv, np.float32(0.5 * true))
        back = np.asarray(out).transpose([geometry.conv.kernel_layout.index(letter) for letter in letters])
        assert geometry.oracle(back)[0] <= 0.5 * true * (1 + 1e-6)
        again = function(out, geometry.conv, np.float32(0.5 * true))
        assert np.asarray(again).tobytes() == np.asarray(out).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("method", CERTIFIED)
def test_bound_in_every_dtype(method, dtype, x64):
    for seed in range(4):
        kernel = jax.random.normal(jax.random.key(seed), (3, 3, 8, 8), jnp.float32).astype(dtype)
        out = FUNCTIONS[method](kernel, oj.Conv((8, 8), padding="SAME"), 1.0)
        assert out.dtype == kernel.dtype
        norm = oracle.dense_singular_values(np.asarray(out, np.float64), (8, 8), padding="SAME")[0]
        assert norm <= 1 + 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("shape, image, norm", [((3, 3, 2, 2), (6, 6), 2.0), ((3, 3, 2, 4), (5, 7), 1.5)])
def test_nearest_agrees_with_dykstra(shape, image, norm):
    kernel = random_kernel(shape, norm=norm, image=image)
    want = dykstra(kernel.astype(np.float64), image, 1.0, 3000)
    got, info = oj.project_operator_norm_info(kernel, image, 1.0, tolerance=1e-5, max_iterations=3000)
    distance = np.linalg.norm(want - kernel)
    np.testing.assert_allclose(np.linalg.norm(got - kernel), distance, rtol=1e-3)
    np.testing.assert_allclose(info.distance, distance, rtol=1e-3)
    assert np.linalg.norm(got - want) <= 1e-2 * distance


@pytest.mark.slow
def test_nearest_agrees_with_dykstra_closely_in_float64(x64):
    kernel = random_kernel((3, 3, 2, 3), norm=2.0, image=(6, 6)).astype(np.float64)
    want = dykstra(kernel, (6, 6), 1.0, 20000)
    got, info = oj.project_operator_norm_info(kernel, (6, 6), 1.0, tolerance=1e-9, max_iterations=20000)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.linalg.norm(want - kernel))
    assert info.gap <= 1e-9 * info.distance


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(2, 3), (3, 2)], ids=str)
def test_nearest_where_taps_fold(channels, x64):
    """Four taps on two pixels an axis: nearest is to move each of a pixel's four by a quarter of what a clip moves it."""
    kernel = np.random.default_rng(0).standard_normal((4, 4, *channels))
    folded = kernel.reshape(2, 2, 2, 2, *channels).sum((0, 2))
    bound = 0.3 * oracle.dense_singular_values(kernel, (2, 2))[0]
    want = kernel + np.tile((oracle.paper_clip(folded, (2, 2), bound) - folded) / 4, (2, 2, 1, 1))
    got, info = oj.project_operator_norm_info(kernel, (2, 2), bound, tolerance=1e-6)
    distance = np.linalg.norm(want - kernel)
    assert distance * (1 - 1e-12) <= info.distance <= distance * (1 + 1e-6) and 0 <= info.gap <= 1e-6 * distance
    assert np.linalg.norm(got - want) <= 1.5e-3 * distance  # sqrt(2e-6): what is that near is no further from it


@pytest.mark.slow
def test_nearer_than_every_other_route_with_a_certificate():
    """16 to 16 channels, 3x3 on 16x16, from norm 2.01 to 1: scaling, clipping once or 30 times, Dykstra's 100 steps."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    kernel *= np.float32(2.01 / oracle.paper_singular_values(kernel, (16, 16)).max())

    def feasible(k):
        return k / max(1, oracle.paper_singular_values(k, (16, 16)).max())

    alternating = kernel
    for _ in range(30):
        alternating = oracle.paper_clip(alternating, (16, 16), 1.0)
    rivals = [feasible(k) for k in (kernel, oracle.paper_clip(kernel, (16, 16), 1.0), alternating)]
    rivals.append(feasible(dykstra(kernel.astype(np.float64), (16, 16), 1.0, 100)))
    out, info = oj.project_operator_norm_info(kernel, (16, 16), 1.0)
    distance = np.linalg.norm(out - kernel)
    assert distance < min(np.linalg.norm(rival - kernel) for rival in rivals)
    assert 0 <= info.gap <= 1e-3 * info.distance and info.iterations <= 20
    np.testing.assert_allclose(info.distance, distance, rtol=1e-5)
    np.testing.assert_allclose(info.norm, 2.01, rtol=1e-5)


def test_bound_holds_when_the_iterations_run_out():
    kernel = random_kernel((3, 3, 8, 8), norm=5, image=(8, 8))
    out, info = oj.project_operator_norm_info(kernel, (8, 8), 1.0, max_iterations=1, tolerance=1e-9)
    assert oracle.dense_singular_values(out, (8, 8))[0] <= 1 + 1e-6
    assert info.iterations == 1 and info.gap > 0


@pytest.mark.slow
@pytest.mark.parametrize("drift", [3e-3, 1e-2])
def test_few_iterations_after_a_small_change_of_a_projected_kernel(drift):
    """The way a training step moves it: the distance is then not far above rounding, which may end the iterations."""
    conv = oj.Conv((16, 16), padding="SAME")
    kernel = oj.project_operator_norm(random_kernel((3, 3, 16, 16), norm=2, image=(8, 8)), conv, 1.0)
    change = random_kernel(kernel.shape, seed=1)
    moved = kernel + drift * jnp.linalg.norm(kernel) / np.linalg.norm(change) * change
    out, info = oj.project_operator_norm_info(moved, conv, 1.0)
    assert info.iterations <= 10 and info.gap <= max(info.floor, 1e-3 * info.distance)
    assert info.floor <= 2e-5 * jnp.linalg.norm(kernel)
    assert oracle.paper_singular_values(out, (17, 17)).max() <= 1 + 1e-6
    # A rescaled kernel moves several times as far.
    assert info.distance < 0.5 * jnp.linalg.norm(oj.rescale_operator_norm(moved, conv, 1.0) - moved)


@pytest.mark.slow
@pytest.mark.parametrize("drift", [3e-4, 3e-3])
def test_gap_is_true_near_the_ball(drift, x64):
    """Where the lower bound is within rounding, in float32: against the optimum in float64."""
    projected = np.asarray(oj.project_operator_norm(random_kernel((3, 3, 6, 6), norm=2, image=(8, 8)), (8, 8), 1.0))
    change = random_kernel(projected.shape, seed=1)
    moved = np.float32(projected + np.float32(drift * np.linalg.norm(projected) / np.linalg.norm(change)) * change)
    _, truth = oj.project_operator_norm_info(moved.astype(np.float64), (8, 8), 1.0, tolerance=1e-6)
    assert 0 <= truth.gap <= 1e-6 * truth.distance
    out, info = oj.project_operator_norm_info(moved, (8, 8), 1.0)
    assert out.dtype == np.float32
    info, truth = (jax.tree.map(np.float64, one) for one in (info, truth))
    assert info.distance - info.gap <= truth.distance
    assert np.linalg.norm(np.float64(out) - moved) >= (truth.distance - truth.gap) * (1 - 1e-6)
    assert info.gap <= max(1e-3 * info.distance, info.floor)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (1, 1, 8, 8), (3, 3, 2, 8)], ids=str)
def test_all_values_equal(shape):
    """Twice an isometry: every singular value is tied and above the bound, and the nearest is half of it."""
    isometry = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0][: shape[2], : shape[3]]
    kernel = np.zeros(shape, np.float32)
    kernel[shape[0] // 2, shape[1] // 2] = 2 * isometry
    out, info = oj.project_operator_norm_info(kernel, (8, 8), 1.0)
    np.testing.assert_allclose(out, kernel / 2, atol=1e-3)
    assert info.gap <= 1e-3 * info.distance and info.iterations <= 10


@pytest.mark.slow
def test_values_that_tie_at_the_nearest_kernel(x64):
    """A 1x1 kernel: the nearest kernel is known, and has all values above the bound brought to it."""
    kernel = np.random.default_rng(0).standard_normal((1, 1, 7, 5))
    left, values, right = np.linalg.svd(kernel[0, 0], full_matrices=False)
    want = (left * np.minimum(values, 1.0)) @ right
    got, info = oj.project_operator_norm_info(kernel, oj.Conv((8, 8), padding="SAME"), 1.0, tolerance=1e-8)
    np.testing.assert_allclose(got[0, 0], want, atol=1e-6)
    assert info.gap <= 1e-8 * info.distance


GEOMETRIES = {
    "groups": ((3, 3, 2, 6), oj.Conv((7, 7), feature_group_count=3)),
    "depthwise": ((3, 3, 1, 5), oj.Conv((7, 7), feature_group_count=5)),
    "strided": ((3, 3, 3, 4), oj.Conv((8, 8), strides=2)),
    "dilated": ((3, 3, 4, 3), oj.Conv((9, 9), kernel_dilation=2)),
    "transposed": ((3, 3, 3, 4), oj.Conv((6, 6), input_dilation=2, padding=((1, 2), (2, 1)))),
    "1-D": ((5, 3, 4), oj.Conv((12,), padding="VALID")),
    "3-D": ((2, 2, 2, 3, 3), oj.Conv((4, 4, 4))),
    "larger than the circle": ((5, 5, 2, 3), oj.Conv((3, 3), padding="CIRCULAR")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GEOMETRIES)[:: 1 if THOROUGH else 2])
def test_both_methods_agree_in_every_geometry(name, x64):
    """Newton's and the accelerated gradient's, which share no code but the blocks'."""
    shape, conv = GEOMETRIES[name]
    kernel = np.random.default_rng(0).standard_normal(shape)
    bound = 0.5 * float(oj.operator_norm_bounds(kernel, conv).upper)
    got, info = oj.project_operator_norm_info(kernel, conv, bound, tolerance=1e-5)
    products = oj.Execution(factorization="products")
    want, slow = oj.project_operator_norm_info(
        kernel, conv, bound, tolerance=1e-4, max_iterations=2000, execution=products
    )
    assert info.gap <= 1e-5 * info.distance and slow.gap <= 1e-4 * slow.distance
    assert info.distance - info.gap <= slow.distance and slow.distance - slow.gap <= info.distance
    assert np.linalg.norm(got - want) <= 0.03 * info.distance
    assert oj.operator_norm_bounds(got, conv).upper <= bound * (1 + 1e-12)


@pytest.mark.parametrize(
    "shape, above", [((16, 16), 2), ((20, 16), 1), ((16, 16), 5), ((5, 3), 2), ((4, 4), 0)], ids=str
)
def test_derivative_of_the_excess(shape, above, x64):
    """By central differences of NumPy's SVD; few values above the bound take another route than many."""
    draw = lambda seed: np.random.default_rng(seed).standard_normal((2, *shape))
    z, h = (draw(seed)[0] + 1j * draw(seed)[1] for seed in (0, 1))
    left, values, right = np.linalg.svd(z, full_matrices=False)
    bound = values[0] + 1 if above == 0 else (values[above - 1] + values[above]) / 2

    def excess(z):
        left, values, right = np.linalg.svd(z, full_matrices=False)
        return (left * np.maximum(values - bound, 0)) @ right

    want = (excess(z + 1e-6 * h) - excess(z - 1e-6 * h)) / 2e-6
    model = newton.model_of(jnp.asarray(values[::-1].copy())[None, None], bound)
    x = {"left": left[:, ::-1][None, None], "right": right.conj().T[:, ::-1][None, None], **model._asdict()}
    x["more"] = jnp.zeros((1, 1, len(values)))
    got, moved = newton.derivative_of_excess(jnp.asarray(h)[None, None], jax.tree.map(jnp.asarray, x))
    np.testing.assert_allclose(got[0, 0], want, atol=1e-7)
    rates = np.sum((left.conj() * (h @ right.conj().T)).real, axis=0)
    np.testing.assert_allclose(moved[0, 0, len(values) - above :][::-1], rates[:above], atol=1e-12)


@pytest.mark.slow
def test_small_chunks_and_groups_change_nothing():
    shape, conv = GEOMETRIES["groups"]
    kernel = random_kernel(shape)
    want = oj.project_operator_norm(kernel, conv, 1.0)
    got = oj.project_operator_norm(kernel, conv, 1.0, execution=oj.Execution(chunk_bytes=500))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_chunks_by_products_change_nothing():
    """The dual is cut into chunks of 3 of the 34 frequencies, so that the last is filled up."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 2))
    conv = oj.Conv((8, 8), padding="CIRCULAR")
    project = lambda **options: oj.project_operator_norm(
        kernel, conv, 3.0, execution=oj.Execution(factorization="products", **options)
    )
    np.testing.assert_allclose(project(chunk_bytes=3 * 2 * 4 * 4), project(), atol=1e-5)


@pytest.mark.slow
def test_gap_is_a_true_certificate():
    """distance - gap never exceeds the distance of the (independently found) nearest kernel."""
    for seed in range(5):
        kernel = random_kernel((3, 3, 2, 3), seed, norm=3.0, image=(5, 5))
        optimum = np.linalg.norm(dykstra(kernel.astype(np.float64), (5, 5), 1.0, 3000) - kernel)
        for iterations in (1, 20, 100):
            _, info = oj.project_operator_norm_info(kernel, (5, 5), 1.0, max_iterations=iterations)
            assert info.distance - info.gap <= optimum * (1 + 1e-4) and info.distance >= optimum * (1 - 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", FUNCTIONS)
def test_vmap_is_a_loop(method):
    kernels = jax.random.normal(jax.random.key(0), (3, 3, 3, 2, 3)) * jnp.array([0.01, 1, 2])[:, None, None, None, None]
    bounds = jnp.array([1.0, 0.7, 2.0])
    f = lambda k, b: FUNCTIONS[method](k, (5, 5), b)
    batch = jax.jit(jax.vmap(f))(kernels, bounds)
    np.testing.assert_allclose(batch, jnp.stack([f(k, b) for k, b in zip(kernels, bounds)]), atol=2e-4)
    assert (batch[0] == kernels[0]).all()


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_gives_nan(method, value):
    kernels = jnp.ones((2, 3, 3, 2, 2)).at[0, 0, 0, 0, 0].set(value)
    out = jax.jit(jax.vmap(lambda k: FUNCTIONS[method](k, (4, 4), 1.0)))(kernels)
    assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()


@pytest.mark.parametrize("exponent", [-30, 30])
@pytest.mark.parametrize("method", FUNCTIONS)
def test_extreme_scales(method, exponent):
    kernel = (random_kernel((3, 3, 2, 2)).astype(np.float64) * 10.0**exponent).astype(np.float32)
    want = FUNCTIONS[method](random_kernel((3, 3, 2, 2)), (4, 4), 1.0)
    got = FUNCTIONS[method](kernel, (4, 4), 10.0**exponent)
    np.testing.assert_allclose(np.float64(got) / 10.0**exponent, want, atol=1e-3)


@pytest.mark.parametrize("method", ["clip", "rescale"])
@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (3, 3, 3, 2), (3, 3, 1, 2)], ids=str)
def test_derivatives(method, shape, x64):
    kernel = np.random.default_rng(0).standard_normal(shape)
    for conv in (oj.Conv((4, 5), padding="CIRCULAR"), oj.Conv((4, 4), padding="SAME", strides=2)):
        f = jax.jit(lambda k, b, conv=conv: FUNCTIONS[method](k, conv, b))
        bound = 0.5 * float(oj.operator_norm(kernel, conv))
        jax.test_util.check_grads(f, (kernel, bound), order=1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)
        inside = 2.0 * float(oj.operator_norm_bounds(kernel, conv).upper)
        jacobian = jax.jacrev(f)(kernel, inside).reshape(kernel.size, -1)
        np.testing.assert_array_equal(jacobian, np.eye(kernel.size))


@pytest.mark.parametrize("method", ["clip", "rescale"])
def test_derivatives_finite_at_ties_and_zero(method):
    identity = 2 * jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    f = lambda k: jnp.sum(FUNCTIONS[method](k, (4, 4), 1.0) ** 2)
    batch = jax.vmap(jax.grad(f))(jnp.stack([identity, identity * 0, identity / 2]))
    assert jnp.isfinite(batch).all() and (batch[1] == 0).all()


def test_projection_refuses_a_derivative():
    with pytest.raises(NotImplementedError, match="rescale_operator_norm"):
        jax.grad(lambda k: oj.project_operator_norm(k, (4, 4), 1.0).sum())(jnp.ones((3, 3, 2, 2)))


def test_clip_without_an_svd_of_the_blocks():
    text = str(
        jax.make_jaxpr(functools.partial(oj.clip_operator_norm, conv=(8, 8), max_norm=1.0))(jnp.ones((3, 3, 2, 2)))
    )
    assert "eigh" in text and "svd" not in text
