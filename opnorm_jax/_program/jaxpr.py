"""All that this library asks of a traced program.

jax promises neither the names of primitives nor the layout of their parameters. So every such question is asked here,
and the tests of what uses the answers run on the oldest supported and on the newest jax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal
from jax.extend.core import primitives as p

__all__ = [
    "Literal",
    "Traced",
    "called_program",
    "computes_narrowly",
    "evaluate",
    "gives_floats",
    "is_identity",
    "is_real",
    "open_jaxpr",
    "p",
    "programs_inside",
    "quantises",
    "scan_split",
    "takes_real_part",
    "touches_reference",
    "trace",
    "widened",
]

# Primitives by object where jax exports them; the names are of those it does not export.
_IDENTITIES = {p.convert_element_type_p, p.copy_p, p.name_p, p.reduce_precision_p, p.sharding_constraint_p}
_IDENTITY_NAMES = {
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reshard",
    "stop_gradient",
}
# Equations that call the one program they hold on their operands, one by one. No other program is entered.
_CALLS = {
    "checkpoint",
    "closed_call",
    "composite",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_vmap_call",
    "eval_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


class Traced(NamedTuple):
    """A function's program, with the leaves of its first argument and the paths of those."""

    program: Any
    treedef: Any  # of the first argument
    names: list[str]  # of its leaves
    leaves: list[Any]
    positions: list[int]  # of the program's inputs among all leaves; those of the first argument come first
    values: list[Any]  # of the program's inputs


def trace(fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """Traces ``fn(params, *args, **kwargs)``. Arrays and ``ShapeDtypeStruct`` are traced; all else is passed on."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = ["params" + jax.tree_util.keystr(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    inputs, inputs_def = jax.tree.flatten((args, kwargs))
    every = [*leaves, *inputs]
    positions = [n for n, leaf in enumerate(every) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def flat(*arrays):
        filled = list(every)
        for n, array in zip(positions, arrays, strict=True):
            filled[n] = array
        args, kwargs = jax.tree.unflatten(inputs_def, filled[len(leaves) :])
        outs = fn(jax.tree.unflatten(treedef, filled[: len(leaves)]), *args, **kwargs)
        return [out for out in jax.tree.leaves(outs) if hasattr(out, "dtype") or isinstance(out, (bool, int, float))]

    try:
        program = jax.make_jaxpr(flat)(*(every[n] for n in positions))
    except Exception as error:
        if type(error).__name__ != "TraceContextError":
            raise
        raise ValueError(
            "expected fn to be a pure function of its arguments; it changes a flax.nnx variable that was made outside "
            "of it (a Dropout's random state or BatchNorm's statistics, say). Copy the state inside fn: "
            "nnx.merge(graph, params, rest, copy=True)(x)."
        ) from error
    return Traced(program, treedef, names, leaves, positions, [every[n] for n in positions])


def is_identity(eqn: Any) -> bool:
    """Tells whether each result is the operand in its place, at most cast to another dtype."""
    return eqn.primitive in _IDENTITIES or eqn.primitive.name in _IDENTITY_NAMES


def quantises(eqn: Any) -> bool:
    """Tells whether an identity rounds more coarsely than to bfloat16 or float16: to eight bits or fewer, say."""
    if eqn.primitive is p.reduce_precision_p:
        return eqn.params["mantissa_bits"] < 7 or eqn.params["exponent_bits"] < 5
    dtype = eqn.outvars[0].aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def takes_real_part(eqn: Any) -> bool:
    """Tells whether an identity casts complex numbers to real ones."""
    return any(map(_is_complex, eqn.invars)) and not any(map(_is_complex, eqn.outvars))


def is_real(eqn: Any) -> bool:
    """Tells whether an operation neither takes nor gives complex numbers."""
    return not any(map(_is_complex, (*eqn.invars, *eqn.outvars)))


def gives_floats(eqn: Any, index: int = 0) -> bool:
    """Tells whether a result holds real or complex floating numbers. Whole numbers jump."""
    return jnp.issubdtype(getattr(eqn.outvars[index].aval, "dtype", np.int32), jnp.inexact)


def _is_complex(v: Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", np.float32), jnp.complexfloating)


def open_jaxpr(program: Any) -> Any:
    """Returns the jaxpr inside a closed one, or itself."""
    return getattr(program, "jaxpr", program)  # jax 0.11 and later make no difference between open and closed


def programs_inside(eqn: Any) -> list[Any]:
    """Returns the programs among an equation's parameters, with their constants where they have any."""
    found = []
    for value in eqn.params.values():
        several = value if isinstance(value, (tuple, list)) else (value,)
        found += [item for item in several if isinstance(item, (ClosedJaxpr, Jaxpr))]
    return found


def called_program(eqn: Any) -> Any:
    """Returns the program that an equation calls on its operands, one by one; None if it is not known to."""
    if eqn.primitive.name in _CALLS:
        for program in programs_inside(eqn):
            if len(open_jaxpr(program).invars) == len(eqn.invars):
                return program
    return None


def scan_split(eqn: Any) -> tuple[int, int]:
    """Counts the constants and the carries among a scan's operands, known by ranks: what is scanned loses an axis."""
    jaxpr = open_jaxpr(eqn.params["jaxpr"])
    same_rank = lambda outside, inside: sum(v.aval.ndim == w.aval.ndim for v, w in zip(outside, inside, strict=True))
    carries = same_rank(eqn.outvars, jaxpr.outvars)
    return same_rank(eqn.invars, jaxpr.invars) - carries, carries


def touches_reference(eqn: Any) -> bool:
    """Tells whether an equation makes, reads or writes a mutable reference (``jax.new_ref``)."""
    return any("Ref" in type(v.aval).__name__ for v in (*eqn.invars, *eqn.outvars))


def is_narrow(dtype: Any) -> bool:
    """Tells whether a dtype is a floating one of less than single precision."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def computes_narrowly(eqn: Any) -> bool:
    """Tells whether an equation, or one inside, computes in less than single precision."""
    if any(is_narrow(getattr(v.aval, "dtype", np.int32)) for v in (*eqn.invars, *eqn.outvars)):
        return True
    return any(computes_narrowly(inner) for program in programs_inside(eqn) for inner in open_jaxpr(program).eqns)


def widened(eqn: Any) -> Any:
    """Returns the equation in single precision, for operands that are in it."""
    params = dict(eqn.params)
    for name in ("preferred_element_type", "new_dtype", "dtype"):
        if params.get(name) is not None and is_narrow(params[name]):
            params[name] = np.dtype(np.float32)
    return eqn.replace(params=params)


def evaluate(program: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a program, whatever it is, on arrays or tracers."""
    inputs = {v: value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    wanted = [v for v in eqn.outvars if not isinstance(v, DropVar)]
    alone = open_jaxpr(program).replace(constvars=[], invars=list(inputs), outvars=wanted, eqns=[eqn])
    outs = dict(zip(wanted, jax.core.eval_jaxpr(alone, (), *inputs.values()), strict=True))
    return [outs.get(v) for v in eqn.outvars]
