"""Finding a model's convolutions: a forward walk over its traced program.

Every variable of the program carries a :class:`_Value`: which parameter it still is, axis by axis, or which parameters
it was computed from; and, for images, which pixel of an earlier image each of its pixels is, so that padding done by
slices and concatenations before a convolution is read off exactly, whatever wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import SPATIAL_LETTERS, Conv, Unknown
from opnorm_jax._program.jaxpr import (
    Literal,
    all_pixels,
    conv_of,
    is_identity,
    kernel_letters,
    moved_pixels,
    opened,
    p,
    programs_inside,
    relabelled,
    scan_split,
)
from opnorm_jax._program.movement import Pixels


def find_convs(
    fn: Callable[..., Any], params: Any, *args: Any, on_unknown: str = "error", dense: bool = False, **kwargs: Any
) -> Any:
    """The convolutions of a model: a tree shaped like ``params`` with a :class:`Conv` at each kernel.

    Traces ``fn(params, *args, **kwargs)``, any JAX function of any framework, and reads off what each parameter feeds:
    input shapes, strides, dilation, groups and layouts; padding as resolved for these shapes, in explicit pairs, zeros
    padded on beforehand included; circular padding, however it is written. Nothing is computed.

    It sees through ``jit``, ``checkpoint``, ``scan``, ``cond``, ``while_loop``, custom derivatives, casts, transposed
    and flipped kernels, and reads 1 x 1 convolutions written as matrix products. Stacked kernels (those that ``scan``
    or an index takes apart along their leading axes) get the ``Conv`` of each member, with ``stacked`` set.

    Args:
      fn: a function of the parameters first. A kernel captured by closure instead cannot be found, and is reported.
        Trace the forward function, not its gradient.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``; leaves of other types are passed on as they are.
      *args, **kwargs: the function's other arguments. Arrays and ``ShapeDtypeStruct`` are traced (a batch of 1 will
        do), all else is passed on as it is. The convolutions are those of *these* shapes.
      on_unknown: what becomes of a kernel no ``Conv`` describes: masked, standardised or normalised weights, a kernel
        used with two geometries, padding that reflects. ``"error"``: a ValueError names each with the reason.
        ``"skip"``: its place in the result holds an :class:`Unknown` with the reason, which every function of this
        library passes over.
      dense: also report matrices, as the 0-dimensional convolution ``Conv(())``.

    Returns:
      A tree of the structure of ``params``; ``None`` where a parameter feeds no convolution.

    Raises:
      ValueError: no convolution was found; or, with ``on_unknown="error"``, one that cannot be described.

    Cost: one trace, and work proportional to the program's length.

    Limits: a convolution that *uses* padding by another operation is described alone. Flax's circular
    ``ConvTranspose``, which sums what overhangs after convolving, is described without that sum.

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
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = ["params" + jax.tree_util.keystr(path) for path, _ in leaves]
    leaves = [leaf for _, leaf in leaves]
    inputs, inputs_def = jax.tree.flatten((args, kwargs))
    every = [*leaves, *inputs]
    traced = [n for n, leaf in enumerate(every) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def flat(*arrays):
        filled = list(every)
        for n, array in zip(traced, arrays, strict=True):
            filled[n] = array
        args, kwargs = jax.tree.unflatten(inputs_def, filled[len(leaves) :])
        return fn(jax.tree.unflatten(treedef, filled[: len(leaves)]), *args, **kwargs)

    program = jax.make_jaxpr(flat)(*(every[n] for n in traced))
    sites = _Sites({n: tuple(leaf.shape) for n, leaf in enumerate(leaves) if hasattr(leaf, "shape")}, dense)
    values = [
        _Value(leaves=frozenset([n]), kernel=_Kernel(n, tuple(range(len(every[n].shape)))))
        if n < len(leaves)
        else _Value(from_input=True)
        for n in traced
    ]
    _walk(program, values, sites, sharded=False)
    found = {n: _decide(sites.of[n]) for n in sorted(sites.of)}
    unknown = [f"{names[n]} {sites.shapes[n]}: {node.reason}" for n, node in found.items() if isinstance(node, Unknown)]
    unknown += [f"a kernel that is no parameter: {reason}" for reason in dict.fromkeys(sites.homeless)]
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
    return jax.tree.unflatten(treedef, [found.get(n) for n in range(len(leaves))])


class _Kernel(NamedTuple):
    """A parameter, still whole or one member of a stack, its axes moved about."""

    leaf: int
    axes: tuple[int | None, ...]  # the parameter's axis behind each axis; None for an inserted axis of length 1
    gone: tuple[int, ...] = ()  # axes taken apart by scan or an index, or dropped because their length is 1
    flipped: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """What is known of one variable."""

    leaves: frozenset[int] = frozenset()  # parameters it was computed from
    ops: tuple[str, ...] = ()  # by what
    from_input: bool = False
    captured: bool = False  # computed from an array that fn captured by closure
    constant: Any = None  # its value, if it is a known scalar
    kernel: _Kernel | None = None
    # Which of the origin's pixels each pixel is; None: the value is the origin.
    origin: object = dataclasses.field(default_factory=object)
    pixels: tuple[Pixels | None, ...] | None = None


class _Sites:
    """Where parameters feed convolutions."""

    def __init__(self, shapes: dict[int, tuple[int, ...]], dense: bool):
        self.shapes, self.dense = shapes, dense
        self.of: dict[int, list[Conv | str]] = {}  # a Conv, or the reason why there is none
        self.homeless: list[str] = []
        self.muted = False

    def add(self, leaf: int, what: Conv | str) -> None:
        if not self.muted:
            self.of.setdefault(leaf, []).append(what)

    def add_homeless(self, reason: str) -> None:
        if not self.muted:
            self.homeless.append(reason)


def _decide(uses: list[Conv | str]) -> Conv | Unknown:
    for use in uses:
        if isinstance(use, str):
            return Unknown(use)
    different = list(dict.fromkeys(uses))
    if len(different) == 1:
        return different[0]  # type: ignore[return-value]
    listed = "; ".join(map(str, different))
    return Unknown(f"used with {len(different)} geometries (shared, or fn contains its own gradient?): {listed}")


def _walk(program: Any, values: Sequence[_Value], sites: _Sites, sharded: bool) -> list[_Value]:
    """Values of the outputs of a (closed or open) jaxpr, whose inputs have ``values``."""
    jaxpr = opened(program)
    known = {v: _Value(captured=True) for v in jaxpr.constvars} | dict(zip(jaxpr.invars, values, strict=True))
    read = lambda v: _Value(constant=v.val) if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        if eqn.primitive is p.conv_general_dilated_p:
            outs = [_convolution(eqn, ins, sites, sharded)]
        elif eqn.primitive is p.dot_general_p:
            outs = [_product(eqn, ins, sites)]
        elif is_identity(eqn):
            outs = [_cast(eqn, value, out.aval) for value, out in zip(ins, eqn.outvars)]
        elif inner := programs_inside(eqn):
            outs = _container(eqn, inner, ins, sites, sharded)
        else:
            outs = [
                _moved(eqn, ins) if len(eqn.outvars) == 1 else _computed(eqn.primitive.name, ins) for _ in eqn.outvars
            ]
        known.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _computed(name: str, ins: Sequence[_Value]) -> _Value:
    """The value of a result of which nothing is known but what it was computed from."""
    from_input = any(value.from_input for value in ins)
    ops = () if from_input else tuple(dict.fromkeys([*(op for value in ins for op in value.ops), name]))
    leaves = frozenset().union(*(value.leaves for value in ins))
    return _Value(leaves, ops, from_input, any(value.captured for value in ins))


def _cast(eqn: Any, value: _Value, aval: Any) -> _Value:
    if value.kernel and not jnp.issubdtype(aval.dtype, jnp.floating):
        return _computed(eqn.primitive.name, [value])
    return value


# Containers: equations that hold programs.


def _container(eqn: Any, inner: list[Any], ins: list[_Value], sites: _Sites, sharded: bool) -> list[_Value]:
    """Walks the programs inside an equation, each with the values of the operands that feed it."""
    if eqn.primitive is p.scan_p:
        consts, carry = scan_split(eqn, opened(inner[0]))
        inside = [_scanned(value, v, i) for value, v, i in zip(ins, eqn.invars, opened(inner[0]).invars, strict=True)]
        outs = _loop(inner[0], inside, slice(consts, consts + carry), sites, sharded)
        return [*outs[:carry], *(_computed("scan", [value]) for value in outs[carry:])]  # the rest are stacked
    if eqn.primitive is p.while_p:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body = eqn.params["body_jaxpr"]
        carried = ins[of_cond + of_body :]
        outs = _loop(body, ins[of_cond:], slice(of_body, None), sites, sharded)
        _walk(eqn.params["cond_jaxpr"], [*ins[:of_cond], *map(_join, carried, outs)], sites, sharded)
        return list(map(_join, carried, outs))  # the body may run no time at all
    if eqn.primitive is p.cond_p:
        branches = [_walk(branch, ins[1:], sites, sharded) for branch in inner]
        outs = branches[0]
        for branch in branches[1:]:
            outs = list(map(_join, outs, branch))
        return outs
    shapes = lambda variables: [getattr(v.aval, "shape", None) for v in variables]
    outs = None
    for program in inner:
        jaxpr = opened(program)
        if len(jaxpr.invars) != len(ins) or eqn.primitive.name == "pallas_call":
            for value in ins:
                if value.kernel and len(value.kernel.axes) > (1 if sites.dense else 2):
                    sites.add(value.kernel.leaf, f"it enters {eqn.primitive.name}, whose inside cannot be read")
            continue
        elsewhere = shapes(jaxpr.invars) != shapes(eqn.invars)  # shard_map: the shapes inside are one device's
        results = _walk(program, ins, sites, sharded or elsewhere)
        if outs is None and len(results) == len(eqn.outvars):
            outs = results
    return outs if outs is not None else [_computed(eqn.primitive.name, ins) for _ in eqn.outvars]


def _loop(body: Any, ins: list[_Value], carry: slice, sites: _Sites, sharded: bool) -> list[_Value]:
    """Walks a loop's body once its carry's values are those of any iteration, not of the first alone."""
    muted, sites.muted = sites.muted, True
    ins = list(ins)
    while True:
        outs = _walk(body, ins, sites, sharded)
        joined = list(map(_join, ins[carry], outs))
        grown = [_facts(before) != _facts(after) for before, after in zip(ins[carry], joined, strict=True)]
        ins[carry] = joined
        if not any(grown):
            break
    sites.muted = muted
    return _walk(body, ins, sites, sharded)


def _facts(value: _Value) -> tuple:
    return value.leaves, value.from_input, value.captured, value.kernel


def _join(one: _Value, other: _Value) -> _Value:
    """What holds of a variable that has either value."""
    if one is other or (one.kernel is not None and one.kernel == other.kernel):
        return one
    return _computed("a loop or a branch that changes it", [one, other])


def _scanned(value: _Value, outside: Any, inside: Any) -> _Value:
    """The value inside a scan's body: the same, or a slice along the leading axis."""
    if outside.aval.ndim == inside.aval.ndim:
        return value if value.kernel else dataclasses.replace(value, origin=object(), pixels=None)
    if value.kernel is None:
        return dataclasses.replace(value, origin=object(), pixels=None)
    first, *rest = value.kernel.axes
    return dataclasses.replace(value, kernel=value.kernel._replace(axes=tuple(rest), gone=_with(value.kernel, [first])))


def _with(kernel: _Kernel, axes: Sequence[int | None]) -> tuple[int, ...]:
    return (*kernel.gone, *(axis for axis in axes if axis is not None))


# Equations that move numbers about, and change none.


def _moved(eqn: Any, ins: list[_Value]) -> _Value:
    """The value of a result: still a parameter or an image if the equation only moves it, else computed."""
    value, computed = ins[0] if ins else _Value(), _computed(eqn.primitive.name, ins)
    if not ins or not hasattr(eqn.invars[0].aval, "shape"):
        return computed
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    labels = relabelled(eqn)
    kernel = pixels = None
    if value.kernel:
        kernel = _moved_kernel(eqn, value.kernel, labels, shape, out_shape)
    elif value.constant is None:
        one_image = len({id(value.origin) for value in ins}) == 1
        zeros = np.ndim(ins[-1].constant) == 0 and ins[-1].constant == 0
        pixels = moved_pixels(eqn, [value.pixels for value in ins], one_image, zeros)
    if kernel is None and pixels is None:
        return computed
    if kernel is not None:
        return dataclasses.replace(value, kernel=kernel)
    return dataclasses.replace(computed, origin=value.origin, pixels=pixels)


def _moved_kernel(eqn: Any, kernel: _Kernel, labels: Any, shape: tuple, out_shape: tuple) -> _Kernel | None:
    if labels is not None:
        axes = tuple(None if n is None else kernel.axes[n] for n in labels)
        dropped = [axis for n, axis in enumerate(kernel.axes) if n not in labels]
        return kernel._replace(axes=axes, gone=_with(kernel, dropped))
    if eqn.primitive is p.slice_p or eqn.primitive.name == "dynamic_slice":
        # One member of a stack; where the axis is not a stack's, the convolution's shape tells.
        return kernel if all(new in (1, old) for old, new in zip(shape, out_shape, strict=True)) else None
    if eqn.primitive is p.rev_p:
        flips = {kernel.axes[n] for n in eqn.params["dimensions"]} - {None}
        return kernel._replace(flipped=kernel.flipped ^ flips)
    return None


# Convolutions and products.


def _convolution(eqn: Any, ins: list[_Value], sites: _Sites, sharded: bool) -> _Value:
    (image, kernel), shape = ins, eqn.invars[1].aval.shape
    if kernel.kernel:
        leaf = kernel.kernel.leaf
        sites.add(leaf, _described(eqn, image, kernel.kernel, sites.shapes[leaf], sharded))
    elif kernel.from_input:
        sites.add_homeless(f"{shape}, computed from fn's input (or fn contains its own gradient: trace it without)")
    elif kernel.leaves:
        for leaf in kernel.leaves:
            sites.add(leaf, f"reaches the convolution through {', '.join(kernel.ops)} (masked, standardised, sliced?)")
    elif kernel.captured:
        sites.add_homeless(f"{shape}, captured by closure: pass it to fn inside params, unless it is a fixed filter")
    return _computed("conv_general_dilated", [image, kernel])


def _described(eqn: Any, image: _Value, kernel: _Kernel, shape: tuple, sharded: bool) -> Conv | str:
    """The ``Conv`` of a convolution, or why there is none."""
    numbers = eqn.params["dimension_numbers"]
    axes = [kernel.axes[n] for n in numbers.rhs_spec]
    operand = eqn.invars[1].aval.shape
    if sharded:
        return "its convolution is inside shard_map, whose shapes are one device's: trace the model without it"
    if None in axes:
        return f"an axis is inserted before the convolution takes it as {operand}: store it with all of its axes"
    if any(operand[n] != shape[axis] for n, axis in zip(numbers.rhs_spec, axes)):  # type: ignore[index]
        return f"the convolution takes a part of it, {operand}"
    stacked = len(kernel.gone)
    if sorted(kernel.gone) != list(range(stacked)):
        return f"stacked along axes {sorted(kernel.gone)}: only leading axes may be"
    flipped = [axis in kernel.flipped for axis in axes[2:]]
    pixels = image.pixels or all_pixels(eqn.invars[0].aval.shape)
    try:
        letters = dict(zip(axes, kernel_letters(eqn)))
        layout = "".join(letters[axis] for axis in range(stacked, len(shape)))
        return conv_of(eqn, pixels, layout, flipped, stacked)
    except ValueError as error:
        return str(error)


def _product(eqn: Any, ins: list[_Value], sites: _Sites) -> _Value:
    (contracted, batched) = eqn.params["dimension_numbers"]
    for me, (value, other) in enumerate(zip(ins, reversed(ins))):
        if value.kernel and (other.from_input or value.kernel.leaf not in other.leaves):
            shape, beside = sites.shapes[value.kernel.leaf], eqn.invars[1 - me].aval.shape
            free = [n for d, n in enumerate(beside) if d not in contracted[1 - me] and d not in batched[1 - me]]
            found = _matrix(value.kernel, contracted[me], batched[me], shape, free)
            if found and (sites.dense or (isinstance(found, Conv) and found.input_shape)):
                sites.add(value.kernel.leaf, found)
    return _computed("dot_general", ins)


def _matrix(kernel: _Kernel, contracted: Any, batched: Any, shape: tuple, free: list[int]) -> Conv | str | None:
    """A parameter in a matrix product: a 1 x 1 convolution if axes of length 1 went, else a dense layer."""
    if len(kernel.axes) < 2:
        return None
    stack = [axis for axis in kernel.gone if shape[axis] != 1] + [kernel.axes[n] for n in batched]
    spatial = [axis for axis in kernel.gone if shape[axis] == 1]
    ins = [kernel.axes[n] for n in contracted]
    outs = [axis for n, axis in enumerate(kernel.axes) if n not in contracted and n not in batched]
    if None in [*stack, *ins, *outs] or len(ins) != 1 or len(outs) != 1 or len(spatial) > 3:
        return "multiplies along several of its axes: it is no matrix"
    if sorted(stack) != list(range(len(stack))):  # type: ignore[type-var]
        return f"stacked along axes {stack}: only leading axes may be"
    letters = {ins[0]: "I", outs[0]: "O"} | dict(zip(sorted(spatial), SPATIAL_LETTERS[len(spatial)]))
    rank = len(spatial)
    # The free axes of the image: batch and space, if there are as many.
    input_shape = free[-rank:] if rank and len(free) in (rank, rank + 1) else [1] * rank
    layout = "".join(letters[axis] for axis in range(len(stack), len(shape)))
    return Conv(tuple(input_shape), padding=((0, 0),) * rank, kernel_layout=layout, stacked=len(stack))
