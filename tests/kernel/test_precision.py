"""The certificates' rounding, against norms in 40-digit arithmetic (mpmath): no bound may owe its side to luck."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from conftest import THOROUGH

import opnorm_jax as oj
from opnorm_jax import _rounding

DIGITS = 40


def exact_norm(kernel, size, **geometry):
    """The norm of the layer, of which every float entry is taken as it is."""
    with mpmath.workdps(DIGITS):
        rows = oracle.dense_matrix(kernel, size, **geometry)
        return mpmath.svd_r(mpmath.matrix(rows.tolist()), compute_uv=False)[0]


def test_the_dense_matrix_loses_nothing():
    """It moves entries and, where no taps fold, adds none: so float64 holds it exactly."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
    assert set(oracle.dense_matrix(kernel, (4, 4)).ravel()) == {0.0, *kernel.astype(np.float64).ravel()}


def kernels(kind, count, shape):
    """Where float32 goes wrong first: cancellation, ties, growth, entries of very different size."""
    rng = np.random.default_rng(len(kind))
    k = rng.standard_normal((count, *shape))
    if kind == "cancelling":  # the symbol is a difference of large terms at most frequencies
        k = 1e3 + k
    elif kind == "tied":  # the identity and a little more: every frequency nearly the same
        k = 1e-6 * k
        k[:, 1, 1] += np.eye(*shape[-2:])
    elif kind == "aligned":  # all singular vectors the same, the norm a sum of all entries
        k = np.abs(k[..., :1]) * np.abs(rng.standard_normal(shape[-1]))
    elif kind == "graded":
        k *= 10.0 ** rng.uniform(-6, 0, k.shape)
    return k.astype(np.float32)


KINDS = ["random", "cancelling", "tied", "aligned", "graded"]
CIRCULAR, SAME = ((4, 3), {"padding": "CIRCULAR"}), ((3, 3), {"padding": "SAME"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, geometry", [CIRCULAR, SAME], ids=["circular", "SAME"])
def test_bounds_enclose_the_exact_norm(kind, size, geometry):
    """float32's lower and upper; for a circle they also touch the norm to 2 parts in 100,000."""
    conv = oj.Conv(size, **geometry)
    bounds = jax.jit(lambda k: oj.operator_norm_bounds(k, conv))
    for kernel in kernels(kind, 12 if THOROUGH else 3, (3, 3, 2, 2)):
        true = exact_norm(kernel, size, **geometry)
        lower, upper = (mpmath.mpf(float(value)) for value in bounds(kernel))
        assert lower <= true <= upper, (float(lower / true - 1), float(upper / true - 1))
        if geometry["padding"] == "CIRCULAR":
            assert upper - lower <= 2e-5 * true


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("method", ["rescale", "project"])
def test_inside_the_ball_exactly(kind, dtype, method, x64):
    """What comes back, in its own dtype, against bound (1 + 4 eps of that dtype)."""
    if not THOROUGH and method == "project" and kind not in ("cancelling", "tied"):
        pytest.skip("only in the thorough profile")
    (size, geometry), count = SAME, 6 if THOROUGH else 1
    conv = oj.Conv(size, **geometry)
    function = jax.jit(lambda k, bound: getattr(oj, f"{method}_operator_norm")(k, conv, bound))
    eps = float(jnp.finfo(dtype).eps)
    for kernel in kernels(kind, count, (3, 3, 2, 2)):
        kernel = jnp.asarray(kernel, dtype)
        bound = float(0.6 * exact_norm(np.asarray(kernel, np.float64), size, **geometry))
        after = exact_norm(np.asarray(function(kernel, bound), np.float64), size, **geometry)
        assert after <= bound * (1 + 4 * eps), float(after / bound - 1) / eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_allowance_covers_the_computed_norm(dtype, x64):
    """The relative error of a circular norm, in units of eps, is a small part of the allowance it is widened by."""
    worst = 0.0
    for kind in KINDS:
        for kernel in kernels(kind, 12 if THOROUGH else 2, (3, 3, 3, 2)):
            kernel = kernel.astype(dtype)
            true = exact_norm(kernel, (4, 4))
            computed = mpmath.mpf(float(oj.operator_norm(jnp.asarray(kernel), (4, 4))))
            worst = max(worst, abs(float(computed / true - 1)) / np.finfo(dtype).eps)
    assert worst <= 8  # of 16 + 3 + 4 sqrt(2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_allowance_for_rounding_grows_with_the_matrices(dtype):
    """Sums of more terms round more, and so do factorisations of larger matrices."""
    eps = float(jnp.finfo(dtype).eps)
    for side, channels in ((3, 4), (5, 64), (3, 1024)):
        for allowance in (
            _rounding.rounding((side, side, channels, channels), dtype),
            _rounding.dense_rounding(channels, side**2, dtype),
        ):
            assert (
                eps * (16 + side + 4 * channels**0.5) <= allowance * (1 + 1e-12) <= 2 * eps * (16 + 4 * channels**0.5)
            )
        assert _rounding.semidefinite_rounding(channels, dtype) >= eps * (16 + 3.9 * channels**0.5)
    assert _rounding.inside_tolerance(dtype) == _rounding.tie_tolerance(dtype) == 32 * eps
    assert _rounding.possible_limit(jnp.float32(3)) >= 9 and _rounding.possible_limit(jnp.float32(0)) > 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_kernels_whose_entries_differ_in_size(scale):
    """The power of two that a kernel is divided by goes by its largest entry: squares neither overflow nor vanish."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 2))
    kernel[0, 0] = 0.0, 1e-3
    bounds = oj.operator_norm_bounds(jnp.asarray(scale * kernel, jnp.float32), oj.Conv((4, 3), padding="CIRCULAR"))
    true = oracle.paper_singular_values(kernel, (4, 3)).max()
    assert bounds.lower / scale <= true * (1 + 1e-6) and true * (1 - 1e-6) <= bounds.upper / scale <= true * (1 + 1e-5)
