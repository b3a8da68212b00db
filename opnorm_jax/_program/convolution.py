"""Reads a convolution's equation: what layer it applies to the image that it is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from opnorm_jax._conv import SPATIAL_LETTERS, Conv
from opnorm_jax._geometry import padding_entries
from opnorm_jax._program.movement import HOLE, ElementMap


class Axis(NamedTuple):
    """One spatial axis of a convolution's equation."""

    entries: np.ndarray  # which pixel of the image each pixel of the operand is, by number; HOLE for a zero
    taps: int
    stride: int
    input_dilation: int
    kernel_dilation: int
    pads: tuple[int, int]
    outputs: int
    is_flipped: bool  # whether the kernel was reversed along this axis beforehand


def kernel_letters(eqn: Any) -> str:
    """``O``, ``I`` and the spatial letters, in the order of ``rhs_spec``."""
    rank = len(eqn.params["dimension_numbers"].rhs_spec) - 2
    if not 1 <= rank < len(SPATIAL_LETTERS):
        raise ValueError(f"it has {rank} spatial axes")
    return "OI" + SPATIAL_LETTERS[rank]


def read_convolution(
    eqn: Any,
    image: ElementMap | None,
    layout: str,
    is_flipped: Sequence[bool],
    *,
    groups: int | None = None,
    stacked: int | tuple[int, ...] = 0,
) -> Conv:
    """Returns the ``Conv`` of an equation; a ValueError says why none describes it.

    Args:
      eqn: the equation.
      image: which element of an earlier image each element of the operand is; None if the operand is the image.
      layout: of the kernel.
      is_flipped: for each spatial axis, whether the kernel was reversed before.
      groups: of one kernel, if ``jax.vmap`` has put several side by side; otherwise the equation's.
      stacked: as in ``Conv``.
    """
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["batch_group_count"] != 1:
        raise ValueError("it has batch_group_count above 1 (does fn contain its own gradient?)")
    if image is None:
        entries = [np.arange(shape[n]) for n in numbers.lhs_spec[2:]]
    else:
        entries = _spatial_entries(image, numbers.lhs_spec)
    axes = zip(
        entries,
        [kernel[n] for n in numbers.rhs_spec[2:]],
        eqn.params["window_strides"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        eqn.params["padding"],
        [out_shape[n] for n in numbers.out_spec[2:]],
        is_flipped,
        strict=True,
    )
    inputs = _inputs([Axis(*axis) for axis in axes])
    return Conv(
        tuple(n for n, _, _ in inputs),
        strides=eqn.params["window_strides"],
        padding=tuple(pads for _, pads, _ in inputs),
        input_dilation=tuple(dilation for _, _, dilation in inputs),
        kernel_dilation=eqn.params["rhs_dilation"],
        feature_group_count=groups or eqn.params["feature_group_count"],
        kernel_layout=layout,
        stacked=stacked,
    )


def is_adjoint(one: Conv, other: Conv, shape: Sequence[int]) -> bool:
    """Tells whether two layers with the same kernel are each other's transpose, perhaps mirrored.

    Then their norms are equal, as for an encoder and a decoder that share a kernel.
    """
    transposed = _adjoint(one, shape)
    return transposed is not None and _trimmed(transposed, shape) == _trimmed(other, shape)


def _adjoint(conv: Conv, shape: Sequence[int]) -> Conv | None:
    """Returns the transpose of a layer, mirrored; None if no ``Conv`` with the same kernel is that."""
    sizes, letters = dict(zip(conv.kernel_layout, shape)), conv.kernel_layout
    if conv.feature_group_count == 1:
        letters = letters.translate(str.maketrans("IO", "OI"))
    elif (sizes["I"], sizes["O"]) != (1, conv.feature_group_count):
        return None
    outputs, pads = [], []
    for axis in _plain_axes(conv, sizes):
        n, reach, stride, dilation, pad = axis
        if pad == "CIRCULAR":
            outputs.append(n * dilation // stride)
            pads.append(pad)
            if n * dilation % stride:
                return None
        elif isinstance(pad, str):
            return None
        else:
            outputs.append(_used(axis) // stride + 1)
            high = reach - pad[0]
            pads.append(((n - 1) * dilation + reach - high - (outputs[-1] - 1) * stride, high))
    return dataclasses.replace(
        conv,
        input_shape=tuple(outputs),
        strides=conv.input_dilation,
        input_dilation=conv.strides,
        padding=tuple(pads),
        kernel_layout=letters,
    )


def _trimmed(conv: Conv, shape: Sequence[int]) -> Conv:
    """Returns the same layer without padding that strides step over; with one tap, one of two mirror images."""
    pads = []
    for axis in _plain_axes(conv, dict(zip(conv.kernel_layout, shape))):
        _, reach, stride, _, pad = axis
        if not isinstance(pad, str):
            pad = pad[0], pad[1] - _used(axis) % stride
            pad = pad if reach else min(pad, pad[::-1])
        pads.append(pad)
    return dataclasses.replace(conv, padding=tuple(pads))


def _plain_axes(conv: Conv, sizes: dict[str, int]) -> list[tuple[int, int, int, int, Any]]:
    """Lists for each axis its pixels, how far its taps reach, its stride, its input dilation and its padding."""
    taps = [sizes[letter] for letter in SPATIAL_LETTERS[len(conv.input_shape)]]
    reach = [dilation * (k - 1) for dilation, k in zip(conv.kernel_dilation, taps)]
    return list(zip(conv.input_shape, reach, conv.strides, conv.input_dilation, padding_entries(conv), strict=True))


def _used(axis: tuple[int, int, int, int, Any]) -> int:
    """Counts the places at which a kernel fits, less one, if there were no strides."""
    n, reach, _, dilation, (low, high) = axis
    return (n - 1) * dilation + low + high - reach


def _spatial_entries(image: ElementMap, spec: Sequence[int]) -> list[np.ndarray]:
    """Returns the entries of the spatial axes, of an image each of whose other axes holds every element once."""
    if len(image.sources) != 1:
        raise ValueError("its input was put together from pieces of several arrays")
    if image.axes is None:
        raise ValueError("its input's pixels were rearranged in a way that is not axis by axis")
    for n, name in zip(spec[:2], ("batch", "channel")):
        entries = image.axes[n]
        if (entries <= HOLE // 2).any():
            raise ValueError(f"its input is padded with constants along the {name} axis")
        if len(np.unique(entries)) < len(entries):
            raise ValueError(f"its input holds copies of the same elements along the {name} axis")
    if not image.is_independent:
        raise ValueError("its input holds elements of an earlier array more than once, not axis by axis")
    source = image.sources[0]
    if source.seam is not None:
        step, length = math.prod(source.shape[source.seam + 1 :]), source.shape[source.seam]
        corner = sum(int(entries[np.argmax(entries > HOLE // 2)]) for entries in image.axes)
        for n in spec[2:]:
            held = image.axes[n][image.axes[n] > HOLE // 2]
            if len(np.unique((corner + held - held[:1]) // step % length)) > 1:
                raise ValueError("its input was put together from several arrays along a spatial axis")
    return [image.axes[n] for n in spec[2:]]


def _inputs(axes: list[Axis]) -> list[tuple[int, Any, int]]:
    """Returns for each axis the input's length, its padding as ``Conv`` takes it, and its dilation."""
    each = [_zero_padded(axis) or _copied(axis) for axis in axes]
    circular = [pads == "CIRCULAR" for _, pads, _ in each]
    whole = [
        axis.taps == 1 and pads == (0, 0) and axis.outputs == -(-n * dilation // axis.stride)
        for axis, (n, pads, dilation) in zip(axes, each)
    ]
    if any(circular) and all(c or w for c, w in zip(circular, whole)):  # then that is one way to put it
        return [(n, "CIRCULAR", dilation) for n, _, dilation in each]
    return each


def _zero_padded(axis: Axis) -> tuple[int, tuple[int, int], int] | None:
    """Returns the axis as one that is padded with zeros, if every pixel occurs once."""
    held = np.flatnonzero(axis.entries > HOLE // 2)
    if not len(held):
        raise ValueError("its input holds constants only")
    if len(np.unique(axis.entries[held])) < len(held):
        return None
    gaps = np.unique(np.diff(held))
    if len(gaps) > 1:
        raise ValueError("its input's pixels have constants between them, at no regular distance")
    spacing = int(gaps[0]) if len(gaps) else 1  # zeros between the pixels are an input dilation
    n, s, e = len(held), axis.stride, axis.input_dilation
    low = axis.pads[0] + int(held[0]) * e
    high = axis.pads[1] + (len(axis.entries) - 1 - int(held[-1])) * e
    if axis.is_flipped:  # the mirror image of a layer with the other end's padding, as far as it is used
        reach = axis.kernel_dilation * (axis.taps - 1)
        low, high = s * (axis.outputs - 1) + reach - (n - 1) * e * spacing - low, low
    return n, (low, high), e * spacing


def _copied(axis: Axis) -> tuple[int, str, int]:
    """Returns the axis as one that is padded with its own pixels, or a ValueError that says what it is instead."""
    try:
        return _circular(axis)
    except ValueError:
        entries, reach = axis.entries, axis.kernel_dilation * (axis.taps - 1)
        n, low, high = len(entries) - reach, reach // 2, reach - reach // 2
        alone = axis.input_dilation == 1 and axis.pads == (0, 0) and entries.min() > HOLE // 2
        # A reversed kernel mirrors the layer, and its padding.
        if alone and n > 0 and len(np.unique(entries)) == n and (low == high or not axis.is_flipped):
            if (mode := _padded_by(entries, low, n)) in ("edge", "reflect"):
                return n, mode.upper(), 1
        raise


def _circular(axis: Axis) -> tuple[int, str, int]:
    """Returns the axis as a circular one, or a ValueError that says what it is instead.

    Rotating or mirroring a circle of pixels changes no singular value. All that matters is that the pixels come round,
    that the outputs are those of the whole circle, and that no tap reads beyond the copies.
    """
    entries, e, s = axis.entries, axis.input_dilation, axis.stride
    n = len(np.unique(entries))
    if entries.min() <= HOLE // 2 or not np.array_equal(entries[n:], entries[:-n]):
        raise ValueError(f"its input is padded with copies of its own pixels ({_mode(entries)}): no Conv says so")
    last = s * (axis.outputs - 1) + axis.kernel_dilation * (axis.taps - 1) - axis.pads[0]
    reads_copies_only = axis.pads[0] < e and last < len(entries) * e
    if not reads_copies_only or axis.outputs != -(-n * e // s) or min(s, e) > 1:
        raise ValueError("its input is padded circularly, but the convolution is not the circular one: no Conv says so")
    return n, "CIRCULAR", e


def _mode(entries: np.ndarray) -> str:
    """Returns the name of a padding that repeats pixels, as ``np.pad`` calls it."""
    distinct = len(np.unique(entries[entries > HOLE // 2]))
    if len(entries) <= 512 and entries.min() > HOLE // 2:
        for low in range(len(entries) - distinct + 1):
            if len(np.unique(entries[low : low + distinct])) == distinct and (
                mode := _padded_by(entries, low, distinct)
            ):
                return mode
    most = int(np.unique(entries, return_counts=True)[1].max())
    return f"up to {most} of each, at no place that is a known padding"


def _padded_by(entries: np.ndarray, low: int, n: int) -> str:
    """Returns the mode by which ``np.pad`` makes ``entries`` from its n entries at ``low``; empty if none does."""
    core, pads = entries[low : low + n], (low, len(entries) - n - low)
    for mode in ("edge", "reflect", "symmetric"):
        if np.array_equal(np.pad(core, pads, mode=mode), entries):  # type: ignore[call-overload]
            return mode
    return ""
