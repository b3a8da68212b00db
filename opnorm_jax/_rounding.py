"""Every allowance for rounding errors, in one place, each with its reason. Certificates rest on these numbers.

All but :func:`product_rounding` are relative, and eps is that of the computing dtype (float32 or float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def eps(dtype: Any) -> float:
    """Returns the distance from 1 to the next larger number of a computing dtype."""
    return float(np.finfo(dtype).eps)


def tiny(dtype: Any) -> float:
    """Returns the smallest normal number of a computing dtype."""
    return float(np.finfo(dtype).tiny)


def rounding(kernel_shape: Sequence[int], dtype: Any) -> float:
    r"""Returns the error allowed for in a computed norm that is to be a bound.

    The symbol is a sum of ``taps`` products, and the factorisation of an r x r matrix is backward stable. The
    first-order worst cases are about taps and r units of rounding; what is seen is their square roots.
    """
    *taps, i, o = kernel_shape
    return eps(dtype) * (16 + math.prod(taps) ** 0.5 + 4 * min(i, o) ** 0.5)


def product_rounding(kernel: np.ndarray) -> float:
    """Returns by how much a layer's norm may differ because its kernel was multiplied by factors of its channels.

    Factor and product are each rounded by half an eps, or by less than the smallest normal number. A layer's norm is at
    most the sum of its taps' Frobenius norms. Unlike the others this allowance is absolute.
    """
    taps = np.sqrt(np.sum(kernel.astype(np.float64) ** 2, axis=(-2, -1)))
    return eps(kernel.dtype) * (1 + 1e-6) * float(np.sum(taps)) + tiny(kernel.dtype) * kernel.size


def dense_rounding(side: int, terms: int, dtype: Any) -> float:
    """Returns the error allowed for in a bound from the Cholesky factorisation of a layer's own Gram matrix.

    An entry is a sum of at most ``terms`` products of weights, one for each entry of the kernel. As in
    :func:`rounding`, the worst cases are about ``terms`` and ``side`` units of rounding, and what is seen is their
    square roots.
    """
    return eps(dtype) * (16 + terms**0.5 + 4 * side**0.5)


def inside_tolerance(dtype: Any) -> float:
    """Returns the excess of a computed norm over the bound that is attributed to rounding: 32 eps (4e-6 in float32).

    Without it a kernel on the sphere, such as the result of an earlier projection, would not come back bit for bit.
    """
    return 32 * eps(dtype)


def certificate_margin(kernel_shape: Sequence[int], dtype: Any) -> float:
    """Returns how much lower than the bound a coarse certificate aims.

    Twice :func:`rounding`: once for the symbol and once for the Cholesky factorisation that takes the place of a norm.
    """
    return 2 * rounding(kernel_shape, dtype)


def elimination_limit(value: Any) -> Any:
    """Returns the eigenvalue below which a Gram matrix is left out, if ``value`` is the largest singular value so far.

    It is the square of ``value`` times 1 + 8 eps, so that a block that ties with the largest, up to 4 eps, is not
    factorised again. The smallest normal number keeps the limit of zero blocks positive.
    """
    return value**2 * (1 + 8 * eps(value.dtype)) + tiny(value.dtype)


def possible_limit(value: Any) -> Any:
    """Returns the eigenvalue below which no singular value of at least ``value`` is possible. It is rounded upwards."""
    return value**2 + tiny(value.dtype)


def tie_tolerance(dtype: Any) -> float:
    """Returns the distance of two singular values, relative to the largest, below which they count as tied: 32 eps.

    They are computed to a few eps, so their difference has no correct digit then, nor has a second derivative.
    """
    return 32 * eps(dtype)


def progress(dtype: Any) -> float:
    """Returns the gain below which a step of LOBPCG counts as none: two units of rounding."""
    return 2 * eps(dtype)


def linear_solve_tolerance(dtype: Any) -> float:
    """Returns the residual, relative to the right-hand side, at which a linear solve counts as converged: eps^(2/3).

    The error of the solution is at most this times the condition number, which grows as the top values come together.
    """
    return eps(dtype) ** (2 / 3)


def through_gram(relative: float) -> float:
    """Returns the error, relative to the largest value, of the root of a Gram matrix's eigenvalue.

    The eigenvalue's error is relative to the largest eigenvalue; the root of a small one magnifies it.
    """
    return relative**0.5


def semidefinite_rounding(side: int, dtype: Any) -> float:
    """Returns the error allowed for in a Cholesky factorisation of a matrix of about unit size, and in its entries.

    As in :func:`rounding`, the worst case is about ``side`` units of rounding, and what is seen is its square root.
    """
    return eps(dtype) * (16 + 4 * side**0.5)
