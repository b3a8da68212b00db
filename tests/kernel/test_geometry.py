"""Static geometry against explicit loops over pixels. Nothing here computes with jax."""

import numpy as np
import pytest
from geometries import generate

import opnorm_jax as oj
from opnorm_jax import _cache
from opnorm_jax._geometry import Axis, coarse_plan, half_grid, resolve, span

pytestmark = pytest.mark.quick


def layer(taps, conv, pads, outputs):
    """One axis of a layer as a matrix (outputs, inputs), from the definition."""
    (n,), (s,), (e,), (d,) = conv.input_shape, conv.strides, conv.input_dilation, conv.kernel_dilation
    matrix = np.zeros((outputs, n))
    for t in range(outputs):
        for j, tap in enumerate(taps):
            place = s * t + d * j - pads[0]
            if conv.padding == "CIRCULAR":
                place %= n * e
            if place % e == 0 and 0 <= place // e < n:
                matrix[t, place // e] += tap
    return matrix


def embedding(taps, axis):
    """The circular layer on the embedding's circle: outputs at every stride, inputs at every input dilation."""
    matrix = np.zeros((axis.period // axis.stride, axis.period // axis.input_dilation))
    for t in range(len(matrix)):
        for j, tap in enumerate(taps):
            place = (axis.stride * t + axis.kernel_dilation * j - axis.low) % axis.period
            if place % axis.input_dilation == 0:
                matrix[t, place // axis.input_dilation] += tap
    return matrix


def random_layer(seed):
    rng = np.random.default_rng(seed)
    n, s, e = int(rng.integers(1, 9)), int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 3]))
    k, d = int(rng.integers(1, 14)), int(rng.choice([1, 1, 2, 5, 9]))
    named = ["SAME", "VALID", "CIRCULAR"] if e == 1 else ["CIRCULAR"]
    padding = (
        str(rng.choice(named)) if rng.random() < 0.4 else ((int(rng.integers(-2, 16)), int(rng.integers(-2, 16))),)
    )
    conv = oj.Conv((n,), strides=s, padding=padding, input_dilation=e, kernel_dilation=d)
    return conv, rng.standard_normal(k)


def norm(matrix):
    return np.linalg.norm(matrix, 2) if matrix.size else 0.0


def test_a_conv_is_shown_as_the_call_that_makes_it():
    assert repr(oj.Conv((8, 8))) == "Conv((8, 8))" and repr(oj.Conv(())) == "Conv(())"
    assert repr(oj.Conv((8,), strides=2, padding="CAUSAL")) == "Conv((8,), strides=(2,), padding='CAUSAL')"
    for seed in range(100):
        conv = generate(seed).conv
        assert eval(repr(conv), {"Conv": oj.Conv}) == conv


def test_embeddings_of_random_layers():
    """In float64, by loops, of 1500 layers of one axis, many with taps or outputs that meet nothing.

    What is left without them has the norm of the layer, the embedding's norm is no smaller, and where it is said to be
    attained it is equal.
    """
    found, cropped, attained = 0, 0, 0
    for seed in range(2000):
        conv, taps = random_layer(seed)
        try:
            geometry = resolve(conv, (len(taps), 1, 1))
        except ValueError as error:
            assert "at least one output pixel" in str(error)
            continue
        found += 1
        (live,), (axis,) = geometry.live, geometry.plan.axes
        truth = norm(layer(taps, conv, geometry.pads[0], geometry.output_shape[0]))
        kept = taps[live.start : live.stop] * live.meets
        assert abs(norm(layer(kept, conv, live.pads, live.outputs)) - truth) <= 1e-12 * (1 + truth), (conv, len(taps))
        bound = norm(embedding(kept, axis))
        assert truth <= bound * (1 + 1e-12) + 1e-12, (conv, len(taps))
        cropped += len(kept) < len(taps)
        if geometry.attained:
            attained += 1
            assert abs(bound - truth) <= 1e-12 * (1 + truth), (conv, len(taps))
    assert found > 1400 and cropped > 300 and attained > 200, (found, cropped, attained)


@pytest.mark.parametrize("seed", range(40))
def test_output_shape_and_padding_are_the_layers(seed):
    """Of generated layers, the number of outputs is the oracle's, along each axis."""
    geometry = generate(seed)
    resolved = resolve(geometry.conv, (*geometry.taps, *geometry.channels))
    matrix = geometry.oracle(np.ones((*geometry.taps, *geometry.channels)))  # its values: as many as the smaller side
    rows = np.prod(resolved.output_shape) * geometry.channels[1]
    columns = np.prod(geometry.conv.input_shape) * geometry.channels[0] * geometry.conv.feature_group_count
    assert len(matrix) == min(rows, columns)
    assert resolved.exact == geometry.exact


def test_no_output_is_an_error():
    with pytest.raises(ValueError, match=r"output shape \(0,\) from input_shape=\(2,\), taps \(3,\) and padding"):
        resolve(oj.Conv((2,), padding="VALID"), (3, 1, 1))


def test_geometry_is_hashable_and_resolved_once():
    conv = oj.Conv((8, 8))
    assert resolve(conv, (3, 3, 2, 2)) is resolve(oj.Conv((8, 8)), (3, 3, 2, 2))
    assert hash(resolve(conv, (3, 3, 2, 2))) != hash(resolve(conv, (3, 3, 2, 4)))


def test_the_coarse_grid_of_three_taps_has_five_points():
    plan = resolve(oj.Conv((32, 32)), (3, 3, 2, 2)).plan
    coarse, factor = coarse_plan(plan)
    assert coarse.grid == (5, 5) and 1.5 < factor < 1.54  # 1 / cos(pi / 5) squared


def test_half_grid_holds_one_of_each_pair():
    half = half_grid((4, 6))
    assert len(half.frequencies) == 14 and abs(half.weights.sum() - 1) < 1e-12  # four are their own mirror
    for point, position in zip(np.ndindex(4, 6), half.expand):
        found = half.frequencies[position]
        assert (found == point).all() or (found == -np.array(point) % (4, 6)).all()


def test_caches_are_bounded_by_bytes():
    """Many large grids leave no more than the limit, and what was dropped is computed again, the same."""
    first = half_grid((700, 700))
    for n in range(20):
        half_grid((700, 701 + n))
    sizes = [size for _, size in half_grid.kept.values()]
    assert sum(sizes) <= _cache.LIMIT and len(sizes) > 1
    assert (((700, 700),), ()) not in half_grid.kept and half_grid((700, 720)) is half_grid((700, 720))
    for one, again in zip(first, half_grid((700, 700)), strict=True):
        np.testing.assert_array_equal(one, again)


def test_a_result_beyond_the_limit_is_kept_alone():
    cached = _cache.cached_arrays(lambda n: np.zeros(n, np.uint8))
    large = cached(_cache.LIMIT + 1)
    assert cached(_cache.LIMIT + 1) is large
    cached(10)
    assert [key for key in cached.kept] == [((10,), ())]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(8, 3, 1, 1, 1, 0), 2),
        (Axis(12, 3, 1, 1, 4, 0), 8),
        (Axis(12, 4, 3, 1, 1, 0), 1),  # taps 0 to 3 of every third pixel
        (Axis(24, 5, 1, 2, 1, 0), 2),
        (Axis(6, 1, 1, 1, 1, 0), 0),
    ],
)
def test_span_is_that_of_the_taps_on_a_line(axis, expected):
    assert span(axis) == expected
