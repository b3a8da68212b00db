"""How functions of matrices behave under ``jax.vmap``. This is the only place where a batch becomes a loop on a CPU.

``vmap`` would turn a call that factorises one matrix into a batched call, which can deadlock on a CPU (see factor.py),
and a condition into the computation of both of its branches. ``custom_vmap`` takes other rules in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def stackwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of stacks of matrices whose ``vmap`` is the same function of longer stacks."""

    def rule(one, *stacks):
        batch, length = stacks[0].shape[:2]
        outs = one(*(stack.reshape(batch * length, *stack.shape[2:]) for stack in stacks))
        return jax.tree.map(lambda a: a.reshape(batch, length, *a.shape[1:]), outs)

    return _with_rule(function, rule)


@functools.lru_cache(maxsize=512)
def one_by_one(
    function: Callable[..., Any], *static: Any, together: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Makes a function of arrays whose ``vmap`` takes the members of a batch one after the other.

    Args:
      function: called as ``function(*static, *arrays)``. It must be a function of a module, so that it can be cached.
      static: hashable values.
      together: if given, called as ``together(*static, *batched_arrays)`` on every platform but the CPU.
    """

    def rule(one, *arrays):
        loop = lambda *arrays: lax.map(lambda item: one(*item), arrays)
        if together is None:
            return loop(*arrays)
        return lax.platform_dependent(*arrays, cpu=loop, default=functools.partial(together, *static))

    return _with_rule(functools.partial(function, *static), rule)


def _with_rule(function, rule):
    """``rule(one, *arrays)`` gives the results for arrays that all have a leading batch axis."""
    # jit compiles once a shape when the function is called eagerly. And it keeps the function's constants out of the
    # sight of custom_vmap, which refuses those that a condition further out has made batched.
    one = jax.custom_batching.custom_vmap(jax.jit(function))

    @one.def_vmap
    def batched(axis_size, in_batched, *arrays):
        if not any(in_batched):
            outs = one(*arrays)
            return outs, jax.tree.map(lambda _: False, outs)
        full = lambda array, has: array if has else jnp.broadcast_to(array, (axis_size, *jnp.shape(array)))
        outs = rule(one, *map(full, arrays, in_batched))
        return outs, jax.tree.map(lambda _: True, outs)

    return one
