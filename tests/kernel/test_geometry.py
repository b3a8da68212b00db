"""Static geometry against explicit loops over pixels. Nothing here computes with jax."""

import numpy as np
import pytest
from geometries import generate

import opnorm_jax as oj
from opnorm_jax._geometry import coarse_plan, half_grid, resolve


def layer_matrix(geometry, taps):
    """One axis' 0/1 matrix per tap of the layer: (taps, outputs, inputs), from the definition."""
    conv = geometry.conv
    (n,), (s,), (e,), (d,) = conv.input_shape, conv.strides, conv.input_dilation, conv.kernel_dilation
    ((low, _),), (outs,) = geometry.pads, geometry.output_shape
    matrix = np.zeros((taps, outs, n))
    for j in range(taps):
        for t in range(outs):
            place = s * t + d * j - low
            if geometry.circular:
                place %= n * e
            if place % e == 0 and 0 <= place // e < n:
                matrix[j, t, place // e] = 1
    return matrix


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


@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME", "VALID", ((2, -1),)], ids=str)
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_the_embedding_bounds_the_layer_in_one_dimension(padding, stride, dilation):
    """In float64, by loops: the norm of a layer is at most that of the circular layer on the embedding's circle."""
    taps, n = 3, 9
    conv = oj.Conv((n,), strides=stride, padding=padding, kernel_dilation=dilation)
    geometry = resolve(conv, (taps, 1, 1))
    kernel = np.random.default_rng(0).standard_normal(taps)
    own = np.linalg.norm(np.einsum("j,jtp->tp", kernel, layer_matrix(geometry, taps)), 2)
    (axis,) = geometry.plan.axes
    circle = np.zeros((axis.period // axis.stride, axis.period))
    for t, row in enumerate(circle):
        for j in range(taps):
            row[(axis.stride * t + axis.kernel_dilation * j) % axis.period] += kernel[j]
    assert own <= np.linalg.norm(circle, 2) * (1 + 1e-12)


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
