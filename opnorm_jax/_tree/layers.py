"""Trees of convolutions beside trees of parameters: matched, checked, and wrong ones reported by their path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
import optax

from opnorm_jax._conv import Conv, Unknown, as_conv, check_kernel, is_conv_leaf
from opnorm_jax._kernel.bounds import check_output


class Layer(NamedTuple):
    """One kernel to be constrained."""

    index: int  # of its leaf in the flattened parameters
    slot: int  # of its Conv among those of convs
    path: str
    kernel: Any
    conv: Conv
    max_norm: Any

    @property
    def stack(self) -> tuple[int, ...]:
        """Shape of the leading axes, if it is a stack of kernels."""
        return self.kernel.shape[: self.conv.stacked]

    @property
    def member(self) -> jax.ShapeDtypeStruct:
        """One kernel of the stack."""
        return jax.ShapeDtypeStruct(self.kernel.shape[len(self.stack) :], self.kernel.dtype)


def is_box(node: Any) -> bool:
    """Whether a node with one child is a variable around it, rather than a container that names it."""
    return not isinstance(node, (dict, list, tuple))


def is_hole(node: Any) -> bool:
    """Whether a node stands for nothing to act on."""
    return node is None or isinstance(node, (optax.MaskedNode, Unknown))


def checked_convs(convs: Any, *, keep_unknown: bool = False) -> Any:
    """The tree with a ``Conv`` at each layer (``Unknown``, if kept) and ``None`` elsewhere; all else is an error."""

    def one(path, node):
        if is_hole(node):
            return node if keep_unknown and isinstance(node, Unknown) else None
        try:
            return as_conv(node)
        except (TypeError, ValueError) as error:
            raise type(error)(f"convs{jax.tree_util.keystr(path)}: {error}") from None

    convs = jax.tree_util.tree_map_with_path(one, convs, is_leaf=lambda node: is_conv_leaf(node) or is_hole(node))
    if not jax.tree.leaves(convs):
        raise ValueError(
            "expected convs to be a tree shaped like the parameters with a Conv at each kernel and None elsewhere; it "
            "holds no Conv at all. Put opnorm_jax.Conv(input_shape, ...) at each convolution's kernel."
        )
    return convs


def layers_of(params: Any, convs: Any, max_norm: Any) -> list[Layer]:
    """The kernels with their convolutions and bounds, checked, in the order of the flattened parameters."""
    # Convs are numbered before holes in the parameters (optax.masked, optax.partition) hide some of them.
    slots = iter(range(len(jax.tree.leaves(convs))))
    numbered = jax.tree.map(lambda conv: (conv, next(slots)), convs)
    is_numbered = lambda node: isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], Conv)
    matched = broadcast(numbered, params, "convs", lambda node: node is None or is_numbered(node))
    bounds = broadcast(max_norm, params, "max_norm", lambda node: node is None or callable(node))
    layers = []
    for index, ((path, kernel, entry), (_, _, bound)) in enumerate(zip(matched, bounds, strict=True)):
        if entry is None or bound is None or is_hole(kernel):
            continue
        conv, slot = entry
        name = "params" + jax.tree_util.keystr(path)
        layer = Layer(index, slot, name, kernel, conv, bound)
        check_layer(layer)
        layers.append(layer)
    return layers


def described(params: Any, convs: Any) -> list[tuple[str, Any, Conv | Unknown]]:
    """(path, kernel, its ``Conv`` or ``Unknown``) for each layer and each member of a stack, checked.

    In natural order of the paths: Conv_2 before Conv_10.
    """
    convs = checked_convs(convs, keep_unknown=True)
    rows: list[tuple[str, Any, Conv | Unknown]] = []
    for path, kernel, conv in broadcast(convs, params, "convs", lambda node: node is None):
        if conv is None or is_hole(kernel):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        if isinstance(conv, Unknown):
            rows.append((name, kernel, conv))
            continue
        layer = Layer(0, 0, "params" + jax.tree_util.keystr(path), kernel, conv, None)
        check_layer(layer)
        if isinstance(kernel, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            raise TypeError(
                f"{layer.path} {kernel.shape}: expected an array of numbers, got {type(kernel).__name__}. Call this "
                "outside jit, on the parameters themselves."
            )
        member = dataclasses.replace(conv, stacked=0)
        for index in np.ndindex(*layer.stack):
            suffix = "[" + ",".join(map(str, index)) + "]" if index else ""
            rows.append((name + suffix, kernel[index] if index else kernel, member))
    return sorted(rows, key=lambda row: natural_key(row[0]))


def natural_key(path: str) -> list[list[Any]]:
    """Sorts numbers inside names by value, level by level."""
    split = lambda part: [int(s) if n % 2 else s for n, s in enumerate(re.split("([0-9]+)", part))]
    return [split(part) for part in path.split("/")]


def check_layer(layer: Layer) -> None:
    """Raises what is wrong with a layer's kernel, with its path."""
    kernel, conv = layer.kernel, layer.conv
    try:
        check_kernel(layer.member if hasattr(kernel, "shape") else kernel, conv)
        taps = [layer.member.shape[conv.kernel_layout.index(x)] for x in "DHW" if x in conv.kernel_layout]
        check_output(conv, [*taps, 1, 1])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{layer.path} {getattr(kernel, 'shape', '')}: {error}") from None


def broadcast(prefix: Any, tree: Any, name: str, is_leaf: Callable[[Any], bool], path: tuple = ()) -> list:
    """(path, leaf of ``tree``, the node of ``prefix`` above it) for each leaf; holes of ``tree`` end the descent."""
    if is_hole(tree):
        return [(path, tree, None)]
    if is_leaf(prefix) or jax.tree_util.all_leaves([prefix]):
        leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)[0]
        return [(path + below, leaf, prefix) for below, leaf in leaves]
    children, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    mine, my_structure = jax.tree.flatten(prefix, is_leaf=lambda node: node is not prefix)
    if structure != my_structure:
        # flax.nnx.Optimizer gives init its parameters inside nnx.Param and update the bare arrays.
        if len(mine) == 1 and is_box(prefix):
            return broadcast(mine[0], tree, name, is_leaf, path)
        if len(children) == 1 and children[0][1] is not tree and is_box(tree):
            return broadcast(prefix, children[0][1], name, is_leaf, path)
        here = jax.tree_util.keystr(path) or "the root"
        raise ValueError(
            f"expected {name} to have the structure of the parameters, or a prefix of it; at {here} the parameters "
            f"have {structure} and {name} has {my_structure}. Give {name} the same containers and keys, None for what "
            "is not a convolution."
        )
    return [
        row
        for (key, child), node in zip(children, mine, strict=True)
        for row in broadcast(node, child, name, is_leaf, path + key)
    ]
