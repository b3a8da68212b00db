"""How every public function runs: compiled whole, on whichever mesh its kernel lies, and exported with its results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")


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


def exportable(named_tuple: type[T]) -> type[T]:
    """Registers a named tuple, so that ``jax.export`` can serialise functions that take or return it."""
    jax.export.register_namedtuple_serialization(named_tuple, serialized_name=f"opnorm_jax.{named_tuple.__name__}")
    return named_tuple


def place(array: jax.Array, like: jax.Array) -> jax.Array:
    """Divides an array over the devices as another one is, if that is part of its type (on a mesh of explicit axes)."""
    sharding = jax.typeof(like).sharding
    return jax.sharding.reshard(array, sharding) if AxisType.Explicit in sharding.mesh.axis_types else array
