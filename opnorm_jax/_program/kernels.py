"""Parameters on their way to a convolution or a matrix product, and what layer they are there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from opnorm_jax._conv import SPATIAL_LETTERS, Conv
from opnorm_jax._program.movement import HOLE, ElementMap, of_axes

Test = Callable[[], bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A parameter, or one member of a stack, whose numbers were only moved."""

    leaf: int
    elements: ElementMap  # of the parameter
    swept: tuple[np.ndarray, ...] = ()  # entries of the axes that a loop or an unknown index takes apart


def same_kernel(one: Kernel, other: Kernel | None) -> bool:
    if one is other:
        return True
    if other is None or one.leaf != other.leaf or one.elements.shape != other.elements.shape:
        return False
    return np.array_equal(one.elements.numbers(), other.elements.numbers()) and all(
        map(np.array_equal, one.swept, other.swept)
    )


def member(kernel: Kernel, axis: int) -> Kernel | None:
    """Returns one of the kernels stacked along an axis, which goes."""
    axes = list(kernel.elements.axes)  # type: ignore[arg-type]
    swept = axes.pop(axis)
    if not axes:
        return None
    axes[0] = axes[0] + swept[0]
    return Kernel(kernel.leaf, of_axes(kernel.elements, axes), (*kernel.swept, swept))


def sliced(kernel: Kernel, shape: tuple[int, ...]) -> Kernel | None:
    """Returns one of the kernels of a stack, at an index that is not known."""
    axes, swept = list(kernel.elements.axes), list(kernel.swept)  # type: ignore[arg-type]
    for n, (old, new) in enumerate(zip(kernel.elements.shape, shape, strict=True)):
        if new not in (1, old):
            return None
        if new != old:
            swept.append(axes[n])
            axes[n] = axes[n][:1]
    return Kernel(kernel.leaf, of_axes(kernel.elements, axes), tuple(swept))


class Axes:
    """Which axes of a parameter the axes of an operand run along."""

    def __init__(self, kernel: Kernel, shape: tuple[int, ...]):
        elements = kernel.elements
        if elements.axes is None or min(int(entries.min()) for entries in elements.axes) <= HOLE // 2:
            raise ValueError("its numbers are rearranged before the convolution takes it")
        self.shape, self.operand = shape, elements.shape
        corner = sum(int(entries[0]) for entries in elements.axes)
        at = lambda entries: np.stack(np.unravel_index(corner + entries - entries[0], shape))
        self.places = [at(entries) for entries in elements.axes]  # (axis of the parameter, along the operand's axis)
        vary = lambda places: [axis for axis in range(len(shape)) if np.ptp(places[axis])]
        self.along = [vary(places) for places in self.places]
        self.swept = [axis for entries in kernel.swept for axis in vary(at(entries))]
        self.letters: dict[int, str] = {}  # by axis of the parameter
        used = [axis for along in (*self.along, self.swept) for axis in along]
        if len(used) > len(set(used)):
            raise ValueError("one of its axes is taken apart before the convolution takes it")
        self.left = [axis for axis in range(len(shape)) if axis not in used]
        for n, (along, length) in enumerate(zip(self.along, self.operand)):
            covered = math.prod(shape[axis] for axis in along)
            if len(np.unique(elements.axes[n])) < length:
                raise ValueError(f"it is repeated before the convolution takes it as {self.operand}")
            if covered != length:
                raise ValueError(f"the convolution takes a part of it, {self.operand}")

    def assign(self, letters: dict[int, str], groups: int, is_one_image: Test, is_split: Test) -> int:
        """Gives the parameter's axes the letters of the operand's, and returns the groups of one kernel.

        ``vmap`` merges a stack of kernels into output channels: as groups if each has an input of its own.

        Args:
          letters: of the operand's axes.
          groups: the equation's ``feature_group_count``.
          is_one_image: tells whether it is certain that the image was not merged from several; called only if needed.
          is_split: tells whether the output channels are taken apart again, as ``vmap`` does; called only if needed.
        """
        missing, own_groups = [], groups
        for n, along in enumerate(self.along):
            if not along:
                missing.append(letters[n])
                continue
            (*stack, axis), is_shared = [*along], True
            if stack:
                (*stack, axis), is_shared = self._slowest_first(n, groups, is_one_image, is_split)
            if stack and letters[n] != "O":
                raise ValueError("several of its axes become one before the convolution takes it")
            members = math.prod(self.shape[other] for other in stack)
            if not is_shared and groups % members:
                raise ValueError(f"its {members} stacked kernels share {groups} groups")
            if letters[n] == "O":
                own_groups = groups if is_shared else groups // members
            self.swept += stack
            self.letters[axis] = letters[n]
            is_straight = bool(stack) or np.array_equal(self.places[n][axis], np.arange(self.shape[axis]))
            # The order of channels changes no norm, except that output channels must not change their group.
            free = letters[n] == "I" or (letters[n] == "O" and own_groups == 1)
            if not (is_straight or free or (letters[n] not in "IO" and self.is_flipped(n))):
                raise ValueError("its numbers are rearranged along an axis before the convolution takes it")
        single = [axis for axis in self.left if self.shape[axis] == 1]
        if len(single) < len(missing) and len(single) < len(self.left):
            raise ValueError(f"the convolution takes a part of it, {self.operand}")
        if len(single) < len(missing):
            raise ValueError(
                f"an axis is inserted before the convolution takes it as {self.operand}: store it with all of its axes "
                "(a depthwise kernel of Keras with depth_multiplier above 1 has no Conv)"
            )
        # Axes of length 1 are all alike: the usual layouts first.
        spatial = sorted(set(letters.values()) - {"I", "O"}, key="DHW".index)
        usual = ["".join(spatial) + "IO", "OI" + "".join(spatial), "".join(spatial) + "OI"]
        choices = []
        for chosen in itertools.permutations(single[len(single) - len(missing) :]):
            of = self.letters | dict(zip(chosen, missing))
            text = "".join(of[axis] for axis in sorted(of))
            choices.append((usual.index(text) if text in usual else len(usual), text, of))
        self.letters = min(choices, key=lambda choice: choice[:2])[2] if missing else self.letters
        return own_groups

    def _slowest_first(self, n: int, groups: int, is_one_image: Test, is_split: Test) -> tuple[list[int], bool]:
        """Returns the parameter's axes along one of the operand's, if they were merged as by ``vmap``.

        Also whether the merged kernels share their input: then groups, if any, come before the members. Both readings
        may be possible. That with an input for each, whose norms are the layer's, then holds unless it is ruled out.
        """
        along, shared, apart = self.along[n], [], []
        matches = lambda axes, lines: all(np.array_equal(self.places[n][a], line) for a, line in zip(axes, lines))
        for axes in itertools.permutations(along):
            *lengths, length = (self.shape[axis] for axis in axes)
            if matches(axes, np.indices([*lengths, length]).reshape(len(along), -1)):
                (shared if groups == 1 else apart).append([*axes])
            elif length % groups == 0:
                first, *members, last = np.indices([groups, *lengths, length // groups]).reshape(len(along) + 1, -1)
                if matches(axes, [*members, first * (length // groups) + last]):
                    shared.append([*axes])
        if shared and is_split() and (not apart or is_one_image()):
            return shared[0], True
        if apart:
            return apart[0], False
        raise ValueError("several of its axes become one before the convolution takes it")

    def layout(self) -> tuple[str, tuple[int, ...]]:
        """Returns the layout of one kernel, and the axes along which kernels are stacked."""
        axes = range(len(self.shape))
        stacked = tuple(axis for axis in axes if axis not in self.letters)
        return "".join(self.letters[axis] for axis in axes if axis in self.letters), stacked

    def is_flipped(self, n: int) -> bool:
        """Tells whether the operand's axis runs through one of the parameter's backwards."""
        along = self.along[n]
        return len(along) == 1 and np.array_equal(self.places[n][along[0]], np.arange(self.operand[n])[::-1])


def read_matrix(kernel: Kernel, contracted: Any, batched: Any, shape: tuple, free: list[int]) -> Conv | str | None:
    """A parameter in a matrix product: a 1 x 1 convolution if axes of length 1 went, otherwise a dense layer."""
    rank = len(kernel.elements.shape)
    if rank < 2:
        return None
    try:
        axes = Axes(kernel, shape)
    except ValueError as error:
        return str(error)
    outs = [n for n in range(rank) if n not in contracted and n not in batched]
    if len(contracted) != 1 or len(outs) != 1 or any(len(along) > 1 for along in axes.along):
        return "multiplies along several of its axes: it is no matrix"
    single = [axis for axis in axes.left if shape[axis] == 1]
    letters = {}
    for n, letter in ((outs[0], "O"), (contracted[0], "I")):
        if not axes.along[n] and not single:
            return "an axis is inserted before it is multiplied: it is no matrix"
        letters[axes.along[n][0] if axes.along[n] else single.pop()] = letter
    stack = [axis for axis in axes.swept] + [axis for axis in axes.left if shape[axis] != 1]
    stack += [axis for n in batched for axis in axes.along[n]]
    single = [axis for axis in single if axis not in axes.swept]
    if len(single) >= len(SPATIAL_LETTERS):
        return "multiplies along several of its axes: it is no matrix"
    letters |= dict(zip(single, SPATIAL_LETTERS[len(single)]))
    # The free axes of the image: batch and space, if there are as many.
    spatial = len(single)
    input_shape = free[-spatial:] if spatial and len(free) in (spatial, spatial + 1) else [1] * spatial
    layout = "".join(letters[axis] for axis in sorted(letters))
    return Conv(tuple(input_shape), padding=((0, 0),) * spatial, kernel_layout=layout, stacked=stack)
