"""The static description of a convolution, and every check of what a user passes in."""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

Name = Literal["CAUSAL", "CIRCULAR", "EDGE", "REFLECT", "SAME", "VALID"]
Padding = Name | tuple[tuple[int, int] | Name, ...]

SPATIAL_LETTERS = ("", "W", "HW", "DHW")
"""By dimension; a dense layer is a convolution of dimension 0."""

_PADDING_NAMES = get_args(Name)


@dataclasses.dataclass(frozen=True, init=False)
class Conv:
    r"""One convolution, described by everything about it but its kernel.

    Argument names and meanings are those of ``flax.linen.Conv``. The object is frozen, hashable and a leaf of any
    pytree, so a tree of them mirrors a tree of parameters and may be closed over by ``jit``.

    Args:
      input_shape: *spatial* shape of the layer's input, in pixels; its length fixes the dimension (1, 2 or 3). The
        empty shape stands for a dense layer, whose kernel is a matrix (layout ``"IO"``, or ``"OI"``).
      strides: an int, or one int per spatial axis.
      padding: ``"SAME"`` (the default), ``"VALID"``, ``"CIRCULAR"``, ``"CAUSAL"`` (in 1-D), ``"REFLECT"``, ``"EDGE"``
        (also called replicate), an int, or one entry per axis: an int, a ``(low, high)`` pair, or one of those names.
        ``("SAME", "CIRCULAR")`` suits a map that is periodic in longitude. ``"CIRCULAR"``, ``"REFLECT"`` and ``"EDGE"``
        add as many pixels as the taps reach, half of them on either side, as Flax does.
      input_dilation: zeros inserted between input pixels, plus one; above 1 it is a transposed convolution, which
        needs ``"CIRCULAR"`` or explicit padding (as in ``jax.lax``).
      kernel_dilation: spacing of the kernel's taps.
      feature_group_count: number of groups the channels are split into.
      kernel_layout: a permutation of the spatial letters (``W``, ``HW`` or ``DHW``) and ``I``, ``O``.
        Flax and Haiku: ``"HWIO"`` (the default; ``"WIO"`` in 1-D, ``"DHWIO"`` in 3-D). PyTorch, Equinox: ``"OIHW"``.
      stacked: along how many leading axes a parameter holds such kernels, for ``jax.lax.scan`` say; or a tuple of the
        axes, where they are others. ``kernel_layout`` names the axes of one kernel, those that are left. For the
        functions of whole trees; those of a kernel take one member, under ``jax.vmap``.

    Raises:
      TypeError: an argument is not made of ints (or is not one of the strings).
      ValueError: a value out of range, a length that does not match ``input_shape``, an unknown padding or layout.

    Examples:
      >>> import opnorm_jax as oj
      >>> oj.Conv((32, 32), strides=2).strides
      (2, 2)
      >>> oj.Conv((32, 32)) == oj.Conv((32, 32), kernel_layout="HWIO", padding="SAME")
      True
    """

    input_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    feature_group_count: int
    kernel_layout: str
    stacked: int | tuple[int, ...]

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str | int | Sequence[int | str | tuple[int, int]] = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        kernel_layout: str | None = None,
        stacked: int | Sequence[int] = 0,
    ):
        shape = _input_shape(input_shape)
        rank = len(shape)
        input_dilation = per_axis(input_dilation, rank, "input_dilation")
        resolved = _padding(padding, rank)
        entries = (resolved,) * rank if isinstance(resolved, str) else resolved
        named = [isinstance(entry, str) and entry != "CIRCULAR" for entry in entries]
        if any(name and dilation > 1 for name, dilation in zip(named, input_dilation)):
            raise ValueError(
                f"expected padding 'CIRCULAR' or explicit (low, high) pairs with {input_dilation=}, got {padding=}: "
                "the other strings mean different things to lax.conv_general_dilated and to a transposed layer. Give "
                "the pairs really used (find_convs reads them from the network; jax.lax.conv_transpose documents "
                "them), or 'CIRCULAR'."
            )
        set_ = lambda name, value: object.__setattr__(self, name, value)  # the class is frozen
        set_("input_shape", shape)
        set_("strides", per_axis(strides, rank, "strides"))
        set_("padding", resolved)
        set_("input_dilation", input_dilation)
        set_("kernel_dilation", per_axis(kernel_dilation, rank, "kernel_dilation"))
        set_("feature_group_count", _positive_int(feature_group_count, "feature_group_count"))
        set_("kernel_layout", layout(kernel_layout, rank))
        set_("stacked", _stacked(stacked, rank + 2))

    def __repr__(self) -> str:
        """Returns the call that makes this object, without the arguments that have their defaults."""
        plain = Conv(self.input_shape)
        names = [field.name for field in dataclasses.fields(self)[1:]]
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != getattr(plain, name)]
        return f"Conv({', '.join([repr(self.input_shape), *given])})"


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Marks a kernel that no :class:`Conv` describes, in a tree of them. Functions of whole trees skip it."""

    reason: str


def as_conv(conv: Conv | Sequence[int]) -> Conv:
    """Returns a ``Conv`` itself, or the paper's circular convolution that a bare tuple of ints stands for."""
    if isinstance(conv, Conv):
        return conv
    if isinstance(conv, (tuple, list)):
        return Conv(conv, padding="CIRCULAR")
    raise TypeError(
        f"expected an opnorm_jax.Conv or a tuple of ints (the input's spatial shape), got {conv!r}. "
        "Write opnorm_jax.Conv((height, width), ...)."
    )


def canonical_kernel(kernel: Float[Array, ...], conv: Conv) -> Float[Array, "*taps i o"]:
    """Checks a kernel against its convolution; returns it spatial-axes-first (HWIO) in the computing dtype.

    The computing dtype is float32, or float64 for a float64 kernel.
    """
    check_kernel(kernel, conv)
    kernel = jnp.asarray(kernel)
    return kernel.transpose(_canonical_order(conv)).astype(compute_dtype(kernel.dtype))


def canonical_shape(kernel: Any, conv: Conv) -> tuple[int, ...]:
    """Returns the kernel's shape, spatial axes first, after the same checks."""
    check_kernel(kernel, conv)
    return tuple(kernel.shape[axis] for axis in _canonical_order(conv))


def restore_kernel(canonical: Float[Array, "*taps i o"], conv: Conv, dtype: Any) -> Float[Array, ...]:
    """Undoes :func:`canonical_kernel`."""
    letters = _canonical_layout(len(conv.input_shape))
    return canonical.transpose([letters.index(letter) for letter in conv.kernel_layout]).astype(dtype)


def stacked_axes(conv: Conv) -> tuple[int, ...]:
    """Returns the axes along which a parameter holds many kernels."""
    return tuple(range(conv.stacked)) if isinstance(conv.stacked, int) else conv.stacked


def stacked_first(array: Any, conv: Conv) -> Any:
    """Moves the axes along which a parameter holds many kernels to the front."""
    return array if isinstance(conv.stacked, int) else array.transpose(_stacked_order(conv))


def stacked_back(array: Any, conv: Conv) -> Any:
    """Undoes :func:`stacked_first`."""
    if isinstance(conv.stacked, int):
        return array
    order = _stacked_order(conv)
    return array.transpose([order.index(axis) for axis in range(len(order))])


def member_shape(shape: Sequence[int], conv: Conv) -> tuple[int, ...]:
    """Returns the shape of one kernel of a parameter's."""
    axes = stacked_axes(conv)
    return tuple(length for axis, length in enumerate(shape) if axis not in axes)


def _stacked_order(conv: Conv) -> list[int]:
    axes = stacked_axes(conv)
    return [*axes, *(axis for axis in range(len(axes) + len(conv.kernel_layout)) if axis not in axes)]


def along_outputs(factor: Any, conv: Conv) -> Any:
    """Reshapes factors of output channels, behind any stacked axes, so that they can be multiplied by a parameter."""
    one = [-1 if letter == "O" else 1 for letter in conv.kernel_layout]
    return stacked_back(factor.reshape(*factor.shape[:-1], *one), conv)


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for everything narrower."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def check_kernel(kernel: Any, conv: Conv) -> None:
    """Raises an error that says what is wrong with a kernel (an array or a ``ShapeDtypeStruct``)."""
    rank, kernel_layout, groups = len(conv.input_shape), conv.kernel_layout, conv.feature_group_count
    if not hasattr(kernel, "shape") or not hasattr(kernel, "dtype") or isinstance(kernel, type):
        raise TypeError(
            f"expected kernel to be an array of {rank + 2} axes ({kernel_layout}), got {type(kernel).__name__}. "
            "Pass the parameter itself, e.g. params['Conv_0']['kernel']."
        )
    _check_dtype(kernel.dtype)
    if len(kernel.shape) != rank + 2:
        raise ValueError(
            f"expected a kernel of {rank + 2} axes ({kernel_layout}) for an input of {rank} spatial axes, got "
            f"{kernel.shape=}. For stacked kernels use jax.vmap; for another dimension give input_shape its length."
        )
    if 0 in kernel.shape:
        raise ValueError(f"expected every axis of the kernel to be at least 1, got {kernel.shape=}.")
    out = kernel.shape[kernel_layout.index("O")]
    if out % groups:
        raise ValueError(
            f"expected the output channels to be a multiple of feature_group_count={groups}, got {out} of them "
            f"({kernel.shape=}, kernel_layout={kernel_layout!r}). Check the layout: PyTorch and Equinox use 'OIHW'."
        )


def _check_dtype(dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"expected a kernel of a real floating dtype, got {dtype}. A complex kernel has the singular values, each "
            "twice, of the real kernel [[Re, Im], [-Im, Re]] with twice the channels: jnp.block([[kernel.real, "
            "kernel.imag], [-kernel.imag, kernel.real]]) for layout HWIO. Do not drop the imaginary part."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"expected a kernel of a real floating dtype, got {dtype}. Pass the values that the layer really uses: for "
            "a quantised kernel, its integers times their scale, in a floating dtype."
        )


def check_floating(array: Any, name: str) -> None:
    """Raises a ``TypeError`` unless the argument is an array of a real floating dtype."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"expected {name} to be an array, got {type(array).__name__}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"expected {name} to have a real floating dtype, got {array.dtype}.")


def check_scalar(value: Any, name: str) -> None:
    """Raises an error unless the argument is one number, which may be traced."""
    if isinstance(value, (bool, str)) or not (
        isinstance(value, (int, float)) or hasattr(value, "__jax_array__") or _is_real(getattr(value, "dtype", None))
    ):
        raise TypeError(f"expected {name} to be a positive number, got {value!r} ({type(value).__name__}).")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"expected {name} to be a number that a float can hold, got one of {len(str(value))} digits.")
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"expected {name} to be a scalar, got shape {shape}. Use jax.vmap for one bound per kernel.")


def _is_real(dtype: Any) -> bool:
    return dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def check_max_norm(max_norm: Any) -> Any:
    """Returns a bound that is a positive number, checked where its value is known (a traced one cannot be)."""
    check_scalar(max_norm, "max_norm")
    if not isinstance(max_norm, jax.core.Tracer) and not float(max_norm) > 0:
        raise ValueError(f"expected max_norm to be positive, got {float(max_norm)}. Use float('inf') for no bound.")
    return max_norm


def per_axis(value: int | Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    """Returns a positive int for each spatial axis."""
    if isinstance(value, (tuple, list)):
        if len(value) != rank:
            raise ValueError(f"expected {name} to be an int or {rank} of them, one per spatial axis, got {value!r}.")
        return tuple(_positive_int(v, name) for v in value)
    return (_positive_int(value, name),) * rank


def layout(kernel_layout: str | None, rank: int) -> str:
    """Returns the kernel's layout in capitals, checked; ``None`` is Flax's."""
    canonical = _canonical_layout(rank)
    if kernel_layout is None:
        return canonical
    if not isinstance(kernel_layout, str):
        raise TypeError(f"expected kernel_layout to be a string such as {canonical!r}, got {kernel_layout!r}.")
    if sorted(kernel_layout) != sorted(canonical):
        raise ValueError(
            f"expected kernel_layout to be a permutation of {canonical!r} for {rank} spatial axes, got "
            f"{kernel_layout!r}. Flax and Haiku: {canonical!r}; PyTorch and Equinox: "
            f"{'OI' + SPATIAL_LETTERS[rank]!r}."
        )
    return kernel_layout


def _canonical_layout(rank: int) -> str:
    return SPATIAL_LETTERS[rank] + "IO"


def _canonical_order(conv: Conv) -> list[int]:
    return [conv.kernel_layout.index(letter) for letter in _canonical_layout(len(conv.input_shape))]


def _int(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"expected {name} to be made of ints, got {value!r}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} to be made of ints, got {value!r} ({type(value).__name__}).") from None


def _stacked(stacked: Any, rank: int) -> int | tuple[int, ...]:
    """Returns how many leading axes count kernels of so many axes each; or which axes, in order, if they are others."""
    if not isinstance(stacked, (tuple, list)):
        if (number := _int(stacked, "stacked")) < 0:
            raise ValueError(f"expected stacked to be 0 or more, got {number}.")
        return number
    rank += len(stacked)
    given = [_int(axis, "stacked") for axis in stacked]
    axes = sorted(axis + rank if axis < 0 else axis for axis in given)
    if len(set(axes)) < len(axes) or (axes and not 0 <= axes[0] <= axes[-1] < rank):
        raise ValueError(f"expected stacked to hold different axes of a parameter with {rank} axes, got {stacked!r}.")
    return len(axes) if axes == list(range(len(axes))) else tuple(axes)


def _positive_int(value: Any, name: str) -> int:
    number = _int(value, name)
    if number < 1:
        raise ValueError(f"expected {name} to be at least 1, got {number}.")
    return number


def _input_shape(input_shape: Any) -> tuple[int, ...]:
    if not isinstance(input_shape, (tuple, list)):
        raise TypeError(
            f"expected input_shape to be a tuple of ints, the input's spatial shape such as (32, 32), got "
            f"{input_shape!r}."
        )
    if len(input_shape) >= len(SPATIAL_LETTERS):
        raise ValueError(
            f"expected input_shape to have at most 3 axes (spatial ones only: no batch, no channels), got "
            f"{tuple(input_shape)}."
        )
    return tuple(_positive_int(n, "input_shape") for n in input_shape)


def _padding(padding: Any, rank: int) -> Padding:
    if rank == 0:
        return "CIRCULAR"  # nothing to pad: one name for it
    if isinstance(padding, str):
        if padding == "CAUSAL" and rank > 1:
            raise ValueError(
                "expected padding 'CAUSAL' with one spatial axis, in which time runs, got "
                f"{rank}. Give one entry per axis: ('CAUSAL', 'SAME'), say."
            )
        return _padding_name(padding)
    if not isinstance(padding, (tuple, list)):
        pad = _int(padding, "padding")
        return ((pad, pad),) * rank
    if len(padding) != rank:
        raise ValueError(
            f"expected padding to hold one int or one (low, high) pair per spatial axis ({rank}), got {padding!r}."
        )
    entries = []
    for pad in padding:
        if isinstance(pad, (tuple, list)):
            if len(pad) != 2:
                raise ValueError(f"expected padding to hold (low, high) pairs, got {pad!r} in {padding!r}.")
            entries.append((_int(pad[0], "padding"), _int(pad[1], "padding")))
        else:
            entries.append(_padding_name(pad) if isinstance(pad, str) else (_int(pad, "padding"),) * 2)
    alike = len(set(entries)) == 1 and isinstance(entries[0], str) and (rank == 1 or entries[0] != "CAUSAL")
    return entries[0] if alike else tuple(entries)  # type: ignore[return-value]


def _padding_name(padding: str) -> Name:
    if padding not in _PADDING_NAMES:
        raise ValueError(
            f"expected padding to be one of {_PADDING_NAMES} or explicit (low, high) pairs, got {padding!r}."
        )
    return padding  # type: ignore[return-value]
