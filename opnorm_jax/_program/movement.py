"""What padding a convolution really has, told by which pixel of an image each pixel of its input is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pixels(NamedTuple):
    """One axis of an image that is made of another's pixels."""

    axis: int  # of the other image
    index: np.ndarray  # of each pixel, along that axis; -1 for a zero


class Side(NamedTuple):
    """One spatial axis of a convolution."""

    pixels: Pixels | None  # None: an inserted axis
    taps: int
    stride: int
    input_dilation: int
    kernel_dilation: int
    pads: tuple[int, int]
    outputs: int
    flipped: bool


def input_and_padding(sides: list[Side]) -> list[tuple[int, tuple[int, int] | None]]:
    """Per axis the input's length and its padding, ``None`` for circular: all are, or none is."""
    each = [_side(side) for side in sides]
    if all(pads is not None for _, pads in each):
        return each
    out: list[tuple[int, tuple[int, int] | None]] = []
    for side, (n, pads) in zip(sides, each):
        trivial = side.taps == 1 and pads == (0, 0) and side.outputs == -(-n // side.stride)
        if pads is not None and not trivial:
            raise ValueError("padded around along one axis and with zeros along another: no Conv says so")
        out.append((n, None))
    return out


def _side(side: Side) -> tuple[int, tuple[int, int] | None]:
    pixels = side.pixels.index if side.pixels else np.zeros(1, int)
    filled = np.flatnonzero(pixels >= 0)
    low, high = (int(filled[0]), len(pixels) - 1 - int(filled[-1])) if len(filled) else (0, 0)
    core = pixels[low : len(pixels) - high]
    distinct = len(np.unique(core[core >= 0]))
    s, e = side.stride, side.input_dilation
    if distinct == np.count_nonzero(core >= 0):
        n = len(core)
        before, after = (int(pad) + zeros * e for pad, zeros in zip(side.pads, (low, high)))
        if side.flipped:  # the mirror image of a layer with the other end's padding, as far as it is used
            reach = side.kernel_dilation * (side.taps - 1)
            before, after = s * (side.outputs - 1) + reach - (n - 1) * e - before, before
        return n, (before, after)
    # Rotating or mirroring a circle of pixels changes no singular value: all that matters is that they come round.
    if not (np.array_equal(core[distinct:], core[:-distinct]) and core.min() >= 0):
        raise ValueError("its input is padded with copies of itself (reflected, edge or symmetric): no Conv says so")
    if any(side.pads) or low or high or e > 1 or side.outputs != -(-distinct // s):
        raise ValueError("its input is padded around, but the convolution is not the circular one: no Conv says so")
    return distinct, None
