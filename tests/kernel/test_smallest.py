"""The smallest singular value of the layer itself, against dense float64 matrices."""

import geometries
import numpy as np
import oracle
import pytest
from conftest import THOROUGH

import opnorm_jax as oj
from opnorm_jax._geometry import resolve
from opnorm_jax._kernel import smallest
from opnorm_jax._kernel.smallest import smallest_singular_value

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dense", [512, 2])
@pytest.mark.parametrize("seed", range(300 if THOROUGH else 15))
def test_every_geometry(seed, dense, monkeypatch):
    """By the dense matrix, and by sparse factorisations: small matrices are of little use to those, but show errors."""
    monkeypatch.setattr(smallest, "_DENSE", dense)
    geometry = geometries.generate(700 + seed)
    (canonical,), _ = geometry.kernels(np.random.default_rng(seed), 1)
    groups = geometry.conv.feature_group_count
    found = smallest_singular_value(canonical, resolve(geometry.conv, canonical.shape))
    # Of each group of channels by itself: a layer that is wide has as many values as outputs.
    parts = [
        oracle.dense_matrix(part, geometry.conv.input_shape, **geometry.options | {"feature_group_count": 1})
        for part in np.split(canonical, groups, axis=-1)
    ]
    values = [np.linalg.svd(part, compute_uv=False) for part in parts]
    truth, largest = min(v[-1] for v in values), max(v[0] for v in values)
    assert found.lower <= truth * (1 + 1e-9) + 1e-13 * largest
    assert truth * (1 - 1e-9) - 1e-13 * largest <= found.value
    assert found.value <= truth * (1 + 1e-6) + 1e-7 * largest
    if truth > 1e-5 * largest:
        assert found.lower >= truth * (1 - 1e-3)


@pytest.mark.parametrize("seed", range(200 if THOROUGH else 12))
def test_full_padding_is_certified_by_its_embedding(seed):
    """Every pixel meets every tap: the report has a lower bound without a matrix."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 3))
    taps, shape = rng.integers(1, 5, rank), rng.integers(2, 7, rank)
    dilation, spread = rng.integers(1, 3, rank), rng.integers(1, 3, rank)
    reach = dilation * (taps - 1)
    padding = [(int(r + rng.integers(0, 2)), int(r + rng.integers(0, 2))) for r in reach]
    conv = oj.Conv(shape.tolist(), padding=padding, kernel_dilation=dilation.tolist(), input_dilation=spread.tolist())
    kernel = rng.standard_normal((*taps, 2, 2 + seed % 3)).astype(np.float32)
    (row,) = oj.spectral_report({"kernel": kernel}, {"kernel": conv}).layers
    values = oracle.dense_singular_values(
        kernel, conv.input_shape, padding=padding, kernel_dilation=dilation, input_dilation=spread
    )
    assert 0 < row.smallest_lower <= values[-1] and row.condition >= values[0] / values[-1] * (1 - 1e-4)
    assert row.smallest_of == ("layer" if row.exact else "embedding")


@pytest.mark.parametrize(
    "conv",
    [
        oj.Conv((6, 6)),
        oj.Conv((6, 6), padding="VALID"),
        oj.Conv((6, 6), padding="EDGE"),
        oj.Conv((6, 6), padding=2, strides=2),
        oj.Conv((6, 6), padding=((2, 2), (2, 1))),
    ],
    ids=str,
)
def test_other_paddings_have_no_such_certificate(conv):
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 3)).astype(np.float32)
    assert not resolve(conv, kernel.shape).full
    (row,) = oj.spectral_report({"kernel": kernel}, {"kernel": conv}).layers
    assert row.smallest_lower == 0 and row.smallest_of == "embedding"


@pytest.mark.parametrize("shape", [(4, 4), (30, 30)], ids=["dense", "sparse"])
def test_singular_layers(shape):
    conv = oj.Conv(shape)
    zero = smallest_singular_value(np.zeros((3, 3, 1, 1)), resolve(conv, (3, 3, 1, 1)))
    assert zero == (0, 0)
    kernel = np.ones((1, 1, 2, 2))  # rank one at every pixel
    found = smallest_singular_value(kernel, resolve(conv, kernel.shape))
    assert found.lower == 0 and found.value < 1e-7


def test_a_search_that_went_astray_certifies_nothing(monkeypatch):
    """The factorisation alone decides: whatever vector the iterations end in, the bound is below the truth."""
    monkeypatch.setattr(smallest, "_DENSE", 2)
    rng = np.random.default_rng(0)
    for rank in (1, 2, 30):  # an eigenvector of another eigenvalue: the next one, one in the middle
        monkeypatch.setattr(smallest.linalg, "eigsh", lambda gram, rank=rank, **_: _eigenvector(gram, rank))
        kernel = rng.standard_normal((3, 3, 2, 2)) / 3
        conv = oj.Conv((5, 5))
        truth = np.linalg.svd(oracle.dense_matrix(kernel, (5, 5)), compute_uv=False)[-1]
        assert smallest_singular_value(kernel, resolve(conv, kernel.shape)).lower <= truth


def _eigenvector(gram, rank):
    values, vectors = np.linalg.eigh(gram.toarray())
    return values[rank : rank + 1], vectors[:, rank : rank + 1]


def test_too_large_a_layer_is_left_alone():
    geometry = resolve(oj.Conv((64, 64)), (3, 3, 64, 64))
    assert smallest_singular_value(np.ones((3, 3, 64, 64)), geometry) is None
