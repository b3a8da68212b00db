"""The smallest singular value of a layer itself, from its sparse matrix, in double precision on the host."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sparse
from scipy.sparse import linalg

from opnorm_jax._geometry import Geometry, met_pixels
from opnorm_jax._rounding import semidefinite_rounding

LARGEST_GRAM = 2**25
"""The Gram matrix may have so many entries that are not zero; its factors have about ten times as many."""

_DENSE = 512


class Smallest(NamedTuple):
    """A certified lower bound on a layer's smallest singular value, and the value, which is converged from above."""

    lower: float
    value: float


def smallest_singular_value(kernel: np.ndarray, geometry: Geometry) -> Smallest | None:
    r"""Computes the smallest of the min(inputs, outputs) singular values.

    Returns None where the layer is too large, or the iterations do not converge.

    With A the layer's own matrix, G = AᵀA or AAᵀ is sparse. Its smallest eigenvalue is found by inverse iterations
    (Lanczos, with a sparse LU factorisation of G). By Sylvester's law of inertia it is larger than s if G - s I has
    positive pivots only, which certifies a value just below the one that was found.

    Args:
      kernel: finite, spatial axes first.
      geometry: of that kernel.

    Cost: two sparse factorisations for each group of channels: 2 s for 64 channels on 8 x 8, 8 s for 16 on 32 x 32.

    References:
      Y. Saad, Numerical Methods for Large Eigenvalue Problems, SIAM, 2011, chapter 8.
    """
    scale = float(np.max(np.abs(kernel))) or 1.0
    groups = np.split(kernel.astype(np.float64) / scale, geometry.conv.feature_group_count, axis=-1)
    selections = _selections(geometry)
    if _gram_entries(selections, *groups[0].shape[-2:]) > LARGEST_GRAM:
        return None
    found = [_of_matrix(_matrix(part, selections)) for part in groups]
    if None in found:
        return None
    return Smallest(*(scale * min(values) for values in zip(*found)))


def _selections(geometry: Geometry) -> list[list[Any]]:
    """Returns, for each axis and tap, which pixel each output meets, as a matrix."""
    found = []
    for pixels, n in zip(met_pixels(geometry), geometry.conv.input_shape, strict=True):
        shape = pixels.shape[1], n
        entries = [(np.ones(np.sum(met >= 0)), (np.flatnonzero(met >= 0), met[met >= 0])) for met in pixels]
        found.append([sparse.csc_array(each, shape=shape) for each in entries])
    return found


def _matrix(kernel: np.ndarray, selections: list[list[Any]]) -> Any:
    """Returns the layer of one group of channels as a matrix, outputs times inputs."""
    total: Any = 0
    for tap in np.ndindex(kernel.shape[:-2]):
        factors = [axis[j] for axis, j in zip(selections, tap, strict=True)]
        total = total + functools.reduce(sparse.kron, [*factors, sparse.csc_array(kernel[tap].T)])
    return sparse.csc_array(total)


def _gram_entries(selections: list[list[Any]], i: int, o: int) -> int:
    """Counts the entries of the smaller Gram matrix that can differ from zero."""
    axes: list[Any] = [sum(axis[1:], axis[0]) for axis in selections]
    wide = math.prod(axis.shape[0] for axis in axes) * o < math.prod(axis.shape[1] for axis in axes) * i
    pixels = math.prod((axis @ axis.T if wide else axis.T @ axis).nnz for axis in axes)
    return pixels * (o if wide else i) ** 2


def _of_matrix(matrix: Any) -> Smallest | None:
    wide = matrix.shape[0] < matrix.shape[1]
    tall: Any = sparse.csc_array(matrix.T) if wide else matrix
    side = tall.shape[1]
    allowance = semidefinite_rounding(side, np.float64)
    if side <= _DENSE:
        values = np.linalg.svd(tall.toarray(), compute_uv=False)
        return Smallest(max(0.0, values[-1] - allowance * values[0]), values[-1])
    gram = sparse.csc_array(tall.T @ tall)
    size = float(abs(gram).sum(axis=0).max())  # at least the largest eigenvalue
    factors = _factorise(gram)
    if factors is None:
        return Smallest(0.0, 0.0)
    inverse: Any = linalg.LinearOperator(gram.shape, matvec=factors.solve, dtype=np.float64)  # type: ignore
    start = np.random.default_rng(0).standard_normal(side)
    try:
        vector = linalg.eigsh(gram, k=1, sigma=0, OPinv=inverse, v0=start)[1][:, 0]
    except linalg.ArpackError:
        return None
    value = float(np.linalg.norm(tall @ vector) / np.linalg.norm(vector))
    shift = (1 - 1e-6) * value**2
    shifted = _factorise(sparse.csc_array(gram - shift * sparse.eye_array(side)))
    certified = shifted is not None and (shifted.U.diagonal() > 0).all() and (shifted.perm_r == shifted.perm_c).all()
    return Smallest(math.sqrt(max(0.0, shift - allowance * size)) if certified else 0.0, value)


def _factorise(matrix: Any) -> Any:
    """Returns the factors of a symmetric matrix, whose pivots are its own diagonal; None if it is singular."""
    try:
        return linalg.splu(matrix, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:
        return None
