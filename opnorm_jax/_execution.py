"""How a computation over frequencies is carried out: in what chunks, on which devices, by which factorisation."""

from __future__ import annotations

from typing import NamedTuple

import jax

DEFAULT_CHUNK_BYTES = 2**28
"""Default size of the stack of blocks held at a time; the peak is a few times that."""

METHODS = {
    "values": ("auto", "svd", "eigh"),
    "norm": ("auto", "svd", "eigh", "products"),
    "constraint": ("auto", "eigh", "products"),
}
"""By what is to be computed."""


class Execution(NamedTuple):
    """Static and hashable."""

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    mesh: jax.sharding.Mesh | None = None  # frequencies are divided among all of its devices
    method: str = "auto"


def execution(chunk_bytes: int, mesh: jax.sharding.Mesh | None, method: str = "auto", what: str = "norm") -> Execution:
    """The arguments of those names, checked; ``what`` is one of METHODS."""
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"expected chunk_bytes to be an int (static under jit), got {chunk_bytes!r}.")
    if chunk_bytes < 1:
        raise ValueError(f"expected chunk_bytes to be positive, got {chunk_bytes}.")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"expected mesh to be a jax.sharding.Mesh or None, got {mesh!r}. jax.make_mesh makes one.")
    if method not in METHODS[what]:
        raise ValueError(f"expected method to be one of {METHODS[what]}, got {method!r}.")
    return Execution(chunk_bytes, mesh, method)
