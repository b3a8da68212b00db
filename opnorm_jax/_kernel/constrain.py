"""Three ways to bring a kernel's operator norm down: the paper's clip, the nearest projection, and rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opnorm_jax._conv import (
    Conv,
    as_conv,
    canonical_shape,
    check_max_norm,
)
from opnorm_jax._execution import Execution, check_execution
from opnorm_jax._geometry import Geometry, resolve
from opnorm_jax._kernel.clip import clip, fit
from opnorm_jax._kernel.compiled import compiled, place
from opnorm_jax._kernel.inside import norm_unless_inside
from opnorm_jax._kernel.nearest import ProjectionInfo, nearest
from opnorm_jax._kernel.norm import circular_norm
from opnorm_jax._kernel.prepare import prepare, restore
from opnorm_jax._rounding import inside_tolerance


class Options(NamedTuple):
    """Static options of a constraint."""

    tolerance: float = 1e-3  # of a projection
    max_iterations: int = 200  # of a projection
    norm_wanted: bool = False  # whether ``Constrained.norm`` must be the norm for kernels inside too
    execution: Execution = Execution()


DEFAULTS = Options()


class Constrained(NamedTuple):
    """A kernel after a constraint, and what was found on the way."""

    kernel: jax.Array
    norm: jax.Array  # shape=(): its norm before, on the circulant embedding; 0 if it is inside and that is not wanted
    changed: jax.Array  # shape=(), bool: False if the kernel was inside and came back as it was
    info: ProjectionInfo | None  # of a projection


def rescale_operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    execution: Execution = Execution(),
) -> Float[Array, ...]:
    """Computes kernel * min(1, max_norm / upper bound): the cheapest way inside the ball, and a certified one.

    The upper bound is :func:`operator_norm_bounds`'s, so the norm of the layer really used, padding and strides
    included, is at most ``max_norm``, besides the final rounding to the kernel's dtype. A kernel inside already (its
    norm on the circulant embedding is at most ``max_norm``, to 32 eps) comes back bit for bit.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      max_norm: positive; may be traced.
      execution: how to compute; see :class:`Execution`.

    Returns:
      A kernel of the same shape and dtype. NaN throughout if ``kernel`` holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or ``max_norm`` is not a positive scalar.

    Cost: one upper bound; inside the ball, a certificate that takes only Cholesky factorisations is tried before. For
    3x3 kernels it looks at 25 points, which are enough if the norm is under two thirds of ``max_norm``, then at 81
    (0.88) and 324 (0.97), and last at the layer's own frequencies. A kernel outside leaves each of these at the first
    points that fail. (On accelerators and meshes: at 25 points alone.)

    Differentiable: twice, as :func:`operator_norm`, in the kernel and in ``max_norm``; at the boundary the
    derivative is that of the inside.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = oj.rescale_operator_norm(jnp.ones((3, 3, 1, 1)), (8, 8), 1.0)
      >>> bool(abs(oj.operator_norm(kernel, (8, 8)) - 1) < 1e-5)
      True
    """
    return constrained("rescale", kernel, conv, max_norm, Options(execution=execution)).kernel


def clip_operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    execution: Execution = Execution(),
) -> Float[Array, ...]:
    r"""Applies the paper's clip (Appendix A) once. It does **not** bring the norm under ``max_norm``.

    Every singular value of every frequency's block is cut at ``max_norm``, and of the resulting convolution only the
    kernel's own taps are kept. Keeping them moves the values again: the result's norm is typically 1.2 to 1.4 times
    ``max_norm``. For a bound that holds use :func:`project_operator_norm` (nearest) or :func:`rescale_operator_norm`.

    For zero padding the blocks are those of the circulant embedding (see :func:`operator_norm_bounds`).

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      max_norm: positive; may be traced.
      execution: how to compute; see :class:`Execution`. ``"products"`` costs some 50 to 100 products a block.

    Returns:
      A kernel of the same shape and dtype; one whose norm is at most ``max_norm`` (to 32 eps) comes back bit for bit.
      NaN throughout if ``kernel`` holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or ``max_norm`` is not a positive scalar.

    Cost: for half of the frequencies a Gram matrix on the smaller channel side; on a CPU, its Cholesky factorisation,
    and its eigendecomposition where that finds a value above ``max_norm``. First the certificate is tried that is
    described under :func:`rescale_operator_norm`.

    Differentiable: once, both modes, in the kernel and in ``max_norm`` (divided differences: finite at ties). A second
    derivative raises ``NotImplementedError``.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = jnp.ones((3, 3, 1, 1))
      >>> bool((oj.clip_operator_norm(kernel, (8, 8), 9.0) == kernel).all())
      True

    References:
      Sedghi, Gupta and Long, `The Singular Values of Convolutional Layers <https://arxiv.org/abs/1805.10408>`_, 2019.
    """
    return constrained("clip", kernel, conv, max_norm, Options(execution=execution)).kernel


def project_operator_norm(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    execution: Execution = Execution(),
) -> Float[Array, ...]:
    r"""Computes the nearest kernel (Frobenius distance) whose operator norm is at most ``max_norm``.

    The norm is that on the circulant embedding of :func:`operator_norm_bounds`, so the bound holds for the layer really
    used. Solves

    .. math:: \min_{K'} \tfrac12 \|K' - K\|^2 \quad\text{subject to}\quad \|F_{K'}(\omega)\| \le max\_norm
        \text{ at every frequency}

    by an augmented Lagrangian with semismooth Newton steps. Every iterate is scaled into the ball, and its distance,
    against the value of the dual problem, gives a certificate of how far from nearest it can be. The nearest of them is
    returned, so the bound holds also when the iterations run out.

    Args:
      kernel: any real floating dtype, in ``conv.kernel_layout``; computed in float32, or float64 if it is float64.
      conv: the convolution, or the input's spatial shape in pixels (circular).
      max_norm: positive; may be traced.
      tolerance: the iterations stop once distance <= (1 + tolerance) * (a lower bound on every such kernel's distance),
        or once the difference of the two is no more than rounding can make it (1e-5 \|kernel\| in float32, or a few
        times that). :func:`project_operator_norm_info` says which.
      max_iterations: the iterations stop after this many at the latest.
      execution: how to compute; see :class:`Execution`. Besides its chunks, some five copies of the blocks of half the
        grid are held in memory. With factorization ``"products"`` the method is accelerated proximal gradient on the
        dual problem. It takes some ten times as many iterations, a multiple of 10.

    Returns:
      A kernel of the same shape and dtype; one inside already (to 32 eps) comes back bit for bit.
      NaN throughout if ``kernel`` holds a NaN or an infinity.

    Raises:
      ValueError, TypeError: the kernel does not fit ``conv``, or an option is not a positive number.

    Cost: an iteration costs at most one :func:`clip_operator_norm` and matrix products. There are 10 to 20 from far
    outside, and some 5 after a small change of a projected kernel. Inside the ball the cost is that of the certificate.

    Differentiable: no; a derivative raises ``NotImplementedError``. Inside a differentiated function use
    :func:`rescale_operator_norm`, or the norm as a penalty.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> kernel = oj.project_operator_norm(jnp.ones((3, 3, 1, 1)), oj.Conv((8, 8), padding="SAME"), 1.0)
      >>> bool(oj.operator_norm_bounds(kernel, oj.Conv((8, 8), padding="SAME")).upper <= 1 + 1e-5)
      True

    References:
      Zhao, Sun and Toh, A Newton-CG augmented Lagrangian method for semidefinite programming, 2010.
      Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009.
    """
    options = _checked_options(tolerance, max_iterations, False, execution)
    return constrained("project", kernel, conv, max_norm, options).kernel


def project_operator_norm_info(
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    execution: Execution = Execution(),
) -> tuple[Float[Array, ...], ProjectionInfo]:
    """Computes what :func:`project_operator_norm` does, and its certificate.

    Args, Raises, Cost: as there.

    Returns:
      The kernel and a :class:`ProjectionInfo`: the distance moved; the gap (any kernel inside the ball is nearer by at
      most this); the floor (a gap below it is attributed to rounding and ends the iterations, whatever the tolerance);
      the number of iterations; and the norm before.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> _, info = oj.project_operator_norm_info(jnp.ones((3, 3, 1, 1)), (8, 8), 1.0)
      >>> bool(info.gap <= 1e-3 * info.distance)
      True
    """
    options = _checked_options(tolerance, max_iterations, True, execution)
    out = constrained("project", kernel, conv, max_norm, options)
    assert out.info is not None  # the constraint is "project"
    return out.kernel, out.info


def _checked_options(tolerance: float, max_iterations: int, norm_wanted: bool, execution: Execution) -> Options:
    for name, value, kind, kinds in (
        ("tolerance", tolerance, "a number", (int, float, np.integer, np.floating)),
        ("max_iterations", max_iterations, "an int", (int, np.integer)),
    ):
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"expected {name} to be {kind}, static under jit, got {value!r}.")
        if not value > 0:
            raise ValueError(f"expected {name} to be positive, got {value}.")
    return Options(float(tolerance), int(max_iterations), norm_wanted, execution)


def constrained(
    constraint: str,
    kernel: Float[Array, ...],
    conv: Conv | Sequence[int],
    max_norm: float | Float[Array, ""],
    options: Options = DEFAULTS,
) -> Constrained:
    """Applies one of the three constraints by name, and returns what was found on the way."""
    conv = as_conv(conv)
    check_execution(options.execution)
    check_max_norm(max_norm)
    geometry = resolve(conv, canonical_shape(kernel, conv))
    kernel = jnp.asarray(kernel)
    out = _constrained(kernel, jnp.asarray(max_norm), constraint, geometry, options)
    return out._replace(kernel=place(out.kernel, kernel))


@compiled(2)
def _constrained(kernel, max_norm, constraint, geometry: Geometry, options: Options):
    small, scale = prepare(kernel, geometry)
    plan, execution = geometry.plan, options.execution
    unit = scale * geometry.gain  # a norm on the circulant embedding, times this, bounds the layer's
    bound = max_norm.astype(small.dtype) / unit
    info = None
    if constraint == "clip":
        correction, norm = clip(small, bound, plan, execution)
        moved = small + correction
    elif constraint == "project":
        limits = options.tolerance, options.max_iterations
        moved, info = nearest(small, bound, plan, limits, execution)
        norm = info.norm
        if options.norm_wanted:  # the projection of a kernel inside needs none
            norm = lax.cond(norm == 0, lambda kernel: circular_norm(kernel, plan, execution), lambda _: norm, small)
    else:
        norm = (
            circular_norm(small, plan, execution)
            if options.norm_wanted
            else norm_unless_inside(small, bound, plan, execution)
        )
        moved = fit(small, norm, bound)
    # NaN compares false, so that a NaN kernel takes the changed branch and comes out NaN throughout.
    changed = ~(norm <= bound * (1 + inside_tolerance(small.dtype)))
    finite = jnp.isfinite(norm)
    result = restore(scale * jnp.where(finite, moved, jnp.nan), kernel, geometry)
    result = jnp.where(changed, result, kernel)
    if info is not None:
        scaled = lambda value: scale * jnp.where(changed, value, 0)
        distance, gap = scaled(info.distance), scaled(info.gap)
        info = ProjectionInfo(distance, gap, scale * info.floor, info.iterations, unit * norm)
    if constraint == "clip" and options.norm_wanted:
        norm = circular_norm(small, plan, execution)
    return Constrained(result, unit * norm, changed, info)
