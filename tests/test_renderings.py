"""What the benchmarks render of others' formulas: the figures that they print, and dense float64 matrices."""

import jax.numpy as jnp
import lanczos
import numpy as np
import pytest
from oracle import dense_matrix, dense_singular_values, paper_singular_values

from benchmarks import renderings
from benchmarks.rivals import lanczos_norm, normal

SHAPES = [(3, 3, 2, 4), (3, 3, 4, 2), (2, 3, 3, 3), (5, 1, 3, 2), (1, 1, 3, 4)]
EVERY_PADDING = {
    "four unfoldings": lambda kernel: renderings.four_unfoldings(kernel, 500),
    "flattened": lambda kernel: np.sqrt(kernel[:, :, 0, 0].size) * renderings.flattened_norm(kernel, 500),
    "tensor norm": lambda kernel: renderings.tensor_norm(kernel, 100, 20),
    "Gram iteration": renderings.gram_zero_padded,
    "Gram iteration, no steps": lambda kernel: renderings.gram_zero_padded(kernel, 0),
}


def some_kernel(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", EVERY_PADDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_above_the_dense_matrix(name, shape):
    """Also where the taps are twice those of the map: what is far away never lowers a norm."""
    for seed in range(3):
        kernel = some_kernel(shape, seed)
        bound = float(EVERY_PADDING[name](jnp.asarray(kernel)))
        for padding in ("SAME", "VALID", "CIRCULAR"):
            assert dense_singular_values(kernel, (7, 6), padding=padding)[0] <= bound * (1 + 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_iterations_converge(shape):
    kernel = some_kernel(shape)
    truth = paper_singular_values(kernel, (8, 6)).max()
    bounds = [float(renderings.gram_circular(kernel, (8, 6), steps)) for steps in (1, 3, 5, 12)]
    assert bounds == sorted(bounds, reverse=True) and truth * (1 - 1e-5) <= bounds[-1] <= truth * (1 + 1e-3)
    # A grid of 64 points is below the supremum over all frequencies by at most 0.3 % for five taps.
    supremum = paper_singular_values(kernel, (64, 64)).max()
    bounds = [float(renderings.gram_zero_padded(kernel, steps)) for steps in (1, 3, 6)]
    assert bounds == sorted(bounds, reverse=True) and supremum * (1 - 1e-5) <= bounds[-1] <= supremum * 1.08


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_and_tensors(shape):
    """Against NumPy's norm of each matrix; and of an outer product, whose tensor norm is the product of the norms."""
    h, w, i, o = shape
    kernel = some_kernel(shape)
    flat = np.linalg.norm(kernel.astype(np.float64).reshape(-1, o), 2)
    assert np.isclose(renderings.flattened_norm(kernel, 2000), flat, rtol=1e-5)
    orders = ((0, 1, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3), (1, 2, 0, 3))
    rows = (h * w * i, i, h * i, w * i)
    least = min(np.linalg.norm(kernel.transpose(order).reshape(n, -1), 2) for order, n in zip(orders, rows))
    assert np.isclose(renderings.four_unfoldings(kernel, 2000), np.sqrt(h * w) * least, rtol=1e-5)
    vectors = [some_kernel(size, size) for size in shape]
    outer = np.einsum("h,w,i,o->hwio", *vectors)
    expected = np.sqrt(h * w) * np.prod([np.linalg.norm(vector) for vector in vectors])
    assert np.isclose(renderings.tensor_norm(outer), expected, rtol=1e-5)


def test_alternating_maximisation_can_end_below_the_norm():
    """What the site says of it."""
    kernel = some_kernel((2, 3, 3, 3), 77)
    values = [float(renderings.tensor_norm(kernel, 100, starts)) for starts in (1, 20)]
    assert values[0] < dense_singular_values(kernel, (7, 6), padding="CIRCULAR")[0] <= values[1]


def test_the_notebook_of_gram_iteration():
    """lip4conv's notebook draws such a kernel without a seed, and prints a norm, and others' minus that norm.

    The norm of another draw differs by a few percent; its ratios, by less.
    """
    kernel, size = normal(5, 64, 64), (12, 12)
    circular, zero = renderings.paper_spectrum(kernel, size).max(), lanczos_norm(kernel, size)
    assert np.isclose(circular, 83.092, rtol=0.05) and np.isclose(zero, 77.561, rtol=0.05)
    assert np.isclose(renderings.four_unfoldings(kernel) / circular, (83.092 + 93.97) / 83.092, rtol=0.05)
    assert 0 <= renderings.gram_circular(kernel, size, 5) / circular - 1 < 1e-3
    assert np.isclose(renderings.gram_zero_padded(kernel, 5) / zero, 86.43 / 77.561, rtol=0.03)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_truth(stride):
    kernel = some_kernel((3, 3, 4, 3))
    dense = dense_singular_values(kernel, (8, 8), strides=stride, padding=((1, 1), (1, 1)))[0]
    assert np.isclose(lanczos_norm(kernel, (8, 8), stride), dense, rtol=1e-6)
    kernel = some_kernel((3, 3, 16, 16))
    other = lanczos.norm(kernel, (20, 20), strides=stride, padding=((1, 1), (1, 1)))
    assert other * (1 - 1e-5) <= lanczos_norm(kernel, (20, 20), stride) <= other * (1 + 1e-9)
    assert np.isclose(renderings.power_iteration(kernel, (20, 20), 100, stride), other, rtol=0.03)


@pytest.mark.parametrize("shape", [(3, 3, 4, 3), (4, 2, 2, 3), (7, 7, 3, 2)])
def test_strides_as_channels(shape):
    """The equal layer without strides has the same singular values."""
    kernel = some_kernel(shape)
    strided = dense_singular_values(kernel, (8, 8), strides=2)
    assert np.allclose(paper_singular_values(renderings.space_to_depth(kernel, 2), (4, 4)).max(), strided[0])


def test_fast_clip():
    """A full matrix, whose singular values it can clip one by one, ends at the bound; FastClip's own table, near it."""
    kernel = some_kernel((1, 1, 6, 5))
    values = np.linalg.svd(kernel[0, 0], compute_uv=False)
    clipped = np.linalg.svd(np.asarray(renderings.fast_clip(kernel, (1, 1), values[2], 500))[0, 0], compute_uv=False)
    assert np.allclose(clipped, np.minimum(values, values[2]), rtol=0.03)
    kernel = some_kernel((3, 3, 8, 8))
    kernel *= 2 / np.linalg.norm(dense_matrix(kernel, (8, 8), padding="SAME"), 2)
    left = dense_singular_values(renderings.fast_clip(kernel, (8, 8), 1.0), (8, 8), padding="SAME")[0]
    assert 0.95 < left < 1.1
