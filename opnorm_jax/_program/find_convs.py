"""Finds a model's convolutions by a forward walk over its traced program.

Every variable of the program has a :class:`Value`. It says which parameter's numbers the variable holds, if it only
moved them, and otherwise which parameters it was computed from. For images it says, on demand, which element of an
earlier array each element is: so padding is read off exactly, whatever wrote it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import Conv, Unknown
from opnorm_jax._program.convolution import kernel_letters, read_convolution
from opnorm_jax._program.follow import as_array, results_of
from opnorm_jax._program.jaxpr import (
    Literal,
    called_program,
    is_identity,
    open_jaxpr,
    p,
    programs_inside,
    quantises,
    scan_split,
    touches_reference,
    trace,
)
from opnorm_jax._program.kernels import Axes, Kernel, member, read_matrix
from opnorm_jax._program.movement import MOVES, ElementMap, NotUnderstood, Source, cut_out, identity
from opnorm_jax._program.values import Output, Site, Sites, Value, computed, entering_a_loop, join, unmoved


def find_convs(
    fn: Callable[..., Any], params: Any, *args: Any, on_unknown: str = "error", dense: bool = False, **kwargs: Any
) -> Any:
    """Finds the convolutions of a model: returns a tree shaped like ``params`` with a :class:`Conv` at each kernel.

    The function traces ``fn(params, *args, **kwargs)``, any JAX function of any framework, and reads off what each
    parameter feeds: input shapes, strides, dilation, groups and layouts. Padding is given as it is for these shapes, in
    explicit pairs. Zeros padded on beforehand are part of it. Circular padding is recognised however it is written;
    so are edge pixels and reflections, along each axis by itself, and the outputs of circular transposed convolutions
    that are wrapped around by sums over an axis (Flax's and Equinox's). Nothing is computed.

    It sees through ``jit``, ``checkpoint``, ``scan``, ``cond``, ``while_loop``, custom derivatives, casts, transposed
    and flipped kernels, and reads 1 x 1 convolutions written as matrix products. Stacked kernels (those that ``scan``
    or an index takes apart along any axes, and those that ``vmap`` runs side by side) get the ``Conv`` of each member,
    with ``stacked`` set.

    A convolution's input is the array before its pixels were last moved. A ``Conv`` describes it if one of these holds
    along each axis: every pixel occurs once, with zeros around or between them; the pixels repeat in a circle; edge
    pixels or reflections are added as far as the taps reach. Any other movement is reported: padding by other modes or
    widths, nearest resizing, copies of channels or of examples, constant channels. The reason then gives the ``Conv``
    of the layer alone, to be written by hand.

    Args:
      fn: a function of the parameters first. A kernel captured by closure instead cannot be found, and is reported.
        Trace the forward function, not its gradient.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``; leaves of other types are passed on as they are. Modules of
        Equinox and states of Flax NNX are such trees.
      *args, **kwargs: the function's other arguments. Arrays and ``ShapeDtypeStruct`` are traced (a batch of 1 will
        do), everything else is passed on as it is. The convolutions are those of *these* shapes.
      on_unknown: what becomes of a kernel that no ``Conv`` describes: masked, standardised or normalised weights, a
        kernel used with two geometries, complex or integer kernels. With ``"error"`` a ValueError names each with
        the reason. With ``"skip"`` its place in the result holds an :class:`Unknown` with the reason; every function of
        this library passes over it.
      dense: also report matrices, as the 0-dimensional convolution ``Conv(())``. Each is a layer by itself, whatever
        computed its input.

    Returns:
      A tree of the structure of ``params``; ``None`` where a parameter feeds no convolution.

    Raises:
      ValueError: no convolution was found; or, with ``on_unknown="error"``, one that cannot be described.

    Cost: one trace, and work proportional to the program's length.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> def net(params, x):
      ...     x = jax.lax.conv_general_dilated(
      ...         x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      ...     return x + params["bias"]
      >>> params = {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)}
      >>> convs = oj.find_convs(net, params, jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32))
      >>> convs["bias"], convs["kernel"].strides, convs["kernel"].padding
      (None, (2, 2), ((0, 1), (0, 1)))
    """
    check_search(fn, on_unknown)
    return _search(fn, params, args, kwargs, on_unknown, dense).convs


class _Found(NamedTuple):
    """What a search found."""

    convs: Any
    sites: Sites
    inputs: list[Value]  # of fn, besides its parameters
    outs: list[Value]


def find_layer(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Any:
    """Does what :func:`find_convs` does, for a function that is a single layer: one kernel, applied once to its input.

    So the norm of the function is that of the ``Conv``. Raises a ValueError if that is not certain.
    """
    found = _search(fn, params, args, kwargs, "error", True)
    sites = [site for several in found.sites.of.values() for site in several]
    outs = [value for value in found.outs if value.from_input]
    try:
        (site,), (out,) = sites, outs
        assert site.image is not None  # all kernels that can be described have one
        (source,) = site.image.elements.sources
        is_alone = isinstance(site.found, Conv) and not site.found.stacked
        is_input = is_alone and any(source in value.elements.sources for value in found.inputs)
        is_output = out.output is not None and out.output.site is site and max(out.elements.copies) <= 1
    except ValueError:  # NotUnderstood is one
        is_input = is_output = False
    if not is_input or not is_output:
        raise ValueError(
            "expected a layer that applies one kernel once to its input, and adds a bias at most; this one does more "
            "(several kernels, a sum of paths, patches, an activation?). For a network use opnorm_jax.normalize."
        )
    return found.convs


def _search(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any, on_unknown: str, dense: bool) -> _Found:
    traced = trace(fn, params, args, kwargs)
    count = len(traced.leaves)
    sites = Sites(traced.leaves, dense)
    values = [
        _parameter(n, traced.leaves[n]) if n < count else Value(tuple(leaf.shape), from_input=True)
        for n, leaf in zip(traced.positions, traced.values)
    ]
    outs = _walk(traced.program, values, sites, False, all(n < count for n in traced.positions))
    for out in outs:
        out.use()
    found = {n: sites.decide(n) for n in sorted(sites.of)}
    unknown = [
        f"{traced.names[n]} {tuple(traced.leaves[n].shape)}: {node.reason}"
        for n, node in found.items()
        if isinstance(node, Unknown)
    ]
    unknown += [f"a kernel that is no parameter: {reason}" for reason in dict.fromkeys(sites.unowned)]
    if unknown and on_unknown == "error":
        raise ValueError(
            "expected every convolution to apply a parameter as it is, with one geometry; cannot describe\n  "
            + "\n  ".join(unknown)
            + "\nDescribe such layers by hand where a Conv does fit, or leave them out with on_unknown='skip'."
        )
    if not found:
        raise ValueError(
            "expected fn(params, ...) to apply a convolution to one of params, got a program in which none does. "
            "Parameters that fn captures by closure cannot be seen: pass them as its first argument. For dense layers "
            "pass dense=True."
        )
    convs = jax.tree.unflatten(traced.treedef, [found.get(n) for n in range(count)])
    return _Found(convs, sites, [value for value in values if value.from_input], outs)


def check_search(fn: Any, on_unknown: Any) -> None:
    """Raises an error if these are no arguments of :func:`find_convs`."""
    if on_unknown not in ("error", "skip"):
        raise ValueError(f"expected on_unknown to be 'error' or 'skip', got {on_unknown!r}.")
    if not callable(fn):
        raise TypeError(f"expected fn to be a function of the parameters, got {fn!r}. Pass model.apply, say.")


def _parameter(n: int, leaf: Any) -> Value:
    shape, alone = tuple(leaf.shape), frozenset([n])
    kernel = Kernel(n, identity(Source(shape))) if math.prod(shape) else None
    return Value(shape, leaves=alone, kernels=alone, kernel=kernel)


def _walk(program: Any, values: Sequence[Value], sites: Sites, sharded: bool, captured_is_input: bool) -> list[Value]:
    """Returns the values of a program's outputs; its inputs have ``values``."""
    jaxpr = open_jaxpr(program)
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    for v, array in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=False):
        known[v] = _captured(array, captured_is_input)
    for v in jaxpr.constvars:
        known.setdefault(v, Value(v.aval.shape, captured=True))

    def read(v):
        if isinstance(v, Literal):
            return Value(np.shape(v.val), constant=lambda: np.asarray(v.val))
        return known[v]

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        if touches_reference(eqn):
            outs = _through_reference(eqn, ins, sites)
        elif eqn.primitive is p.conv_general_dilated_p:
            outs = [_convolution(eqn, ins, sites, sharded, jaxpr)]
        elif eqn.primitive is p.dot_general_p:
            outs = [_product(eqn, ins, sites)]
        elif is_identity(eqn):
            outs = [_cast(eqn, value, v) for value, v in zip(ins, eqn.outvars)]
        elif eqn.primitive.name not in MOVES and programs_inside(eqn):
            outs = _container(eqn, ins, sites, sharded, captured_is_input)
        else:
            outs = results_of(program, eqn, ins)
        if eqn.primitive.name in MOVES or not programs_inside(eqn):
            still = {id(out.output.site) for out in outs if out.output}
            for value in ins:
                if value.output and id(value.output.site) not in still:
                    value.use()
        known.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _through_reference(eqn: Any, ins: list[Value], sites: Sites) -> list[Value]:
    """Returns the results of an equation that reads or writes a mutable reference, whose contents are not followed."""
    name = eqn.primitive.name
    sites.add_reason([v.kernel.leaf for v in ins if v.kernel], f"it goes through a mutable reference by {name}")
    movement = _not_followed("its input was read from a mutable reference")
    outs = [computed(name, ins, getattr(v.aval, "shape", ())) for v in eqn.outvars]
    return [dataclasses.replace(out, from_input=True, movement=movement) for out in outs]


def _not_followed(why: str) -> Callable[[], ElementMap]:
    """Returns a movement of which nothing is known."""

    def movement():
        raise NotUnderstood(why)

    return movement


def _captured(array: Any, is_input: bool) -> Value:
    """Returns the value of an array that fn captured. If fn has no other input, an image among them is the input."""
    known = None if isinstance(array, jax.core.Tracer) or not hasattr(array, "__array__") else lambda: as_array(array)
    is_input = is_input and jnp.issubdtype(getattr(array, "dtype", np.int32), jnp.inexact)
    return Value(jnp.shape(array), from_input=is_input, captured=True, constant=None if is_input else known)


def _cast(eqn: Any, value: Value, out: Any) -> Value:
    if value.constant:
        return dataclasses.replace(value, constant=lambda: np.asarray(value.constant()).astype(out.aval.dtype))  # type: ignore[misc]
    if not jnp.issubdtype(out.aval.dtype, jnp.inexact) or quantises(eqn):
        if value.kernel:
            return computed(eqn.primitive.name, [value], value.shape)
        value.use()
        return dataclasses.replace(value, output=None)
    return value


# Containers: equations that hold programs.


def _container(eqn: Any, ins: list[Value], sites: Sites, *settings: bool) -> list[Value]:
    """Walks the programs inside an equation, each with the values of the operands that feed it."""
    walk = lambda program, values: _walk(program, values, sites, *settings)
    if eqn.primitive is p.scan_p:
        (body,) = programs_inside(eqn)
        consts, carries = scan_split(eqn)
        inside = [_scanned(value, v, i) for value, v, i in zip(ins, eqn.invars, open_jaxpr(body).invars, strict=True)]
        outs = _loop(body, inside, slice(consts, consts + carries), sites, walk)
        stacked = [_gathered_up("scan", out, v) for out, v in zip(outs[carries:], eqn.outvars[carries:])]
        return [*outs[:carries], *stacked]
    if eqn.primitive is p.while_p:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        ins = list(map(entering_a_loop, ins))
        carried = ins[of_cond + of_body :]
        outs = _loop(eqn.params["body_jaxpr"], ins[of_cond:], slice(of_body, None), sites, walk)
        outs = list(map(join, carried, outs))  # the body may run no time at all
        walk(eqn.params["cond_jaxpr"], [*ins[:of_cond], *outs])
        return outs
    if eqn.primitive is p.cond_p:
        branches = [walk(branch, ins[1:]) for branch in eqn.params["branches"]]
        return [functools.reduce(join, outs) for outs in zip(*branches)]
    if program := called_program(eqn):
        return walk(program, ins)
    name = eqn.primitive.name
    if name == "shard_map":
        (program,) = programs_inside(eqn)
        shapes = lambda variables: [v.aval.shape for v in variables]
        local = shapes(open_jaxpr(program).invars) != shapes(eqn.invars)  # the shapes inside are one device's
        outs = _walk(program, ins, sites, settings[0] or local, *settings[1:])
        return outs if not local else [_gathered_up(name, out, v) for out, v in zip(outs, eqn.outvars)]
    for value in ins:
        value.use()
        if value.kernel and len(value.shape) > (1 if sites.dense else 2):
            sites.add_reason([value.kernel.leaf], f"it enters {name}, whose inside is not read")
    movement = _not_followed(f"its input comes out of {name}, whose inside is not read")
    return [dataclasses.replace(computed(name, ins, v.aval.shape), movement=movement) for v in eqn.outvars]


def _gathered_up(name: str, out: Value, v: Any) -> Value:
    """Returns what a container makes of the values of several steps or devices."""
    out.use()
    shape = v.aval.shape
    movement = lambda: unmoved([out], f"{name} put it together", shape)
    return dataclasses.replace(computed(name, [out], shape), movement=movement)


def _loop(body: Any, ins: list[Value], carry: slice, sites: Sites, walk: Callable) -> list[Value]:
    """Walks a loop's body once its carry's values are those of any iteration, not of the first alone."""
    recording, sites.recording = sites.recording, False
    ins = list(ins)
    facts = lambda value: (value.leaves, value.from_input, value.captured, value.kernel, value.constant is None)
    while True:
        outs = walk(body, ins)
        joined = list(map(join, ins[carry], outs))
        settled = all(facts(before) == facts(after) for before, after in zip(ins[carry], joined, strict=True))
        ins[carry] = joined
        if settled:
            break
    sites.recording = recording
    return walk(body, ins)


def _scanned(value: Value, outside: Any, inside: Any) -> Value:
    """Returns the value inside a scan's body: the same, or a slice along the leading axis."""
    if outside.aval.ndim == inside.aval.ndim:
        return entering_a_loop(value)
    value.use()
    shape = inside.aval.shape
    if value.kernel and value.kernel.elements.axes:
        return dataclasses.replace(value, shape=shape, kernel=member(value.kernel, 0), movement=None)
    if not value.from_input and not value.movement:
        return computed("scan", [value], shape)
    movement = lambda: unmoved([value], "it entered a loop", shape)
    return dataclasses.replace(computed("scan", [value], shape), movement=movement)


# Convolutions and products.


def _convolution(eqn: Any, ins: list[Value], sites: Sites, sharded: bool, jaxpr: Any) -> Value:
    (image, kernel), shape = ins, eqn.invars[1].aval.shape
    out = computed("conv_general_dilated", [image, kernel], eqn.outvars[0].aval.shape)
    if kernel.kernel:
        spatial = {n: out.shape[n] for n in eqn.params["dimension_numbers"].out_spec[2:]}
        inside = "its convolution is inside shard_map, whose shapes are one device's: trace the model without it"
        found = inside if sharded else _described(eqn, image, kernel.kernel, sites, jaxpr)
        site = Site(found, spatial, _covers(eqn), image)
        sites.add(kernel.kernel.leaf, site)
        return dataclasses.replace(out, output=Output(site), kernels=frozenset())
    if kernel.leaves and (kernel.kernels or not kernel.from_input):
        through = "fn's input" if kernel.from_input else _shown(kernel.ops)
        reason = f"reaches the convolution through {through} (masked, modulated, standardised, normalised, sliced?)"
        sites.add_reason(kernel.kernels or kernel.leaves, reason)
    elif kernel.from_input:
        sites.add_unowned(f"{shape}, computed from fn's input (or fn contains its own gradient: trace it without)")
    elif kernel.captured:
        sites.add_unowned(f"{shape}, captured by closure: pass it to fn inside params, unless it is a fixed filter")
    movement = None
    if image.from_input and kernel.constant:  # it may cut patches out
        movement = lambda: _cut_out(eqn, image, kernel)
    return dataclasses.replace(out, movement=movement, kernels=frozenset())


def _cut_out(eqn: Any, image: Value, kernel: Value) -> ElementMap:
    try:
        found = cut_out(eqn, image.elements, np.asarray(kernel.constant()))  # type: ignore[misc]
    except TypeError:  # its value is not to be had
        found = None
    return identity(Source(eqn.outvars[0].aval.shape)) if found is None else found


def _shown(ops: Sequence[str], most: int = 6) -> str:
    """Names the first operations, and counts the rest."""
    return ", ".join(ops[:most]) + (f" and {len(ops) - most} more" if len(ops) > most else "")


def _covers(eqn: Any) -> tuple[bool, ...]:
    """Tells for each spatial axis whether the output holds all that a kernel reaches from any pixel of the input."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    out, image, kernel = (v.aval.shape for v in (*eqn.outvars, *eqn.invars))
    covers = []
    for n, (low, _) in enumerate(params["padding"]):
        reach = params["rhs_dilation"][n] * (kernel[numbers.rhs_spec[2 + n]] - 1)
        last = (image[numbers.lhs_spec[2 + n]] - 1) * params["lhs_dilation"][n] + low
        covers.append(params["window_strides"][n] == 1 and low >= reach and last < out[numbers.out_spec[2 + n]])
    return tuple(covers)


def _is_split(jaxpr: Any, eqn: Any) -> bool:
    """Tells whether a convolution's output channels do nothing but be taken apart, as by ``vmap``."""
    (out,), axis = eqn.outvars, eqn.params["dimension_numbers"].out_spec[1]
    users = [user for user in jaxpr.eqns if any(v is out for v in user.invars)]
    channels = out.aval.shape[axis]
    split = lambda shape: shape[:axis] == out.aval.shape[:axis] and shape[axis : axis + 1] < (channels,)
    apart = all(user.primitive is p.reshape_p and split(user.outvars[0].aval.shape) for user in users)
    return apart and not any(v is out for v in jaxpr.outvars)


def _is_one_image(image: Value, axis: int) -> bool:
    """Tells whether the channels of an image are sure not to be those of several, as ``vmap`` merges them.

    It merges the channels of convolutions alone, and takes those of their results apart again.
    """
    try:
        elements = image.elements
    except NotUnderstood:
        return False
    if image.output or elements.axes is None or len(elements.sources) != 1 or not elements.sources[0].size:
        return False
    places = np.stack(np.unravel_index(np.maximum(elements.axes[axis], 0), elements.sources[0].shape))
    return bool(np.count_nonzero(np.ptp(places, axis=1)) <= 1)


def _described(eqn: Any, image: Value, kernel: Kernel, sites: Sites, jaxpr: Any) -> Conv | str:
    """Returns the ``Conv`` of a convolution, or why there is none."""
    try:
        numbers = eqn.params["dimension_numbers"]
        spec = numbers.rhs_spec
        is_one_image = functools.partial(_is_one_image, image, numbers.lhs_spec[1])
        is_split = functools.partial(_is_split, jaxpr, eqn)
        axes = Axes(kernel, tuple(sites.leaves[kernel.leaf].shape))
        letters = dict(zip(spec, kernel_letters(eqn)))
        groups = axes.assign(letters, eqn.params["feature_group_count"], is_one_image, is_split)
        layout, stacked = axes.layout()
        flipped = [axes.is_flipped(n) for n in spec[2:]]
        alone = read_convolution(eqn, None, layout, flipped, groups=groups, stacked=stacked)
        sites.check(kernel.leaf, alone)
        try:
            return read_convolution(eqn, image.elements, layout, flipped, groups=groups, stacked=stacked)
        except ValueError as error:
            return f"{error}. To constrain the layer without what was done to its input, write {alone} by hand"
    except (TypeError, ValueError) as error:
        return str(error)


def _product(eqn: Any, ins: list[Value], sites: Sites) -> Value:
    contracted, batched = eqn.params["dimension_numbers"]
    out, kernels = computed("dot_general", ins, eqn.outvars[0].aval.shape), set()
    for me, (value, other) in enumerate(zip(ins, reversed(ins))):
        if not value.kernel:
            if value.kernels and not value.from_input and other.from_input:
                matrices = [n for n in value.leaves if _is_matrix(sites.leaves[n].shape, sites.dense)]
                sites.add_reason(
                    matrices, f"reaches the product through {_shown(value.ops)} (masked, scaled, low rank?)"
                )
            continue
        shape, beside = tuple(sites.leaves[value.kernel.leaf].shape), eqn.invars[1 - me].aval.shape
        free = [n for d, n in enumerate(beside) if d not in contracted[1 - me] and d not in batched[1 - me]]
        found = read_matrix(value.kernel, contracted[me], batched[me], shape, free)
        if found is None or (isinstance(found, Conv) and not found.input_shape and not sites.dense):
            continue
        if isinstance(found, str):
            kernels.add(value.kernel.leaf)
            if not sites.dense:
                continue
        # What fn makes itself may be an image, or the basis of a parameter: it is taken for that if there is one pixel
        # axis. A product of two parameters is no layer, except that a learned array may be multiplied by a matrix.
        pixels = len(found.input_shape) if isinstance(found, Conv) else 0
        is_made = not other.leaves and other.shape != () and (sites.dense or pixels > 1)
        is_learned = me == 1 and other.leaves and not pixels and (isinstance(found, Conv) or not other.kernel)
        if other.from_input or other.captured or is_made or is_learned:
            try:
                if isinstance(found, Conv):
                    sites.check(value.kernel.leaf, found)
                    _check_copies(other, found, contracted[1 - me])
            except (TypeError, ValueError) as error:
                found = str(error)
            site = Site(found, image=other)
            sites.add(value.kernel.leaf, site)
            out = dataclasses.replace(out, output=Output(site))
    return dataclasses.replace(out, kernels=frozenset(kernels))


def _is_matrix(shape: Sequence[int], dense: bool) -> bool:
    """Tells whether a parameter may be a matrix, or without dense layers a 1x1 kernel."""
    return len(shape) >= 2 if dense else len(shape) >= 4 and sum(length != 1 for length in shape) <= 2


def _check_copies(image: Value, conv: Conv, contracted: Sequence[int]) -> None:
    """Raises an error if a product's input holds copies: those that a convolution's may not hold, or those of patches.

    A matrix may be applied to several copies of the same rows. In patches the same element stands at several places of
    a row.
    """
    try:
        if max(image.elements.copies) <= 1:
            return
        numbers = np.moveaxis(image.elements.numbers(), contracted, range(len(contracted)))
        numbers = numbers.reshape(math.prod(numbers.shape[: len(contracted)]), -1)
        held, places = numbers[numbers >= 0], np.nonzero(numbers >= 0)[0]
        first = np.full(held.max(initial=0) + 1, -1)
        first[held] = places
    except NotUnderstood:
        if conv.input_shape:
            raise
        return
    if conv.input_shape or (first[held] != places).any():
        raise ValueError("its input holds copies of the same elements")
