"""Follows numbers through the equations that hold no program: parameters, images and constants that are only moved."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opnorm_jax._program.jaxpr import evaluate
from opnorm_jax._program.kernels import Kernel, sliced
from opnorm_jax._program.movement import (
    HOLE,
    MOVES,
    ElementMap,
    NotUnderstood,
    Source,
    control_operands,
    identity,
    moved,
    of_table,
)
from opnorm_jax._program.values import Output, Value, computed, unmoved


def results_of(program: Any, eqn: Any, ins: list[Value]) -> list[Value]:
    """Returns the values of an equation's results: constants, or moved parameters or images, or else computed."""
    name, shapes = eqn.primitive.name, [getattr(v.aval, "shape", ()) for v in eqn.outvars]
    maps = functools.cache(lambda: _moved(eqn, ins))
    moves = name in MOVES and any(value.shape != () for value in ins)
    movements = [(lambda n=n: maps()[n]) if moves else None for n in range(len(shapes))]
    followed = [value for value in ins if value.from_input]
    # The image may be none of fn's input.
    carrying = followed or [value for value in ins if value.output]
    carrying = carrying or [value for value in ins if value.movement and value.shape != ()]
    is_shifted = name in ("add", "sub", "add_any", "neg") and len(carrying) == 1 and carrying[0].shape == shapes[0]
    if is_shifted:  # what is added does not depend on the image
        movements = [lambda: carrying[0].elements]
    if all(value.constant for value in ins):
        evaluated = functools.cache(lambda: _evaluated(program, eqn, ins))
        given = enumerate(zip(shapes, movements, strict=True))
        return [Value(shape, constant=lambda n=n: evaluated()[n], movement=movement) for n, (shape, movement) in given]
    outs = [computed(name, ins, shape) for shape in shapes]
    movable = not followed or (name == "dynamic_slice" and ins[0].kernel)
    if name in MOVES and movable and len({value.kernel for value in ins if value.kernel}) == 1:
        outs = _moved_kernels(eqn, ins, outs)
        return outs if followed else [dataclasses.replace(o, movement=m) for o, m in zip(outs, movements)]
    if name == "scatter-add" and ins[0].output and ins[2].output and ins[0].output.site is ins[2].output.site:
        ins[0].output.site.found = "parts of its output are added to one another: no Conv says so"
    if name == "reduce_sum" and len(carrying) == 1 and carrying[0].output:
        return [_summed(eqn, carrying[0], outs[0])]
    if name in MOVES:
        output = carrying[0].output if len(carrying) == 1 and name != "scatter-add" else None
        return [
            dataclasses.replace(out, movement=movement, output=output, kernels=_kept(ins))
            for out, movement in zip(outs, movements, strict=True)
        ]
    if is_shifted:
        return [dataclasses.replace(outs[0], movement=movements[0], output=carrying[0].output)]
    return outs


def _kept(ins: Sequence[Value]) -> frozenset[int]:
    return frozenset().union(*(value.kernels for value in ins))


def _evaluated(program: Any, eqn: Any, ins: Sequence[Value]) -> list[np.ndarray]:
    with jax.ensure_compile_time_eval():
        outs = evaluate(program, eqn, [jnp.asarray(value.constant()) for value in ins])  # type: ignore[misc]
    return [None if out is None else as_array(out) for out in outs]  # type: ignore[misc]


def as_array(value: Any) -> Any:
    """Returns an array of NumPy; random keys, which have none, as they are."""
    return value if jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended) else np.asarray(value)


def _known(ins: Sequence[Value]) -> Callable[[int], np.ndarray | None]:
    def value(n):
        constant = ins[n].constant
        try:
            return constant() if constant else None
        except (NameError, TypeError):  # the index of a device, say
            return None

    return value


def _moved(eqn: Any, ins: Sequence[Value]) -> list[ElementMap]:
    """Returns the maps of the results of an equation that may be nothing but movement.

    What is followed is fn's input. If there is none of it, it is whatever has an axis: the image may be a constant, or
    a parameter.
    """
    name, outs = eqn.primitive.name, eqn.outvars
    fresh = lambda: [identity(Source(v.aval.shape)) for v in outs]
    controls = control_operands(name, len(ins))
    data = [value for n, value in enumerate(ins) if n not in controls]
    if any(ins[n].from_input for n in controls):
        if name == "gather" and not data[0].from_input:
            return fresh()  # rows of a table, by numbers that fn is given
        if name in ("gather", "scatter", "scatter-add", "dynamic_update_slice"):
            raise NotUnderstood(f"its input was put together by {name} at places not known beforehand")
        if name == "select_n" and ins[0].shape == outs[0].aval.shape and _alike(ins[1:]):
            return fresh()  # computed from each element by itself, as by an activation
        unmoved(ins, f"it was chosen by {name}")
        return fresh()
    if name == "gather" and data[0].kernel and len(outs[0].aval.shape) > len(data[0].shape):
        return fresh()  # the same, by numbers that are known
    is_followed = lambda value: value.from_input if any(v.from_input for v in data) else value.shape != ()
    parts = [
        value.elements if n not in controls and is_followed(value) and math.prod(value.shape) else None
        for n, value in enumerate(ins)
    ]
    sources = [source for source in dict.fromkeys(s for part in parts if part for s in part.sources)]
    if len(sources) > 1 and name == "select_n":
        unmoved(ins, "it was chosen by select_n")
        return fresh()
    if len(sources) > 1:
        if name != "concatenate":
            raise NotUnderstood(f"its input was put together from several arrays by {name}")
        within = [{source, *source.joined} for source in sources]
        joined = frozenset().union(*within)
        whole = all(part is not None and len(part.sources) == 1 and part.is_injective for part in parts)
        if not whole or len(joined) < sum(map(len, within)) or len(sources) < len(parts):
            raise NotUnderstood("its input was put together from pieces of several arrays")
        return [identity(Source(outs[0].aval.shape, joined, eqn.params["dimension"]))]
    found = moved(eqn, parts, _known(ins), shifted=True)
    if found is None and name in ("gather", "scatter", "dynamic_update_slice"):
        raise NotUnderstood(f"its input was put together by {name} at places not known beforehand")
    if found is None and name not in ("reduce_sum", "scatter-add"):  # those compute new numbers
        unmoved(ins, f"it was chosen by {name}")
    return fresh() if found is None else found


def _alike(values: Sequence[Value]) -> bool:
    """Tells whether all arrays that were only moved hold the same elements in the same order."""
    maps = [value.elements for value in values if value.movement]
    return all(one.sources == maps[0].sources and np.array_equal(one.numbers(), maps[0].numbers()) for one in maps[1:])


def _moved_kernels(eqn: Any, ins: Sequence[Value], outs: list[Value]) -> list[Value]:
    """Returns the results of an equation that may only move the numbers of one parameter."""
    kernel = next(value.kernel for value in ins if value.kernel)
    if eqn.primitive.name == "dynamic_slice" and kernel.elements.axes and any(not v.constant for v in ins[1:]):
        found = [sliced(kernel, outs[0].shape)]
    else:
        try:
            parts = [value.kernel.elements if value.kernel else None for value in ins]
            known = all(value.kernel or value.constant for value in ins)  # else other parameters are mixed in
            maps = moved(eqn, parts, _known(ins)) if known else None
        except NotUnderstood:
            maps = None
        found = [Kernel(kernel.leaf, elements, kernel.swept) for elements in maps] if maps else [None] * len(outs)
    kept = _kept(ins)
    return [dataclasses.replace(out, kernel=new, kernels=kept) for out, new in zip(outs, found)]


def _summed(eqn: Any, value: Value, out: Value) -> Value:
    """Returns a convolution's output summed over axes that it was laid out in, as Flax's circular transposed layers do.

    Says so at the convolution's site if the sum adds outputs that lie a period apart, so that the output is wrapped.
    Its result then stands for the outputs of the first period.
    """
    assert value.output is not None
    (site, before), axes = value.output, eqn.params["axes"]
    if all(value.shape[n] == 1 for n in axes):
        return dataclasses.replace(out, movement=lambda: _moved(eqn, [value])[0], output=value.output)
    try:
        elements = value.elements
        numbers = elements.numbers()
    except NotUnderstood:
        return out
    if len(elements.sources) != 1:
        return out
    shape, held = elements.sources[0].shape, numbers >= 0
    places = np.broadcast_to(np.expand_dims(np.arange(math.prod(out.shape)).reshape(out.shape), axes), numbers.shape)
    target = np.full(math.prod(shape), -1)
    target[numbers[held]] = places[held]
    target = target.reshape(shape)
    periods = {axis: period for axis in site.spatial if (period := _distance(np.moveaxis(target, axis, 0)))}
    if not periods or min(periods.values()) == 1:
        return out  # neighbours were summed, as a pool does, or no spatial axis was
    first = [periods.get(axis, before.get(axis, length)) for axis, length in enumerate(shape)]
    whole = [before.get(axis, length) for axis, length in enumerate(shape)]
    corner, rest = target[tuple(map(slice, whole))], np.ones(shape, bool)
    rest[tuple(map(slice, whole))] = False
    again = target[tuple(np.ix_(*(np.arange(length) % period for length, period in zip(whole, first))))]
    distinct = len(np.unique(corner)) == math.prod(first)
    if (corner < 0).any() or (target[rest] >= 0).any() or (again != corner).any() or not distinct:
        site.found = "a part of its output is wrapped around and summed: no Conv says so"
    output = Output(site, before | periods)
    site.wraps.append(output.periods)
    standing = np.full(math.prod(out.shape), HOLE)
    order = np.arange(math.prod(shape)).reshape(shape)[tuple(map(slice, first))]
    standing[np.maximum(target[tuple(map(slice, first))], 0)] = order
    table = standing.reshape(out.shape)
    return dataclasses.replace(out, output=output, movement=lambda: of_table(elements.sources, table))


def _distance(target: np.ndarray) -> int | None:
    """Returns the smallest distance along the first axis between two elements that are added into one."""
    for step in range(1, len(target)):
        if ((target[step:] == target[:-step]) & (target[step:] >= 0)).any():
            return step
    return None
