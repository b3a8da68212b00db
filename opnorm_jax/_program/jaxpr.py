"""What this library asks of a traced program.

jax promises neither the names of primitives nor the layout of their parameters: every such import is here, and the
tests of what uses it run on the oldest supported and on the newest jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core import primitives as p

from opnorm_jax._conv import SPATIAL_LETTERS, Conv
from opnorm_jax._program.movement import Pixels, Side, input_and_padding

__all__ = [
    "Literal",
    "all_pixels",
    "conv_of",
    "is_identity",
    "kernel_letters",
    "moved_pixels",
    "opened",
    "p",
    "programs_inside",
    "relabelled",
    "scan_split",
]

# Identity on their operands, one by one. By object where jax exports it; the names are of those it does not.
_IDENTITIES = {p.convert_element_type_p, p.copy_p, p.name_p, p.reduce_precision_p, p.sharding_constraint_p}
_IDENTITY_NAMES = {"device_put", "optimization_barrier", "pcast", "pvary", "reshard", "stop_gradient"}


def is_identity(eqn: Any) -> bool:
    """Whether each result is the operand in its place, at most cast to another dtype."""
    return eqn.primitive in _IDENTITIES or eqn.primitive.name in _IDENTITY_NAMES


def programs_inside(eqn: Any) -> list[Any]:
    """The programs that an equation holds, with their constants where they have any."""
    found = []
    for value in eqn.params.values():
        several = value if isinstance(value, (tuple, list)) else (value,)
        found += [item for item in several if isinstance(item, (ClosedJaxpr, Jaxpr))]
    return found


def opened(program: Any) -> Any:
    """The jaxpr inside a closed one, or itself."""
    return getattr(program, "jaxpr", program)  # jax 0.11 on makes no difference between open and closed


def scan_split(eqn: Any, jaxpr: Any) -> tuple[int, int]:
    """Numbers of constants and of carries among a scan's operands, told by ranks: what is scanned loses an axis."""
    same_rank = lambda outside, inside: sum(v.aval.ndim == w.aval.ndim for v, w in zip(outside, inside, strict=True))
    carry = same_rank(eqn.outvars, jaxpr.outvars)
    return same_rank(eqn.invars, jaxpr.invars) - carry, carry


def relabelled(eqn: Any) -> list[int | None] | None:
    """For each axis of the result the operand's axis (None: inserted, of length 1), if axes are all that moves."""
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive is p.transpose_p:
        return list(eqn.params["permutation"])
    if eqn.primitive is p.squeeze_p or eqn.primitive.name == "reduce_sum":
        dropped = eqn.params["dimensions" if eqn.primitive is p.squeeze_p else "axes"]
        return [n for n in range(len(shape)) if n not in dropped] if all(shape[n] == 1 for n in dropped) else None
    if eqn.primitive is p.broadcast_in_dim_p:
        to = eqn.params["broadcast_dimensions"]
        labels = [to.index(n) if n in to else None for n in range(len(out_shape))]
    elif eqn.primitive is p.reshape_p and eqn.params.get("dimensions") is None:
        labels, left = [], list(range(len(shape)))  # from the last axis on, passing over lengths of 1
        for length in reversed(out_shape):
            while left and shape[left[-1]] == 1 != length:
                left.pop()
            labels.insert(0, left.pop() if left and shape[left[-1]] == length else None)
        if any(shape[n] != 1 for n in left):
            return None
    else:
        return None
    alike = all(length == (1 if n is None else shape[n]) for n, length in zip(labels, out_shape, strict=True))
    return labels if alike else None


def all_pixels(shape: tuple[int, ...]) -> tuple[Pixels, ...]:
    """The pixels of an image that is its own origin."""
    return tuple(Pixels(axis, np.arange(length)) for axis, length in enumerate(shape))


def moved_pixels(
    eqn: Any, parts: Sequence[tuple[Pixels | None, ...] | None], one_image: bool, zeros: bool
) -> tuple[Pixels | None, ...] | None:
    """Which pixels of the image behind its operands those of a result are; ``None`` if that cannot be said.

    ``parts`` are the operands' pixels (``None``: the image itself); ``one_image``: all are of the same; ``zeros``: the
    last operand is zero.
    """
    filled = [part or all_pixels(v.aval.shape) for part, v in zip(parts, eqn.invars)]
    axes = filled[0]
    labels = relabelled(eqn)
    if labels is not None:
        return tuple(None if n is None else axes[n] for n in labels)
    if eqn.primitive is p.concatenate_p:
        return _joined(filled, eqn.params["dimension"]) if one_image else None
    if None in axes:
        return None
    if eqn.primitive is p.slice_p:
        bounds = eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"] or [1] * len(axes)
        return _picked(axes, [slice(*ends) for ends in zip(*bounds, strict=True)])
    if eqn.primitive is p.rev_p:
        return _picked(axes, [slice(None, None, -1 if n in eqn.params["dimensions"] else 1) for n in range(len(axes))])
    if eqn.primitive is p.pad_p and zeros:
        return _zero_padded(axes, eqn.params["padding_config"])
    return None


def _picked(axes: Any, chosen: list[slice]) -> tuple[Pixels, ...]:
    return tuple(Pixels(axis, index[part]) for (axis, index), part in zip(axes, chosen, strict=True))


def _joined(parts: list[tuple[Pixels | None, ...]], along: int) -> tuple[Pixels | None, ...] | None:
    """Concatenation of parts of one image."""
    joined = []
    for n, its in enumerate(zip(*parts, strict=True)):
        if None in its or len({part.axis for part in its}) > 1:  # type: ignore[union-attr]
            return None
        indices = [part.index for part in its]  # type: ignore[union-attr]
        if n != along and not all(np.array_equal(indices[0], index) for index in indices):
            return None
        joined.append(Pixels(its[0].axis, np.concatenate(indices) if n == along else indices[0]))  # type: ignore[union-attr]
    return tuple(joined)


def _zero_padded(axes: Any, config: Any) -> tuple[Pixels, ...] | None:
    if any(interior for _, _, interior in config):
        return None
    out = []
    for (axis, index), (low, high, _) in zip(axes, config, strict=True):
        index = np.pad(index, (max(low, 0), max(high, 0)), constant_values=-1)
        out.append(Pixels(axis, index[max(-low, 0) : len(index) - max(-high, 0)]))
    return tuple(out)


def kernel_letters(eqn: Any) -> str:
    """``O``, ``I`` and the spatial letters, in the order of ``rhs_spec``."""
    rank = len(eqn.params["dimension_numbers"].rhs_spec) - 2
    if not 1 <= rank < len(SPATIAL_LETTERS):
        raise ValueError(f"a convolution with {rank} spatial axes")
    return "OI" + SPATIAL_LETTERS[rank]


def conv_of(eqn: Any, pixels: Sequence[Pixels | None], layout: str, flipped: Sequence[bool], stacked: int = 0) -> Conv:
    """The ``Conv`` of a convolution's equation, whose image has ``pixels``; a ValueError says why there is none."""
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    if eqn.params["batch_group_count"] != 1:
        raise ValueError("batch_group_count above 1 (fn contains its own gradient?)")
    per_axis = zip(
        [pixels[n] for n in numbers.lhs_spec[2:]],
        [operand[n] for n in numbers.rhs_spec[2:]],
        eqn.params["window_strides"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        eqn.params["padding"],
        [eqn.outvars[0].aval.shape[n] for n in numbers.out_spec[2:]],
        flipped,
        strict=True,
    )
    sides = input_and_padding([Side(*side) for side in per_axis])
    return Conv(
        tuple(n for n, _ in sides),
        strides=eqn.params["window_strides"],
        padding="CIRCULAR" if sides[0][1] is None else tuple(pads for _, pads in sides),  # type: ignore[misc]
        input_dilation=eqn.params["lhs_dilation"],
        kernel_dilation=eqn.params["rhs_dilation"],
        feature_group_count=eqn.params["feature_group_count"],
        kernel_layout=layout,
        stacked=stacked,
    )
