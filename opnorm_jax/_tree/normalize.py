"""Certified spectral normalisation: a function whose kernels are rescaled into the ball before they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opnorm_jax._conv import Conv, along_outputs, compute_dtype
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._kernel.bounds import operator_norm_bounds
from opnorm_jax._kernel.constrain import rescale_operator_norm
from opnorm_jax._program.find_convs import check_search, find_convs, find_layer
from opnorm_jax._tree.alike import map_kernels
from opnorm_jax._tree.layers import check_convs, check_max_norms


def normalize(
    fn: Callable[..., Any],
    max_norm: Any = 1.0,
    *,
    dense: bool = False,
    on_unknown: str = "error",
    scales: Callable[..., Any] | None = None,
    execution: Execution = Execution(),
) -> Callable[..., Any]:
    """Makes a function of the same arguments in which every kernel is first rescaled into the operator-norm ball.

    This is spectral normalisation with the norm of the layer itself, not that of the flattened kernel, and without
    power iterations or state. Each kernel is multiplied by min(1, max_norm / its certified norm), so the layer's norm
    is at most ``max_norm`` in every call (besides the rounding to a narrow dtype), also in the first; gradients go
    through the norm. Kernels inside the ball are used as they are.

    The convolutions are found by :func:`find_convs`, once for each set of argument shapes: as for ``jit``, ``fn`` must
    be pure. Each matrix of a dense layer is a layer by itself, whatever computed its input. The parameters keep their
    values and their tree; only ``fn`` sees other kernels. To export a network, call :func:`constrain` on the
    parameters: ``fn`` itself then computes the same.

    Args:
      fn: a function of the parameters first, of any framework, such as ``model.apply``.
      max_norm: a positive number, which may be traced, or a tree of them that is a prefix of the parameters' (``None``
        leaves the kernels of a subtree as they are).
      dense: normalise dense layers too.
      on_unknown: as in :func:`find_convs`. ``"skip"`` leaves kernels that no ``Conv`` describes as they are.
      scales: folds what follows a layer into its norm, such as batch normalisation on running statistics. A function
        of the arguments of ``fn``, which returns a tree like the parameters, or a prefix of it: the factor of each
        output channel at a kernel, shape ``(out_channels,)`` after any stacked axes, and None elsewhere. Then the norm
        of the kernel times these factors is at most ``max_norm``; the kernel alone is multiplied.
      execution: how to compute; see :class:`Execution`.

    Returns:
      A function, to be used under ``jit``, ``grad``, ``vmap``, ``scan`` and ``checkpoint`` as ``fn`` is.

    Raises:
      ValueError, TypeError: here for the arguments; in a call as :func:`find_convs`, or where a scale does not fit.

    Cost: the norm of each kernel in each call, and its derivative where one is taken: see
    :func:`rescale_operator_norm`. Layers of equal shape and geometry share one call. The walk over the program takes
    time once for each set of shapes, not in compiled calls.

    Differentiable: as :func:`rescale_operator_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, opnorm_jax as oj
      >>> def net(params, x):
      ...     return jax.lax.conv_general_dilated(
      ...         x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      >>> params, x = {"kernel": jnp.ones((3, 3, 1, 1))}, jnp.ones((1, 8, 8, 1))
      >>> bool(jnp.linalg.norm(oj.normalize(net)(params, x)) <= jnp.linalg.norm(x))
      True

    References:
      Miyato, Kataoka, Koyama and Yoshida, `Spectral Normalization for Generative Adversarial Networks
      <https://arxiv.org/abs/1802.05957>`_, 2018.
    """
    check_search(fn, on_unknown)
    check_max_norms(max_norm)
    check_execution(execution)
    if scales is not None and not callable(scales):
        raise TypeError(f"expected scales to be a function of fn's arguments, or None, got {type(scales).__name__}.")

    find = functools.partial(find_convs, fn, dense=dense, on_unknown=on_unknown)
    return _normalized(fn, max_norm, find, scales, execution)


def normalize_layer(fn: Callable[..., Any], max_norm: Any, execution: Execution) -> Callable[..., Any]:
    """Does what :func:`normalize` does for a function that is a single layer, whose own norm is then the bound."""
    return _normalized(fn, max_norm, functools.partial(find_layer, fn), None, execution)


def _normalized(fn: Callable[..., Any], max_norm: Any, find: Callable[..., Any], scales: Any, execution: Execution):
    @functools.lru_cache(maxsize=64)
    def described(treedef: Any, leaves: tuple[Any, ...]) -> Any:
        params, args, kwargs = jax.tree.unflatten(treedef, leaves)
        return find(params, *args, **kwargs)

    def normalized(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((params, args, kwargs))
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves)
        convs = (described if _is_hashable((treedef, shapes)) else described.__wrapped__)(treedef, shapes)
        factors = scales(params, *args, **kwargs) if scales else None
        return fn(rescaled(params, max_norm, convs, execution, factors), *args, **kwargs)

    return functools.update_wrapper(normalized, fn, updated=())


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def rescaled(params: Any, max_norm: Any, convs: Any, execution: Execution, scales: Any = None) -> Any:
    """Rescales the kernels of a tree into the ball, differentiably."""

    def one(conv: Conv, kernel: jax.Array, bound: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        if scale is None:
            return rescale_operator_norm(kernel, conv, bound, execution=execution)
        wide = kernel.astype(jnp.promote_types(compute_dtype(kernel.dtype), scale.dtype))
        scaled = wide * along_outputs(scale.astype(wide.dtype), conv)
        bound = bound.astype(wide.dtype)
        upper = operator_norm_bounds(scaled, conv, execution=execution).upper
        return (wide * (bound / jnp.maximum(bound, upper))).astype(kernel.dtype)

    return map_kernels(one, params, check_convs(convs), max_norm=max_norm, scales=scales)
