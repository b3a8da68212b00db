"""Trees of convolutions beside trees of parameters: matched leaf by leaf, checked, and errors that name the path."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
import optax

from opnorm_jax._conv import Conv, Unknown, check_kernel, check_max_norm, member_shape, stacked_axes, stacked_first
from opnorm_jax._geometry import resolve


class Layer(NamedTuple):
    """A kernel, or a stack of them, and the convolution it belongs to."""

    path: str  # as errors name it: params['conv']['kernel']
    kernel: Any
    conv: Conv

    @property
    def stack(self) -> tuple[int, ...]:
        """The lengths of the axes that count the kernels of a stack; empty for a single kernel."""
        shape = self.kernel.shape
        return tuple(shape[axis] for axis in stacked_axes(self.conv) if axis < len(shape))

    @property
    def count(self) -> int:
        """The number of kernels."""
        return math.prod(self.stack)

    @property
    def member(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of one kernel."""
        return jax.ShapeDtypeStruct(member_shape(self.kernel.shape, self.conv), self.kernel.dtype)

    def check(self) -> None:
        """Raises an error that names the path if the kernel does not fit the convolution."""
        kernel, conv = self.kernel, self.conv
        try:
            check_kernel(self.member if hasattr(kernel, "shape") else kernel, conv)
            taps = [self.member.shape[conv.kernel_layout.index(x)] for x in "DHW" if x in conv.kernel_layout]
            resolve(conv, (*taps, 1, 1))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path} {getattr(kernel, 'shape', '')}: {error}") from None


def is_masked(node: Any) -> bool:
    """Tells whether a node stands for nothing to act on."""
    return node is None or isinstance(node, (optax.MaskedNode, Unknown))


def check_convs(convs: Any, *, keep_unknown: bool = False) -> Any:
    """Returns the tree with ``None`` wherever there is no ``Conv`` (or ``Unknown``, if those are kept).

    Everything else in the tree is an error.
    """

    def check(path, node):
        if isinstance(node, Conv) or (keep_unknown and isinstance(node, Unknown)):
            return node
        if is_masked(node):
            return None
        meant = (
            f"opnorm_jax.Conv({node!r}, padding=...)" if _is_shape(node) else "opnorm_jax.Conv((height, width), ...)"
        )
        raise TypeError(
            f"convs{jax.tree_util.keystr(path)}: expected a Conv, or None where nothing is to be done, got {node!r}. "
            f"Write {meant}: in a tree, the padding of each layer must be said."
        )

    is_leaf = lambda node: isinstance(node, Conv) or is_masked(node) or _is_shape(node)
    checked = jax.tree_util.tree_map_with_path(check, convs, is_leaf=is_leaf)
    if not jax.tree.leaves(checked):
        reasons = [
            f"{jax.tree_util.keystr(path)} is unknown: {node.reason}"
            for path, node in jax.tree_util.tree_leaves_with_path(convs, is_leaf=is_leaf)
            if isinstance(node, Unknown)
        ]
        raise ValueError(
            "expected convs to be a tree shaped like the parameters with a Conv at each kernel and None elsewhere; it "
            "holds no Conv at all. Put opnorm_jax.Conv(input_shape, ...) at each convolution's kernel."
            + "".join(f" {reason}." for reason in reasons[:4])
        )
    return checked


def find_layers(params: Any, convs: Any) -> list[Layer | None]:
    """Returns for each leaf of the parameters its layer, checked; ``None`` for a leaf that has none."""
    layers: list[Layer | None] = []
    for path, kernel, conv in broadcast(convs, params, "convs", lambda node: node is None):
        if conv is None or is_masked(kernel):
            layers.append(None)
            continue
        layer = Layer("params" + jax.tree_util.keystr(path), kernel, conv)
        layer.check()
        layers.append(layer)
    return layers


def list_layers(params: Any, convs: Any) -> list[tuple[str, Any, Conv | Unknown]]:
    """Lists (path, kernel, its ``Conv`` or ``Unknown``) of each layer, and of each member of a stack, checked.

    The order is the natural one of the paths: Conv_2 comes before Conv_10.
    """
    convs = check_convs(convs, keep_unknown=True)
    rows: list[tuple[str, Any, Conv | Unknown]] = []
    for path, kernel, conv in broadcast(convs, params, "convs", lambda node: node is None):
        if conv is None or is_masked(kernel):
            continue
        if isinstance(conv, Unknown):
            rows.append((layer_path(path), kernel, conv))
            continue
        layer = Layer("params" + jax.tree_util.keystr(path), kernel, conv)
        layer.check()
        if isinstance(kernel, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            raise TypeError(
                f"{layer.path} {kernel.shape}: expected an array of numbers, got {type(kernel).__name__}. Call this "
                "outside jit, on the parameters themselves."
            )
        member = dataclasses.replace(conv, stacked=0)
        kernels = stacked_first(kernel, conv)
        for index in np.ndindex(*layer.stack):
            rows.append((layer_path(path, index), kernels[index] if index else kernel, member))
    return sorted(rows, key=lambda row: natural_key(row[0]))


def layer_path(path: tuple, index: tuple[int, ...] = ()) -> str:
    """Returns a layer's path as reports show it; of a member of a stack, with its index."""
    suffix = "[" + ",".join(map(str, index)) + "]" if index else ""
    return (jax.tree_util.keystr(path, simple=True, separator="/") or "params") + suffix


def natural_key(path: str) -> list[list[Any]]:
    """Returns a sorting key by which numbers inside names are ordered by value, level by level."""
    number = lambda digits: (len(digits.lstrip("0")), digits.lstrip("0"))  # an int of many digits is refused
    split = lambda part: [number(s) if n % 2 else s for n, s in enumerate(re.split("([0-9]+)", part))]
    return [split(part) for part in path.split("/")]


def check_max_norms(max_norm: Any, schedules: bool = False) -> None:
    """Raises an error that names the place where a tree of bounds holds anything else."""

    def one(path, node):
        if node is None or (schedules and callable(node)):
            return
        try:
            check_max_norm(node)
        except (TypeError, ValueError) as error:
            raise type(error)(f"max_norm{jax.tree_util.keystr(path)}: {error}") from None

    jax.tree_util.tree_map_with_path(one, max_norm)


def bounded_layers(params: Any, max_norm: Any, convs: Any) -> list[tuple[int, Layer, Any]]:
    """Lists the layers that have a bound in a prefix tree of bounds: index of the leaf, layer, bound."""
    bounds = broadcast(
        max_norm, params, "max_norm", lambda node: node is None or isinstance(node, jax.tree_util.Partial)
    )
    rows = enumerate(zip(find_layers(params, convs), bounds, strict=True))
    return [(n, layer, bound) for n, (layer, (*_, bound)) in rows if layer is not None and bound is not None]


def broadcast(prefix: Any, tree: Any, name: str, is_leaf: Callable[[Any], bool], path: tuple = ()) -> list:
    """Returns (path, leaf, node of ``prefix`` at or above it) for each leaf of ``tree``, masked ones included.

    ``prefix`` has the structure of ``tree`` or stops early; ``name`` is what errors call it. Mappings of different
    types match if their keys do.
    """
    if is_masked(tree):
        return [(path, tree, None)]
    if is_leaf(prefix) or jax.tree_util.all_leaves([prefix]):
        leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
        return [(path + below, leaf, prefix) for below, leaf in leaves]
    children, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    nodes, prefix_structure = jax.tree.flatten(prefix, is_leaf=lambda node: node is not prefix)
    mappings = isinstance(tree, Mapping) and isinstance(prefix, Mapping) and all(keys for keys, _ in children)
    if mappings and tree.keys() == prefix.keys():
        nodes = [prefix[_key(keys[0])] for keys, _ in children]
    elif structure != prefix_structure:
        # flax.nnx.Optimizer gives init its parameters inside nnx.Param and update the bare arrays.
        if len(nodes) == 1 and _is_wrapper(prefix):
            return broadcast(nodes[0], tree, name, is_leaf, path)
        if len(children) == 1 and children[0][1] is not tree and _is_wrapper(tree):
            return broadcast(prefix, children[0][1], name, is_leaf, path)
        here = "params" + jax.tree_util.keystr(path)
        raise ValueError(
            f"expected {name} to have the structure of the parameters, or a prefix of it; at {here} the parameters "
            f"have {_summary(tree, children)} and {name} has {_summary(prefix, nodes)}. Give {name} the same "
            "containers and keys, and None for what is not a convolution."
        )
    return [
        row
        for (key, child), node in zip(children, nodes, strict=True)
        for row in broadcast(node, child, name, is_leaf, path + key)
    ]


def _is_shape(node: Any) -> bool:
    return isinstance(node, (tuple, list)) and bool(node) and all(type(n) is int for n in node)


def _is_wrapper(node: Any) -> bool:
    """Tells whether a node with one child is a variable around it, rather than a container that names it."""
    return not isinstance(node, (Mapping, list, tuple))


def _key(entry: Any) -> Any:
    return entry.key if isinstance(entry, jax.tree_util.DictKey) else entry.name


def _summary(node: Any, children: list) -> str:
    """Names a container's type and its keys, or its length."""
    if isinstance(node, Mapping):
        return f"a {type(node).__name__} with the keys {list(node)}"
    if isinstance(node, (list, tuple)):
        return f"a {type(node).__name__} of length {len(node)}"
    return f"a {type(node).__name__}" + (f" of {len(children)} children" if children else "")
