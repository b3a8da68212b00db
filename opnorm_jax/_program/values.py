"""What is known of the variables of a program while its convolutions are looked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from opnorm_jax._conv import Conv, Unknown, check_kernel, member_shape
from opnorm_jax._program.convolution import is_adjoint
from opnorm_jax._program.kernels import Kernel, same_kernel
from opnorm_jax._program.movement import ElementMap, NotUnderstood, Source, identity


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of one variable."""

    shape: tuple[int, ...] = ()
    leaves: frozenset[int] = frozenset()  # parameters it was computed from
    kernels: frozenset[int] = frozenset()  # those of them that it still has the numbers of, each changed by itself
    ops: tuple[str, ...] = ()  # by what
    from_input: bool = False
    captured: bool = False  # computed from an array that fn captured by closure
    constant: Callable[[], np.ndarray] | None = None  # gives its value, if nothing traced is in it
    kernel: Kernel | None = None
    movement: Callable[[], ElementMap] | None = None  # gives the map of its elements; None: it is an array of its own
    output: Output | None = None  # the layer that it is the output of, at most moved since

    @functools.cached_property
    def elements(self) -> ElementMap:
        """Which element of earlier arrays each element is. Raises ``NotUnderstood``."""
        if self.movement:
            return self.movement()
        return self.kernel.elements if self.kernel else identity(Source(self.shape))

    def use(self) -> None:
        """Notes that something is computed from a layer's output, as far as that is wrapped around by now."""
        if self.output:
            self.output.site.uses.append(self.output.periods)


@dataclasses.dataclass(eq=False)
class Site:
    """One application of a layer to a parameter."""

    found: Conv | str  # the reason why there is none
    spatial: dict[int, int] = dataclasses.field(default_factory=dict)  # the output's spatial axes and their lengths
    covers: tuple[bool, ...] = ()  # whether the output holds all that the kernel reaches
    image: Value | None = None  # the layer's input
    # The periods of its output where that was wrapped around, and those at each use of it.
    wraps: list[dict[int, int]] = dataclasses.field(default_factory=list)
    uses: list[dict[int, int]] = dataclasses.field(default_factory=list)

    def decided(self) -> Conv | str:
        if not self.wraps or isinstance(self.found, str):
            return self.found
        conv, periods = self.found, max(self.wraps, key=len)
        if any(use != periods for use in self.uses):
            return "its output is used both wrapped around and as it is: no Conv says so"
        circle = tuple(n * e for n, e in zip(conv.input_shape, conv.input_dilation))
        wrapped = tuple(periods.get(axis, length) for axis, length in self.spatial.items())
        if wrapped == circle and set(conv.strides) == {1} and all(self.covers):
            return dataclasses.replace(conv, padding="CIRCULAR")
        return "its output is wrapped around and summed, but not as by a circular convolution: no Conv says so"


class Output(NamedTuple):
    """The output of a layer, perhaps wrapped around since."""

    site: Site
    periods: dict[int, int] = {}  # of the axes along which it is wrapped


class Sites:
    """Where parameters feed convolutions."""

    def __init__(self, leaves: list[Any], dense: bool):
        self.leaves, self.dense = leaves, dense
        self.of: dict[int, list[Site]] = {}
        self.unowned: list[str] = []
        self.recording = True

    def add(self, leaf: int, site: Site) -> None:
        if self.recording:
            self.of.setdefault(leaf, []).append(site)

    def add_reason(self, leaves: Iterable[int], reason: str) -> None:
        for leaf in leaves:
            self.add(leaf, Site(reason))

    def add_unowned(self, reason: str) -> None:
        if self.recording:
            self.unowned.append(reason)

    def check(self, leaf: int, conv: Conv) -> None:
        """Raises what is wrong with a parameter as a kernel, such as a complex dtype."""
        shape, dtype = self.leaves[leaf].shape, self.leaves[leaf].dtype
        check_kernel(jax.ShapeDtypeStruct(member_shape(shape, conv), dtype), conv)

    def decide(self, leaf: int) -> Conv | Unknown:
        uses = [site.decided() for site in self.of[leaf]]
        for use in uses:
            if isinstance(use, str):
                return Unknown(use)
        first, *others = different = list(dict.fromkeys(uses))
        shape = member_shape(self.leaves[leaf].shape, first)  # type: ignore[arg-type]
        if all(is_adjoint(first, other, shape) for other in others):  # type: ignore[arg-type]
            return first  # type: ignore[return-value]
        listed = "; ".join(map(str, different))
        return Unknown(f"used with {len(different)} geometries (shared, or fn contains its own gradient?): {listed}")


def computed(name: str, ins: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """Returns the value of a result of which nothing is known except what it was computed from."""
    from_input = any(value.from_input for value in ins)
    ops = tuple(dict.fromkeys([*(op for value in ins for op in value.ops), name]))
    leaves = frozenset().union(*(value.leaves for value in ins))
    kernels = frozenset().union(*(value.kernels for value in ins if value.shape == shape))
    return Value(shape, leaves, kernels, ops, from_input, any(value.captured for value in ins))


def join(one: Value, other: Value) -> Value:
    """Returns what holds of a variable that has either value."""
    if one is other or (one.kernel is not None and same_kernel(one.kernel, other.kernel)):
        return one
    one.use()
    other.use()
    joined = computed("a loop or a branch that changes it", [one, other], one.shape)
    return dataclasses.replace(joined, movement=lambda: unmoved([one, other], "one of the branches that join"))


def unmoved(values: Sequence[Value], where: str, shape: tuple[int, ...] | None = None) -> ElementMap:
    """Returns the map of an array that counts as one of its own, if none of ``values`` holds copies or constants.

    Those of fn's input count; if there are none, those that were moved, because the image may be made inside.
    """
    followed = [value for value in values if value.from_input] or [value for value in values if value.movement]
    for value in followed:
        if not value.elements.is_injective:
            raise NotUnderstood(f"its input was padded or copied before {where}")
    return identity(Source(values[0].shape if shape is None else shape))


def entering_a_loop(value: Value) -> Value:
    if value.kernel or not (value.from_input or value.output or value.movement):
        return value
    value.use()
    return dataclasses.replace(value, output=None, movement=lambda: unmoved([value], "it entered a loop"))
