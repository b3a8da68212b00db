"""One call for all layers that are alike: the same geometry and shapes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import canonical_shape, stacked_back, stacked_first
from opnorm_jax._kernel.compiled import place
from opnorm_jax._tree.layers import Layer, bounded_layers, broadcast, check_convs, find_layers, is_masked, layer_path


def map_alike(
    function: Callable[..., Any], layers: Sequence[Layer], arrays: Sequence[tuple[jax.Array, ...]]
) -> list[Any]:
    """Returns ``function(conv, *arrays)`` for each layer; its results are trees of arrays.

    The arrays of a layer have its stack's leading axes, and so have the results. Layers that are alike share one call,
    under ``vmap``. On an explicit mesh the function sees whole copies, and results lie as they come.
    """
    alike: dict[Any, list[int]] = {}
    outs: list[Any] = [None] * len(layers)
    # Layers that share a call may lie differently, and an explicit mesh lets no axis be reshaped that it divides.
    arrays = [tuple(replicate(array, array) for array in own) for own in arrays]
    for n, (layer, own) in enumerate(zip(layers, arrays, strict=True)):
        members = tuple(jax.ShapeDtypeStruct(a.shape[len(layer.stack) :], a.dtype) for a in own)
        alike.setdefault((dataclasses.replace(layer.conv, stacked=0), members), []).append(n)
    for (conv, members), numbers in alike.items():
        one = functools.partial(function, conv)
        if len(numbers) == 1 and not layers[numbers[0]].stack:
            outs[numbers[0]] = one(*arrays[numbers[0]])
            continue
        counts = [layers[n].count for n in numbers]
        if not sum(counts):
            none = lambda like: jnp.zeros((0, *like.shape), like.dtype)
            batch = jax.tree.map(none, jax.eval_shape(one, *members))
        else:
            rows = [
                [array.reshape(count, *member.shape) for array, member in zip(arrays[n], members, strict=True)]
                for n, count in zip(numbers, counts)
            ]
            batch = jax.vmap(one)(*map(jnp.concatenate, zip(*rows)))
        for n, count, end in zip(numbers, counts, itertools.accumulate(counts)):
            own = lambda a, n=n, start=end - count, end=end: a[start:end].reshape(*layers[n].stack, *a.shape[1:])
            outs[n] = jax.tree.map(own, batch)
    return outs


def map_kernels(function: Callable[..., Any], tree: Any, convs: Any, *, max_norm: Any = 1.0, scales: Any = None) -> Any:
    """Replaces each kernel that has a ``Conv`` and a bound by ``function(conv, kernel, bound)``.

    The results are placed on devices as the kernels were. ``max_norm`` is a prefix of the tree. Where the tree
    ``scales`` holds an array, a factor for each output channel, it is the function's last argument.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked)
    factors = [factor for *_, factor in broadcast(scales, tree, "scales", lambda node: node is None)]
    found = bounded_layers(tree, max_norm, convs)
    kernels = [jnp.asarray(layer.kernel) for _, layer, _ in found]
    arrays = [
        (stacked_first(kernel, layer.conv), jnp.broadcast_to(bound, layer.stack), *_factor(factors[n], layer))
        for kernel, (n, layer, bound) in zip(kernels, found, strict=True)
    ]
    outs = map_alike(function, [layer for _, layer, _ in found], arrays)
    for (n, layer, _), kernel, out in zip(found, kernels, outs, strict=True):
        leaves[n] = place(stacked_back(out, layer.conv), kernel)
    return treedef.unflatten(leaves)


def list_factors(params: Any, convs: Any, scales: Any) -> dict[str, np.ndarray]:
    """Returns the factors of output channels, by the paths that ``list_layers`` gives; members of stacks each alone."""
    found = {}
    leaves = broadcast(scales, params, "scales", lambda node: node is None)
    for (path, _, factor), layer in zip(leaves, find_layers(params, check_convs(convs)), strict=True):
        if layer is None or factor is None:
            continue
        (array,) = _factor(factor, layer)
        for index in np.ndindex(*layer.stack):
            found[layer_path(path, index)] = np.asarray(array)[index]
    return found


def _factor(factor: Any, layer: Layer) -> tuple[jax.Array, ...]:
    """Returns the factors of a layer's output channels, checked, if it has any."""
    if factor is None:
        return ()
    shape = (*layer.stack, canonical_shape(layer.member, layer.conv)[-1])
    got = getattr(factor, "shape", factor)
    if got != shape or not jnp.issubdtype(factor.dtype, jnp.floating):
        raise ValueError(
            f"{layer.path} {layer.kernel.shape}: expected its scale to be a real floating array of shape {shape}, one "
            f"factor for each output channel, got {factor if got is factor else f'{factor.dtype} of shape {got}'}."
        )
    return (factor,)


def replicate(array: jax.Array, like: Any) -> jax.Array:
    """Copies the array whole to every device of the explicit mesh on which ``like`` lies, if it does."""
    sharding = _explicit_sharding(like)
    if sharding is None:
        return array
    if isinstance(like, jax.core.Tracer):
        return jax.sharding.reshard(array, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))
    return jax.device_put(array, jax.sharding.NamedSharding(like.sharding.mesh, jax.sharding.PartitionSpec()))


def _explicit_sharding(array: Any) -> jax.sharding.NamedSharding | None:
    """Returns the sharding that is part of an array's type, if there is one: on a mesh with explicit axes."""
    sharding = array.sharding if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array).sharding
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if jax.sharding.AxisType.Explicit in types else None
