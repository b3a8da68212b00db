"""Every bound on the right side of the truth; matrix-free norms converged; published non-bounds exhibited."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from conftest import THOROUGH, count_trials
from geometries import generate

import opnorm_jax as oj

GEOMETRIES = 330 if THOROUGH else 24
KERNELS = 17  # per geometry; thorough: 5,610 cases


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.attack) if n < 60 else n for n in range(GEOMETRIES)]
)
def test_bounds_hold_for_every_geometry(seed):
    """In float32, against the float64 truth: lower <= true <= upper, and the norm to 1e-5."""
    geometry = generate(seed)
    conv = geometry.conv
    canonical, kernels = geometry.kernels(np.random.default_rng(seed), KERNELS)
    true = np.array([geometry.oracle(kernel)[0] for kernel in canonical])

    @jax.jit
    @jax.vmap
    def compute(kernel):
        everywhere = oj.operator_norm_upper_bound(
            kernel,
            strides=conv.strides,
            input_dilation=conv.input_dilation,
            kernel_dilation=conv.kernel_dilation,
            feature_group_count=conv.feature_group_count,
            kernel_layout=conv.kernel_layout,
        )
        return oj.operator_norm_bounds(kernel, conv), oj.operator_norm(kernel, conv), everywhere

    (lower, upper), norm, everywhere = jax.tree.map(np.asarray, compute(kernels))
    count_trials("certificates", tried=KERNELS)
    assert (lower <= true).all(), (conv, lower / true)
    assert (true <= upper).all(), (conv, upper / true)
    assert (norm <= upper).all()
    np.testing.assert_allclose(norm, true, rtol=1e-5)
    if conv.padding != "CIRCULAR" or geometry.exact:
        assert (true <= everywhere).all(), (conv, everywhere / true)
        assert (upper <= everywhere * (1 + 1e-4)).all()
    if geometry.exact:
        np.testing.assert_allclose(upper, lower, rtol=2e-5)
    count_trials("certificates", held=KERNELS)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 2)), ((2, 2), (2, 2)), ((-1, 0), (1, -1))], ids=str)
@pytest.mark.parametrize("strides", [1, 2, (1, 3)], ids=str)
def test_zero_padding_float64(padding, strides, x64):
    conv = oj.Conv((9, 7), padding=padding, strides=strides)
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3))
    true = oracle.dense_singular_values(kernel, (9, 7), padding=padding, strides=strides)[0]
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= true <= upper
    np.testing.assert_allclose(oj.operator_norm(kernel, conv), true, rtol=1e-9)
    np.testing.assert_allclose(lower, true, rtol=1e-9)


def test_circular_norm_at_the_layers_own_size_is_no_bound_for_same_padding():
    """A published formula's violation, and ours holding on the same kernels."""
    rng, violations, worst = np.random.default_rng(0), 0, 1.0
    circular = jax.jit(lambda kernel: oj.operator_norm(kernel, (5, 5)))
    bounds = jax.jit(lambda kernel: oj.operator_norm_bounds(kernel, oj.Conv((5, 5), padding="SAME")))
    for _ in range(100):
        kernel = rng.standard_normal((3, 3, 1, 1)).astype(np.float32)
        true = oracle.dense_singular_values(kernel, (5, 5), padding="SAME")[0]
        ratio = true / float(circular(kernel))
        violations, worst = violations + (ratio > 1 + 1e-5), max(worst, ratio)
        assert bounds(kernel).lower <= true <= bounds(kernel).upper
    assert violations >= 3 and worst > 1.05


def test_flattened_kernel_norm_is_no_bound():
    """What Flax's, Equinox's, Haiku's, Keras's and PyTorch's SpectralNorm divide by."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    flattened = np.linalg.norm(kernel.reshape(-1, 8), 2)
    assert flattened < 0.8 * oracle.dense_singular_values(kernel, (8, 8), padding="SAME")[0]


def test_what_the_embedding_and_the_published_formula_lose_on_small_maps():
    """The figures in the docs, of extreme kernels: ones, and signs that alternate as the squares of a chessboard."""
    true = lambda kernel, n: oracle.dense_singular_values(kernel, (n, n), padding="SAME")[0]
    for n, excess in ((4, 0.31), (8, 0.09), (16, 0.02), (32, 0.006)):
        ones = np.ones((3, 3, 1, 1), np.float32)
        upper = oj.operator_norm_bounds(ones, oj.Conv((n, n))).upper
        np.testing.assert_allclose(upper / true(ones, n) - 1, excess, rtol=0.16)
    for taps, n, lost in ((3, 5, 0.08), (7, 9, 0.17), (3, 3, 0.31)):
        signs = np.float32(-1) ** np.add.outer(np.arange(taps), np.arange(taps)).reshape(taps, taps, 1, 1)
        np.testing.assert_allclose(1 - oj.operator_norm(signs, (n, n)) / true(signs, n), lost, atol=0.006)


def test_what_constraints_leave_unused_on_small_maps():
    """The figures in the docs: the norm of the layer itself after rescaling to 1, the mean of 20 random kernels."""
    kernels = np.random.default_rng(0).standard_normal((20, 3, 3, 4, 4)).astype(np.float32)
    for n, norm in ((3, 0.78), (4, 0.88), (8, 0.97), (16, 0.99)):
        conv = oj.Conv((n, n))
        rescaled = jax.jit(jax.vmap(lambda kernel, conv=conv: oj.rescale_operator_norm(kernel, conv, 1.0)))(kernels)
        norms = jax.jit(jax.vmap(lambda kernel, conv=conv: oj.operator_norm(kernel, conv)))(rescaled)
        np.testing.assert_allclose(norms.mean(), norm, atol=0.012)


@pytest.mark.slow
def test_upper_bound_is_within_its_slack_and_independent_of_dilation():
    for taps, channels in (((3, 3), (3, 3)), ((5, 5), (2, 4)), ((2, 4), (3, 1)), ((7,), (2, 2)), ((3, 3, 3), (2, 2))):
        kernel = np.random.default_rng(1).standard_normal((*taps, *channels)).astype(np.float32)
        fine = jax.jit(oj.operator_norm, static_argnums=1)(kernel, (24,) * 3 if len(taps) == 3 else (64,) * len(taps))
        for slack in (0.1, 0.01, 0.003) if len(taps) < 3 else (0.1, 0.03):
            bound = jax.jit(functools.partial(oj.operator_norm_upper_bound, slack=slack))(kernel)
            assert fine <= bound <= fine * (1 + slack) * 1.005
        dilated = oj.operator_norm_upper_bound(kernel, kernel_dilation=3)
        np.testing.assert_allclose(dilated, oj.operator_norm_upper_bound(kernel), rtol=1e-6)


@pytest.mark.parametrize(
    "strides, input_dilation, kernel_dilation", [(2, 1, 1), (3, 1, 1), (4, 1, 2), (6, 1, 4), (1, 2, 1), (1, 4, 4)]
)
def test_upper_bound_is_within_its_slack_for_strides(strides, input_dilation, kernel_dilation, x64):
    """Against the dense matrix on a large circle of N runs, whose norm is within 1 / cos(pi (k - 1) / 2N)."""
    kernel = np.random.default_rng(0).standard_normal((5, 2, 3))
    geometry = {"strides": strides, "input_dilation": input_dilation, "kernel_dilation": kernel_dilation}
    fine = oracle.dense_singular_values(kernel, (120 // input_dilation,), **geometry)[0]
    bound = oj.operator_norm_upper_bound(kernel, slack=0.003, **geometry)
    grid = 120 // max(strides, input_dilation)
    assert fine <= bound <= fine * 1.003 * (1 + 1e-12) / np.cos(np.pi * 4 / (2 * grid))


@pytest.mark.parametrize(
    "shape, strides, padding, circle",
    [
        ((5, 6), 1, "SAME", (6, 7)),
        ((5, 6), 2, "SAME", (6, 8)),
        ((5, 6), 1, "VALID", (5, 6)),
        ((5, 4), 1, ((2, 1), (0, 3)), (7, 6)),  # the last output meets padding alone
        ((7, 6), 1, ((-1, -1), (0, -2)), (5, 4)),
        ((7, 6), 1, ((-2, 1), (2, -1)), (6, 7)),
    ],
    ids=str,
)
def test_upper_is_the_norm_on_the_next_larger_circle(shape, strides, padding, circle, x64):
    """On n + max(low, high) pixels of what is not cropped, or the next multiple of the stride: no larger one."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2))
    conv = oj.Conv(shape, strides=strides, padding=padding)
    true = oracle.dense_singular_values(kernel, circle, strides=strides)[0]
    np.testing.assert_allclose(oj.operator_norm_bounds(kernel, conv).upper, true, rtol=1e-13)


@pytest.mark.parametrize(
    "shape, conv, exact",
    [
        ((1, 1, 6, 5), oj.Conv((4, 5), padding="SAME"), True),
        ((1, 1, 6, 5), oj.Conv((5, 5), padding="SAME", strides=2), True),
        ((2, 2, 3, 5), oj.Conv((5, 4), padding="VALID", strides=2), True),  # a patch embedding
        ((2, 3, 3, 5), oj.Conv((6, 7), padding="VALID", strides=(4, 3)), True),
        ((2, 3, 4), oj.Conv((7,), padding="VALID", strides=4, kernel_dilation=3), True),
        ((1, 1, 2, 6), oj.Conv((3, 3), padding="SAME", feature_group_count=3), True),
        ((2, 2, 3, 5), oj.Conv((5, 5), padding="SAME", strides=2), False),  # the last patches are cut
        ((2, 2, 3, 5), oj.Conv((4, 4), padding="VALID"), False),
        ((1, 1, 3, 5), oj.Conv((3, 3), padding=((1, 1), (1, 1))), True),  # the padding is met alone
        ((2, 2, 3, 5), oj.Conv((3, 3), padding=((0, 0), (0, 0)), input_dilation=2), False),
    ],
    ids=str,
)
def test_layers_of_disjoint_patches_are_exact(shape, conv, exact, x64):
    """They take no iteration, and bounds meet but for rounding; the others' norms are iterated as ever."""
    kernel = np.random.default_rng(0).standard_normal(shape)
    names = ("padding", "strides", "input_dilation", "kernel_dilation", "feature_group_count")
    true = oracle.dense_singular_values(kernel, conv.input_shape, **{name: getattr(conv, name) for name in names})[0]
    norm, (lower, upper) = oj.operator_norm(kernel, conv), oj.operator_norm_bounds(kernel, conv)
    assert lower <= true <= upper
    np.testing.assert_allclose(norm, true, rtol=1e-13 if exact else 1e-5)
    iterated = "conv_general_dilated" in str(jax.make_jaxpr(lambda k: oj.operator_norm(k, conv))(kernel))
    assert iterated is not exact
    assert (upper <= lower * (1 + 1e-13)) or not exact


@pytest.mark.slow
def test_upper_bound_holds_for_growing_images():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
    for strides in (1, 2):
        bound = oj.operator_norm_upper_bound(kernel, strides=strides)
        for n in (2, 4, 16):
            for padding in ("CIRCULAR", "SAME", "VALID"):
                if padding == "VALID" and n == 2:
                    continue
                conv = oj.Conv((n, n), padding=padding, strides=strides)
                upper = jax.jit(lambda k, conv=conv: oj.operator_norm_bounds(k, conv).upper)(kernel)
                assert upper <= bound * (1 + 1e-5)


def test_stride_that_does_not_divide_the_grid():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
    conv = oj.Conv((7, 7), strides=2, padding="CIRCULAR")
    true = oracle.dense_singular_values(kernel, (7, 7), strides=2)[0]
    lower, upper = oj.operator_norm_bounds(kernel, conv)
    assert lower <= true <= upper
    np.testing.assert_allclose(oj.operator_norm(kernel, conv), true, rtol=1e-5)
    with pytest.raises(ValueError, match="strides that divide the grid .7, 7."):
        oj.singular_values(kernel, conv)


def test_zero_kernel():
    for padding in ("CIRCULAR", "SAME"):
        conv, zero = oj.Conv((5, 5), padding=padding), jnp.zeros((3, 3, 2, 2))
        assert oj.operator_norm(zero, conv) == 0
        assert oj.operator_norm_bounds(zero, conv) == (0, 0)
        assert oj.operator_norm_upper_bound(zero) == 0


@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_gives_nan(padding, value):
    kernel, conv = jnp.ones((3, 3, 2, 2)).at[0, 0, 0, 0].set(value), oj.Conv((4, 4), padding=padding)
    assert np.isnan(jax.jit(lambda k: oj.operator_norm(k, conv))(kernel))
    assert np.isnan(jax.jit(lambda k: oj.operator_norm_bounds(k, conv))(kernel)).all()


def norms(conv):
    return {
        "operator_norm": lambda k: oj.operator_norm(k, conv),
        "lower": lambda k: oj.operator_norm_bounds(k, conv).lower,
        "upper": lambda k: oj.operator_norm_bounds(k, conv).upper,
        "everywhere": lambda k: oj.operator_norm_upper_bound(k, strides=conv.strides),
    }


@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME"])
@pytest.mark.parametrize("which", ["operator_norm", "lower", "upper", "everywhere"])
def test_derivatives(padding, which, x64):
    function = jax.jit(norms(oj.Conv((6, 6), padding=padding, strides=2))[which])
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2))
    jax.test_util.check_grads(function, (kernel,), order=1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)
    zero = jnp.zeros_like(kernel)
    ties = zero.at[1, 1].set(jnp.eye(2))
    for mode in (jax.grad, jax.jacfwd):
        batch = jax.vmap(mode(function))(jnp.stack([kernel, zero, ties]))
        assert jnp.isfinite(batch).all() and (batch[1] == 0).all()
        np.testing.assert_allclose(batch[0], mode(function)(kernel), atol=1e-7)
        np.testing.assert_allclose(jnp.sum(batch[2] * ties), function(ties), rtol=1e-6)  # <g, K> = |K|


def test_norm_as_a_penalty():
    """Gradient descent on a loss with the norm in it does bring the norm down."""
    conv, kernel = oj.Conv((6, 6), padding="SAME"), jax.random.normal(jax.random.key(0), (3, 3, 2, 2))

    def loss(k):
        return jnp.sum((k - kernel) ** 2) + 10 * jax.nn.relu(oj.operator_norm(k, conv) - 1) ** 2

    k, step = kernel, jax.jit(jax.grad(loss))
    for _ in range(150):
        k = k - 0.002 * step(k)
    assert oj.operator_norm(kernel, conv) > 5 and oj.operator_norm(k, conv) < 2


def test_memory_is_bounded_by_chunks():
    """The compiled program's own account: a long spectrum in small chunks needs little more than its result."""
    kernel = jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.float32)
    f = functools.partial(oj.singular_values, conv=(48, 48), execution=oj.Execution(chunk_bytes=2**20))
    analysis = jax.jit(f).lower(kernel).compile().memory_analysis()
    result = 48 * 48 * 32 * 4
    assert analysis.output_size_in_bytes == result
    assert analysis.temp_size_in_bytes < 8 * 2**20 + 2 * result  # the whole stack of blocks is 9.4 MiB, and its work
