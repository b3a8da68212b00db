"""How every public function runs: compiled whole, and on whichever mesh its kernel lies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def compiled(arrays: int) -> Callable[[Callable[..., Any]], Any]:
    """Makes a decorator that compiles ``function(*arrays, *static)``.

    A function called eagerly would have its operations compiled one by one, which takes three times as long.

    On a mesh with explicit axes, factorisations and convolutions refuse operands that are divided along the wrong axis.
    So the operands are first copied whole to every device, and the function sees a mesh of automatic axes.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*args):
            operands, static = args[:arrays], args[arrays:]
            meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands))
            mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
            if mesh is None:
                return function(*args)
            whole = NamedSharding(mesh, PartitionSpec())
            operands = jax.sharding.reshard(operands, whole)
            return jax.sharding.auto_axes(lambda *operands: function(*operands, *static), out_sharding=whole)(*operands)

        return jax.jit(call, static_argnums=tuple(range(arrays, function.__code__.co_argcount)))

    return decorate


def place(array: jax.Array, like: jax.Array) -> jax.Array:
    """Divides an array over the devices as another one is, if that is part of its type (on a mesh of explicit axes)."""
    sharding = jax.typeof(like).sharding
    return jax.sharding.reshard(array, sharding) if AxisType.Explicit in sharding.mesh.axis_types else array
