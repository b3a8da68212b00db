"""Finds a model's convolutions by a forward walk over its traced program.

Every variable of the program has a :class:`_Value`. It says which parameter's numbers the variable holds, if it only
moved them, and otherwise which parameters it was computed from. For images it says, on demand, which element of an
earlier array each element is: so padding is read off exactly, whatever wrote it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import SPATIAL_LETTERS, Conv, Unknown, check_kernel
from opnorm_jax._program.convolution import kernel_letters, read_convolution
from opnorm_jax._program.jaxpr import (
    Literal,
    called_program,
    evaluate,
    is_identity,
    open_jaxpr,
    p,
    programs_inside,
    scan_split,
    touches_reference,
    trace,
)
from opnorm_jax._program.movement import (
    HOLE,
    MOVES,
    ElementMap,
    NotUnderstood,
    Source,
    control_operands,
    identity,
    moved,
    of_axes,
    split_by_axis,
)


def find_convs(
    fn: Callable[..., Any], params: Any, *args: Any, on_unknown: str = "error", dense: bool = False, **kwargs: Any
) -> Any:
    """Finds the convolutions of a model: returns a tree shaped like ``params`` with a :class:`Conv` at each kernel.

    The function traces ``fn(params, *args, **kwargs)``, any JAX function of any framework, and reads off what each
    parameter feeds: input shapes, strides, dilation, groups and layouts. Padding is given as it is for these shapes, in
    explicit pairs. Zeros padded on beforehand are part of it. Circular padding is recognised however it is written,
    that of circular transposed convolutions (Flax's and Equinox's) included. Nothing is computed.

    It sees through ``jit``, ``checkpoint``, ``scan``, ``cond``, ``while_loop``, custom derivatives, casts, transposed
    and flipped kernels, and reads 1 x 1 convolutions written as matrix products. Stacked kernels (those that ``scan``
    or an index takes apart along their leading axes, and those that ``vmap`` runs side by side) get the ``Conv`` of
    each member, with ``stacked`` set.

    A convolution's input is the array before its pixels were last moved. It is described only where each of its pixels
    occurs once, with zeros around or between them, or where the pixels come round in a circle. Any other movement is
    reported: padding with edge pixels or reflections, nearest resizing, copies of channels or of examples, constant
    channels. The reason then gives the ``Conv`` of the layer alone, to be written by hand.

    Args:
      fn: a function of the parameters first. A kernel captured by closure instead cannot be found, and is reported.
        Trace the forward function, not its gradient.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``; leaves of other types are passed on as they are. Modules of
        Equinox and states of Flax NNX are such trees.
      *args, **kwargs: the function's other arguments. Arrays and ``ShapeDtypeStruct`` are traced (a batch of 1 will
        do), everything else is passed on as it is. The convolutions are those of *these* shapes.
      on_unknown: what becomes of a kernel that no ``Conv`` describes: masked, standardised or normalised weights, a
        kernel used with two geometries, complex or integer kernels, padding that reflects. With ``"error"`` a
        ValueError names each with the reason. With ``"skip"`` its place in the result holds an :class:`Unknown` with
        the reason; every function of this library passes over it.
      dense: also report matrices, as the 0-dimensional convolution ``Conv(())``.

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
    if on_unknown not in ("error", "skip"):
        raise ValueError(f"expected on_unknown to be 'error' or 'skip', got {on_unknown!r}.")
    if not callable(fn):
        raise TypeError(f"expected fn to be a function of the parameters, got {fn!r}. Pass model.apply, say.")
    traced = trace(fn, params, args, kwargs)
    count = len(traced.leaves)
    sites = _Sites(traced.leaves, dense)
    values = [
        _parameter(n, traced.leaves[n]) if n < count else _Value(tuple(leaf.shape), from_input=True)
        for n, leaf in zip(traced.positions, traced.values)
    ]
    _walk(traced.program, values, sites, False, all(n < count for n in traced.positions))
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
    return jax.tree.unflatten(traced.treedef, [found.get(n) for n in range(count)])


def _parameter(n: int, leaf: Any) -> _Value:
    shape, alone = tuple(leaf.shape), frozenset([n])
    kernel = _Kernel(n, identity(Source(shape))) if math.prod(shape) else None
    return _Value(shape, leaves=alone, kernels=alone, kernel=kernel)


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernel:
    """A parameter, or one member of a stack, whose numbers were only moved."""

    leaf: int
    elements: ElementMap  # of the parameter
    swept: tuple[np.ndarray, ...] = ()  # entries of the axes that a loop or an unknown index takes apart


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """What is known of one variable."""

    shape: tuple[int, ...] = ()
    leaves: frozenset[int] = frozenset()  # parameters it was computed from
    kernels: frozenset[int] = frozenset()  # those of them that it still has the numbers of, each changed by itself
    ops: tuple[str, ...] = ()  # by what
    from_input: bool = False
    captured: bool = False  # computed from an array that fn captured by closure
    constant: Callable[[], np.ndarray] | None = None  # gives its value, if nothing traced is in it
    kernel: _Kernel | None = None
    movement: Callable[[], ElementMap] | None = None  # gives the map of its elements; None: it is an array of its own
    site: _Site | None = None  # the convolution that it is the output of, at most moved since

    @functools.cached_property
    def elements(self) -> ElementMap:
        """Which element of earlier arrays each element is. Raises ``NotUnderstood``."""
        return self.movement() if self.movement else identity(Source(self.shape))


@dataclasses.dataclass(eq=False)
class _Site:
    """One application of a convolution to a parameter."""

    found: Conv | str  # the reason why there is none
    spatial: dict[int, int] = dataclasses.field(default_factory=dict)  # the output's spatial axes and their lengths
    covers: tuple[bool, ...] = ()  # whether the output holds all that the kernel reaches
    periods: dict[int, int] = dataclasses.field(default_factory=dict)  # of the axes along which the output is wrapped

    def decided(self) -> Conv | str:
        if not self.periods or isinstance(self.found, str):
            return self.found
        conv = self.found
        circle = tuple(n * e for n, e in zip(conv.input_shape, conv.input_dilation))
        wrapped = tuple(self.periods.get(axis, length) for axis, length in self.spatial.items())
        if wrapped == circle and set(conv.strides) == {1} and all(self.covers):
            return dataclasses.replace(conv, padding="CIRCULAR")
        return "its output is wrapped around and summed, but not as by a circular convolution: no Conv says so"


class _Sites:
    """Where parameters feed convolutions."""

    def __init__(self, leaves: list[Any], dense: bool):
        self.leaves, self.dense = leaves, dense
        self.of: dict[int, list[_Site]] = {}
        self.unowned: list[str] = []
        self.recording = True

    def add(self, leaf: int, site: _Site) -> None:
        if self.recording:
            self.of.setdefault(leaf, []).append(site)

    def add_reason(self, leaves: Iterable[int], reason: str) -> None:
        for leaf in leaves:
            self.add(leaf, _Site(reason))

    def add_unowned(self, reason: str) -> None:
        if self.recording:
            self.unowned.append(reason)

    def check(self, leaf: int, conv: Conv) -> None:
        """Raises what is wrong with a parameter as a kernel, such as a complex dtype."""
        shape, dtype = self.leaves[leaf].shape, self.leaves[leaf].dtype
        check_kernel(jax.ShapeDtypeStruct(shape[conv.stacked :], dtype), conv)

    def decide(self, leaf: int) -> Conv | Unknown:
        uses = [site.decided() for site in self.of[leaf]]
        for use in uses:
            if isinstance(use, str):
                return Unknown(use)
        different = list(dict.fromkeys(uses))
        if len(different) == 1:
            return different[0]  # type: ignore[return-value]
        listed = "; ".join(map(str, different))
        return Unknown(f"used with {len(different)} geometries (shared, or fn contains its own gradient?): {listed}")


def _walk(
    program: Any, values: Sequence[_Value], sites: _Sites, sharded: bool, captured_is_input: bool
) -> list[_Value]:
    """Returns the values of a program's outputs; its inputs have ``values``."""
    jaxpr = open_jaxpr(program)
    known: dict[Any, _Value] = dict(zip(jaxpr.invars, values, strict=True))
    for v, array in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=False):
        known[v] = _captured(array, captured_is_input)
    for v in jaxpr.constvars:
        known.setdefault(v, _Value(v.aval.shape, captured=True))

    def read(v):
        if isinstance(v, Literal):
            return _Value(np.shape(v.val), constant=lambda: np.asarray(v.val))
        return known[v]

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        if touches_reference(eqn):
            outs = _through_reference(eqn, ins, sites)
        elif eqn.primitive is p.conv_general_dilated_p:
            outs = [_convolution(eqn, ins, sites, sharded)]
        elif eqn.primitive is p.dot_general_p:
            outs = [_product(eqn, ins, sites)]
        elif is_identity(eqn):
            outs = [_cast(eqn, value, v) for value, v in zip(ins, eqn.outvars)]
        elif eqn.primitive.name not in MOVES and programs_inside(eqn):
            outs = _container(eqn, ins, sites, sharded, captured_is_input)
        else:
            outs = _results(program, eqn, ins)
        known.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _through_reference(eqn: Any, ins: list[_Value], sites: _Sites) -> list[_Value]:
    """The results of an equation that reads or writes a mutable reference, whose contents are not followed."""
    name = eqn.primitive.name
    sites.add_reason([v.kernel.leaf for v in ins if v.kernel], f"it goes through a mutable reference by {name}")

    def movement():
        raise NotUnderstood("its input was read from a mutable reference")

    outs = [_computed(name, ins, getattr(v.aval, "shape", ())) for v in eqn.outvars]
    return [dataclasses.replace(out, from_input=True, movement=movement) for out in outs]


def _captured(array: Any, is_input: bool) -> _Value:
    """The value of an array that fn captured. If fn has no other input, an image among them is the input."""
    known = None if isinstance(array, jax.core.Tracer) or not hasattr(array, "__array__") else lambda: np.asarray(array)
    is_input = is_input and jnp.issubdtype(getattr(array, "dtype", np.int32), jnp.inexact)
    return _Value(jnp.shape(array), from_input=is_input, captured=True, constant=None if is_input else known)


def _computed(name: str, ins: Sequence[_Value], shape: tuple[int, ...]) -> _Value:
    """The value of a result of which nothing is known except what it was computed from."""
    from_input = any(value.from_input for value in ins)
    ops = tuple(dict.fromkeys([*(op for value in ins for op in value.ops), name]))
    leaves = frozenset().union(*(value.leaves for value in ins))
    kernels = frozenset().union(*(value.kernels for value in ins if value.shape == shape))
    return _Value(shape, leaves, kernels, ops, from_input, any(value.captured for value in ins))


def _cast(eqn: Any, value: _Value, out: Any) -> _Value:
    if value.constant:
        return dataclasses.replace(value, constant=lambda: np.asarray(value.constant()).astype(out.aval.dtype))  # type: ignore[misc]
    if value.kernel and not jnp.issubdtype(out.aval.dtype, jnp.inexact):
        return _computed(eqn.primitive.name, [value], value.shape)
    return value


# Containers: equations that hold programs.


def _container(eqn: Any, ins: list[_Value], sites: _Sites, *settings: bool) -> list[_Value]:
    """Walks the programs inside an equation, each with the values of the operands that feed it."""
    walk = lambda program, values: _walk(program, values, sites, *settings)
    if eqn.primitive is p.scan_p:
        (body,) = programs_inside(eqn)
        consts, carries = scan_split(eqn)
        inside = [_scanned(value, v, i) for value, v, i in zip(ins, eqn.invars, open_jaxpr(body).invars, strict=True)]
        outs = _loop(body, inside, slice(consts, consts + carries), sites, walk)
        stacked = [_computed("scan", [out], v.aval.shape) for out, v in zip(outs[carries:], eqn.outvars[carries:])]
        return [*outs[:carries], *stacked]
    if eqn.primitive is p.while_p:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        ins = list(map(_entering_a_loop, ins))
        carried = ins[of_cond + of_body :]
        outs = _loop(eqn.params["body_jaxpr"], ins[of_cond:], slice(of_body, None), sites, walk)
        outs = list(map(_join, carried, outs))  # the body may run no time at all
        walk(eqn.params["cond_jaxpr"], [*ins[:of_cond], *outs])
        return outs
    if eqn.primitive is p.cond_p:
        branches = [walk(branch, ins[1:]) for branch in eqn.params["branches"]]
        return [functools.reduce(_join, outs) for outs in zip(*branches)]
    if program := called_program(eqn):
        return walk(program, ins)
    name = eqn.primitive.name
    if name == "shard_map":
        (program,) = programs_inside(eqn)
        shapes = lambda variables: [v.aval.shape for v in variables]
        local = shapes(open_jaxpr(program).invars) != shapes(eqn.invars)  # the shapes inside are one device's
        outs = _walk(program, ins, sites, settings[0] or local, *settings[1:])
        return outs if not local else [_computed(name, ins, v.aval.shape) for v in eqn.outvars]
    for value in ins:
        if value.kernel and len(value.shape) > (1 if sites.dense else 2):
            sites.add_reason([value.kernel.leaf], f"it enters {name}, whose inside is not read")
    return [_computed(name, ins, v.aval.shape) for v in eqn.outvars]


def _loop(body: Any, ins: list[_Value], carry: slice, sites: _Sites, walk: Callable) -> list[_Value]:
    """Walks a loop's body once its carry's values are those of any iteration, not of the first alone."""
    recording, sites.recording = sites.recording, False
    ins = list(ins)
    facts = lambda value: (value.leaves, value.from_input, value.captured, value.kernel, value.constant is None)
    while True:
        outs = walk(body, ins)
        joined = list(map(_join, ins[carry], outs))
        settled = all(facts(before) == facts(after) for before, after in zip(ins[carry], joined, strict=True))
        ins[carry] = joined
        if settled:
            break
    sites.recording = recording
    return walk(body, ins)


def _join(one: _Value, other: _Value) -> _Value:
    """What holds of a variable that has either value."""
    if one is other or (one.kernel is not None and _same_kernel(one.kernel, other.kernel)):
        return one
    joined = _computed("a loop or a branch that changes it", [one, other], one.shape)
    return dataclasses.replace(joined, movement=lambda: _unmoved([one, other], "one of the branches that join"))


def _same_kernel(one: _Kernel, other: _Kernel | None) -> bool:
    if one is other:
        return True
    if other is None or one.leaf != other.leaf or one.elements.shape != other.elements.shape:
        return False
    return np.array_equal(one.elements.numbers(), other.elements.numbers()) and all(
        map(np.array_equal, one.swept, other.swept)
    )


def _unmoved(values: Sequence[_Value], where: str) -> ElementMap:
    """The map of an array that counts as one of its own, if none of ``values`` holds copies or constants."""
    for value in values:
        if value.from_input and not value.elements.is_injective:
            raise NotUnderstood(f"its input was padded or copied before {where}")
    return identity(Source(values[0].shape))


def _entering_a_loop(value: _Value) -> _Value:
    if value.kernel or not value.from_input:
        return value
    return dataclasses.replace(value, site=None, movement=lambda: _unmoved([value], "it entered a loop"))


def _scanned(value: _Value, outside: Any, inside: Any) -> _Value:
    """The value inside a scan's body: the same, or a slice along the leading axis."""
    if outside.aval.ndim == inside.aval.ndim:
        return _entering_a_loop(value)
    shape = inside.aval.shape
    if value.kernel and value.kernel.elements.axes:
        return dataclasses.replace(value, shape=shape, kernel=_member(value.kernel, 0))
    if value.constant or not value.from_input:
        return dataclasses.replace(_computed("scan", [value], shape), movement=None)

    def movement():
        _unmoved([value], "it entered a loop")
        return identity(Source(shape))

    return dataclasses.replace(_computed("scan", [value], shape), movement=movement)


def _member(kernel: _Kernel, axis: int) -> _Kernel | None:
    """One of the kernels stacked along an axis, which goes."""
    axes = list(kernel.elements.axes)  # type: ignore[arg-type]
    swept = axes.pop(axis)
    if not axes:
        return None
    axes[0] = axes[0] + swept[0]
    return _Kernel(kernel.leaf, of_axes(kernel.elements, axes), (*kernel.swept, swept))


# Equations that hold no program.


def _results(program: Any, eqn: Any, ins: list[_Value]) -> list[_Value]:
    """The values of an equation's results: constants, or moved parameters or images, or else computed."""
    name, shapes = eqn.primitive.name, [getattr(v.aval, "shape", ()) for v in eqn.outvars]
    if all(value.constant for value in ins):
        evaluated = functools.cache(lambda: _evaluated(program, eqn, ins))
        return [_Value(shape, constant=lambda n=n: evaluated()[n]) for n, shape in enumerate(shapes)]
    outs = [_computed(name, ins, shape) for shape in shapes]
    followed = [value for value in ins if value.from_input]
    movable = not followed or (name == "dynamic_slice" and ins[0].kernel)
    if name in MOVES and movable and len({value.kernel for value in ins if value.kernel}) == 1:
        return _moved_kernels(eqn, ins, outs)
    if name == "reduce_sum" and len(followed) == 1 and followed[0].site:
        return [_summed(eqn, followed[0], outs[0])]
    if name in MOVES and followed:
        maps = functools.cache(lambda: _moved(eqn, ins))
        site = followed[0].site if len(followed) == 1 else None
        return [
            dataclasses.replace(out, movement=lambda n=n: maps()[n], site=site, kernels=_kept(ins))
            for n, out in enumerate(outs)
        ]
    if name in ("add", "sub", "add_any", "neg") and len(followed) == 1 and followed[0].shape == shapes[0]:
        # What is added does not depend on the image.
        return [dataclasses.replace(outs[0], movement=lambda: followed[0].elements, site=followed[0].site)]
    if name in MOVES:
        return [dataclasses.replace(out, kernels=_kept(ins)) for out in outs]
    return outs


def _kept(ins: Sequence[_Value]) -> frozenset[int]:
    return frozenset().union(*(value.kernels for value in ins))


def _evaluated(program: Any, eqn: Any, ins: Sequence[_Value]) -> list[np.ndarray]:
    with jax.ensure_compile_time_eval():
        outs = evaluate(program, eqn, [jnp.asarray(value.constant()) for value in ins])  # type: ignore[misc]
    return [None if out is None else np.asarray(out) for out in outs]  # type: ignore[misc]


def _known(ins: Sequence[_Value]) -> Callable[[int], np.ndarray | None]:
    def value(n):
        constant = ins[n].constant
        return constant() if constant else None

    return value


def _moved(eqn: Any, ins: Sequence[_Value]) -> list[ElementMap]:
    """The maps of the results of an equation that may be nothing but movement."""
    name, outs = eqn.primitive.name, eqn.outvars
    fresh = lambda: [identity(Source(v.aval.shape)) for v in outs]
    if any(ins[n].from_input for n in control_operands(name, len(ins))):
        if name in ("gather", "scatter", "scatter-add", "dynamic_update_slice"):
            raise NotUnderstood(f"its input was put together by {name} at places not known beforehand")
        _unmoved(ins, f"it was chosen by {name}")
        return fresh()
    parts = [value.elements if value.from_input and math.prod(value.shape) else None for value in ins]
    sources = [source for source in dict.fromkeys(s for part in parts if part for s in part.sources)]
    if len(sources) > 1 and name == "select_n":
        _unmoved([value for value in ins if value.from_input], "it was chosen by select_n")
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
    found = moved(eqn, parts, _known(ins))
    if found is None and name in ("gather", "scatter", "dynamic_update_slice"):
        raise NotUnderstood(f"its input was put together by {name} at places not known beforehand")
    if found is None and name in ("dynamic_slice", "select_n"):
        _unmoved(ins, f"it was chosen by {name}")
    return fresh() if found is None else found


def _moved_kernels(eqn: Any, ins: Sequence[_Value], outs: list[_Value]) -> list[_Value]:
    """The results of an equation that may only move the numbers of one parameter."""
    kernel = next(value.kernel for value in ins if value.kernel)
    if eqn.primitive.name == "dynamic_slice" and kernel.elements.axes and any(not v.constant for v in ins[1:]):
        found = [_sliced(kernel, outs[0].shape)]
    else:
        try:
            parts = [value.kernel.elements if value.kernel else None for value in ins]
            known = all(value.kernel or value.constant for value in ins)  # else other parameters are mixed in
            maps = moved(eqn, parts, _known(ins)) if known else None
        except NotUnderstood:
            maps = None
        found = [_Kernel(kernel.leaf, elements, kernel.swept) for elements in maps] if maps else [None] * len(outs)
    kept = _kept(ins)
    return [dataclasses.replace(out, kernel=new, kernels=kept) for out, new in zip(outs, found)]


def _sliced(kernel: _Kernel, shape: tuple[int, ...]) -> _Kernel | None:
    """One of the kernels of a stack, at an index that is not known."""
    axes, swept = list(kernel.elements.axes), list(kernel.swept)  # type: ignore[arg-type]
    for n, (old, new) in enumerate(zip(kernel.elements.shape, shape, strict=True)):
        if new not in (1, old):
            return None
        if new != old:
            swept.append(axes[n])
            axes[n] = axes[n][:1]
    return _Kernel(kernel.leaf, of_axes(kernel.elements, axes), tuple(swept))


def _summed(eqn: Any, value: _Value, out: _Value) -> _Value:
    """The sum of a convolution's output over axes that it was laid out in: Flax's circular transposed layers do so.

    Says so at the convolution's site if the sum adds outputs that lie a period apart, so that the output is wrapped.
    Its result then stands for the outputs of the first period.
    """
    site, axes = value.site, eqn.params["axes"]
    assert site is not None
    if all(value.shape[n] == 1 for n in axes):
        return dataclasses.replace(out, movement=lambda: _moved(eqn, [value])[0], site=site)
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
    first = [periods.get(axis, site.periods.get(axis, length)) for axis, length in enumerate(shape)]
    whole = [site.periods.get(axis, length) for axis, length in enumerate(shape)]
    corner, rest = target[tuple(map(slice, whole))], np.ones(shape, bool)
    rest[tuple(map(slice, whole))] = False
    again = target[tuple(np.ix_(*(np.arange(length) % period for length, period in zip(whole, first))))]
    distinct = len(np.unique(corner)) == math.prod(first)
    if (corner < 0).any() or (target[rest] >= 0).any() or (again != corner).any() or not distinct:
        site.found = "a part of its output is wrapped around and summed: no Conv says so"
    site.periods |= periods
    standing = np.full(math.prod(out.shape), HOLE)
    order = np.arange(math.prod(shape)).reshape(shape)[tuple(map(slice, first))]
    standing[np.maximum(target[tuple(map(slice, first))], 0)] = order
    table = standing.reshape(out.shape)
    return dataclasses.replace(
        out, site=site, movement=lambda: ElementMap(elements.sources, table.shape, split_by_axis(table) or None, table)
    )


def _distance(target: np.ndarray) -> int | None:
    """The smallest distance along the first axis between two elements that are added into one."""
    for step in range(1, len(target)):
        if ((target[step:] == target[:-step]) & (target[step:] >= 0)).any():
            return step
    return None


# Convolutions and products.


def _convolution(eqn: Any, ins: list[_Value], sites: _Sites, sharded: bool) -> _Value:
    (image, kernel), shape = ins, eqn.invars[1].aval.shape
    out = _computed("conv_general_dilated", [image, kernel], eqn.outvars[0].aval.shape)
    if kernel.kernel:
        spatial = {n: out.shape[n] for n in eqn.params["dimension_numbers"].out_spec[2:]}
        site = _Site(_described(eqn, image, kernel.kernel, sites, sharded), spatial, _covers(eqn))
        sites.add(kernel.kernel.leaf, site)
        return dataclasses.replace(out, site=site, kernels=frozenset())
    if kernel.leaves and (kernel.kernels or not kernel.from_input):
        through = "fn's input" if kernel.from_input else ", ".join(kernel.ops)
        reason = f"reaches the convolution through {through} (masked, modulated, standardised, sliced?)"
        sites.add_reason(kernel.kernels or kernel.leaves, reason)
    elif kernel.from_input:
        sites.add_unowned(f"{shape}, computed from fn's input (or fn contains its own gradient: trace it without)")
    elif kernel.captured:
        sites.add_unowned(f"{shape}, captured by closure: pass it to fn inside params, unless it is a fixed filter")
    return dataclasses.replace(out, kernels=frozenset())


def _covers(eqn: Any) -> tuple[bool, ...]:
    """For each spatial axis, whether the output holds everything that a kernel reaches from any pixel of the input."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    out, image, kernel = (v.aval.shape for v in (*eqn.outvars, *eqn.invars))
    covers = []
    for n, (low, _) in enumerate(params["padding"]):
        reach = params["rhs_dilation"][n] * (kernel[numbers.rhs_spec[2 + n]] - 1)
        last = (image[numbers.lhs_spec[2 + n]] - 1) * params["lhs_dilation"][n] + low
        covers.append(params["window_strides"][n] == 1 and low >= reach and last < out[numbers.out_spec[2 + n]])
    return tuple(covers)


def _described(eqn: Any, image: _Value, kernel: _Kernel, sites: _Sites, sharded: bool) -> Conv | str:
    """The ``Conv`` of a convolution, or why there is none."""
    if sharded:
        return "its convolution is inside shard_map, whose shapes are one device's: trace the model without it"
    try:
        spec = eqn.params["dimension_numbers"].rhs_spec
        axes = _Axes(kernel, tuple(sites.leaves[kernel.leaf].shape))
        letters = dict(zip(spec, kernel_letters(eqn)))
        groups = axes.assign(letters, eqn.params["feature_group_count"])
        layout, stacked = axes.layout()
        flipped = [axes.is_flipped(n) for n in spec[2:]]
        alone = read_convolution(eqn, None, layout, flipped, groups=groups, stacked=stacked)
        sites.check(kernel.leaf, alone)
        try:
            elements = image.elements if image.from_input else None
            return read_convolution(eqn, elements, layout, flipped, groups=groups, stacked=stacked)
        except ValueError as error:
            return f"{error}. To constrain the layer without what was done to its input, write {alone} by hand"
    except (TypeError, ValueError) as error:
        return str(error)


class _Axes:
    """Which axes of a parameter the axes of an operand run along."""

    def __init__(self, kernel: _Kernel, shape: tuple[int, ...]):
        elements = kernel.elements
        if elements.axes is None or min(int(entries.min()) for entries in elements.axes) <= HOLE // 2:
            raise ValueError("its numbers are rearranged before the convolution takes it")
        self.shape, self.operand = shape, elements.shape
        corner = sum(int(entries[0]) for entries in elements.axes)
        at = lambda entries: np.stack(np.unravel_index(corner + entries - entries[0], shape))
        self.places = [at(entries) for entries in elements.axes]  # (axis of the parameter, along the operand's axis)
        vary = lambda places: [axis for axis in range(len(shape)) if np.ptp(places[axis])]
        self.along = [vary(places) for places in self.places]
        self.swept = [axis for entries in kernel.swept for axis in vary(at(entries))]
        self.letters: dict[int, str] = {}  # by axis of the parameter
        used = [axis for along in (*self.along, self.swept) for axis in along]
        if len(used) > len(set(used)):
            raise ValueError("one of its axes is taken apart before the convolution takes it")
        self.left = [axis for axis in range(len(shape)) if axis not in used]
        for n, (along, length) in enumerate(zip(self.along, self.operand)):
            covered = math.prod(shape[axis] for axis in along)
            if len(np.unique(elements.axes[n])) < length:
                raise ValueError(f"it is repeated before the convolution takes it as {self.operand}")
            if covered != length:
                raise ValueError(f"the convolution takes a part of it, {self.operand}")

    def assign(self, letters: dict[int, str], groups: int) -> int:
        """Gives the parameter's axes the letters of the operand's, and returns the groups of one kernel.

        ``vmap`` merges a stack of kernels into output channels: as groups if each has an input of its own.
        """
        missing, own_groups = [], groups
        for n, along in enumerate(self.along):
            if not along:
                missing.append(letters[n])
                continue
            (*stack, axis), is_shared = self._slowest_first(n, along, groups if letters[n] == "O" else 1)
            if stack and letters[n] != "O":
                raise ValueError("several of its axes become one before the convolution takes it")
            members = math.prod(self.shape[other] for other in stack)
            if not is_shared and groups % members:
                raise ValueError(f"its {members} stacked kernels share {groups} groups")
            own_groups = groups if is_shared else groups // members
            self.swept += stack
            self.letters[axis] = letters[n]
            is_straight = np.array_equal(self.places[n][axis][: self.shape[axis]], np.arange(self.shape[axis]))
            # The order of channels changes no norm, except that output channels must not change their group.
            free = letters[n] == "I" or (letters[n] == "O" and own_groups == 1)
            if not (is_straight or free or (letters[n] not in "IO" and self.is_flipped(n))):
                raise ValueError("its numbers are rearranged along an axis before the convolution takes it")
        single = [axis for axis in self.left if self.shape[axis] == 1]
        if len(single) < len(missing) and len(single) < len(self.left):
            raise ValueError(f"the convolution takes a part of it, {self.operand}")
        if len(single) < len(missing):
            raise ValueError(
                f"an axis is inserted before the convolution takes it as {self.operand}: store it with all of its axes"
            )
        # Axes of length 1 are all alike: the usual layouts first.
        spatial = sorted(set(letters.values()) - {"I", "O"}, key="DHW".index)
        usual = ["".join(spatial) + "IO", "OI" + "".join(spatial), "".join(spatial) + "OI"]
        choices = []
        for chosen in itertools.permutations(single[len(single) - len(missing) :]):
            of = self.letters | dict(zip(chosen, missing))
            text = "".join(of[axis] for axis in sorted(of))
            choices.append((usual.index(text) if text in usual else len(usual), text, of))
        self.letters = min(choices, key=lambda choice: choice[:2])[2] if missing else self.letters
        return own_groups

    def _slowest_first(self, n: int, along: list[int], groups: int) -> tuple[list[int], bool]:
        """The parameter's axes along one of the operand's, if they were merged as by ``vmap``.

        Also whether the merged kernels share their input: then groups, if any, come before the members.
        """
        for *stack, axis in itertools.permutations(along) if len(along) > 1 else ():
            lengths, length = [self.shape[other] for other in stack], self.shape[axis]
            grid = np.indices([*lengths, length]).reshape(len(along), -1)
            if all(np.array_equal(self.places[n][a], line) for a, line in zip([*stack, axis], grid)):
                return [*stack, axis], groups == 1
            if length % groups == 0:
                first, *members, last = np.indices([groups, *lengths, length // groups]).reshape(len(along) + 1, -1)
                lines = [*members, first * (length // groups) + last]
                if all(np.array_equal(self.places[n][a], line) for a, line in zip([*stack, axis], lines)):
                    return [*stack, axis], True
        if len(along) == 1:
            return along, True
        raise ValueError("several of its axes become one before the convolution takes it")

    def layout(self) -> tuple[str, int]:
        """The layout of one kernel, and the number of stacked axes before it."""
        stack = sorted(axis for axis in range(len(self.shape)) if axis not in self.letters)
        if stack != list(range(len(stack))):
            raise ValueError(f"stacked along axes {stack}: only leading axes may be")
        return "".join(self.letters[axis] for axis in range(len(stack), len(self.shape))), len(stack)

    def is_flipped(self, n: int) -> bool:
        """Whether the operand's axis runs through one of the parameter's backwards."""
        along = self.along[n]
        return len(along) == 1 and np.array_equal(self.places[n][along[0]], np.arange(self.operand[n])[::-1])


def _product(eqn: Any, ins: list[_Value], sites: _Sites) -> _Value:
    contracted, batched = eqn.params["dimension_numbers"]
    for me, (value, other) in enumerate(zip(ins, reversed(ins))):
        if not value.kernel:
            continue
        shape, beside = tuple(sites.leaves[value.kernel.leaf].shape), eqn.invars[1 - me].aval.shape
        free = [n for d, n in enumerate(beside) if d not in contracted[1 - me] and d not in batched[1 - me]]
        found = _matrix(value.kernel, contracted[me], batched[me], shape, free)
        if found is None or (isinstance(found, Conv) and not found.input_shape and not sites.dense):
            continue
        if isinstance(found, str) and not sites.dense:
            continue
        is_image = other.from_input or other.captured
        # A product of two parameters is no layer, except that a learned array may be multiplied by a matrix.
        if is_image or (me == 1 and other.leaves and isinstance(found, Conv) and not found.input_shape):
            try:
                if isinstance(found, Conv):
                    sites.check(value.kernel.leaf, found)
            except (TypeError, ValueError) as error:
                found = str(error)
            sites.add(value.kernel.leaf, _Site(found))
    return dataclasses.replace(_computed("dot_general", ins, eqn.outvars[0].aval.shape), kernels=frozenset())


def _matrix(kernel: _Kernel, contracted: Any, batched: Any, shape: tuple, free: list[int]) -> Conv | str | None:
    """A parameter in a matrix product: a 1 x 1 convolution if axes of length 1 went, otherwise a dense layer."""
    rank = len(kernel.elements.shape)
    if rank < 2:
        return None
    try:
        axes = _Axes(kernel, shape)
    except ValueError as error:
        return str(error)
    outs = [n for n in range(rank) if n not in contracted and n not in batched]
    if len(contracted) != 1 or len(outs) != 1 or any(len(along) > 1 for along in axes.along):
        return "multiplies along several of its axes: it is no matrix"
    single = [axis for axis in axes.left if shape[axis] == 1]
    letters = {}
    for n, letter in ((outs[0], "O"), (contracted[0], "I")):
        if not axes.along[n] and not single:
            return "an axis is inserted before it is multiplied: it is no matrix"
        letters[axes.along[n][0] if axes.along[n] else single.pop()] = letter
    stack = [axis for axis in axes.swept] + [axis for axis in axes.left if shape[axis] != 1]
    stack += [axis for n in batched for axis in axes.along[n]]
    single = [axis for axis in single if axis not in axes.swept]
    if len(single) >= len(SPATIAL_LETTERS):
        return "multiplies along several of its axes: it is no matrix"
    if sorted(stack) != list(range(len(stack))):
        return f"stacked along axes {sorted(stack)}: only leading axes may be"
    letters |= dict(zip(single, SPATIAL_LETTERS[len(single)]))
    # The free axes of the image: batch and space, if there are as many.
    spatial = len(single)
    input_shape = free[-spatial:] if spatial and len(free) in (spatial, spatial + 1) else [1] * spatial
    layout = "".join(letters[axis] for axis in range(len(stack), len(shape)))
    return Conv(tuple(input_shape), padding=((0, 0),) * spatial, kernel_layout=layout, stacked=len(stack))
