"""How a computation is carried out: by which factorisations, on which devices, in chunks of what size."""

from __future__ import annotations

import dataclasses

import jax

DEFAULT_CHUNK_BYTES = 2**28

FACTORIZATIONS = ("auto", "decompose", "products")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Says how to compute. It never changes what is computed, except for rounding.

    The object is frozen, hashable and static under ``jit``. Most functions take one as ``execution=``.

    Args:
      factorization: ``"decompose"`` uses ``eigh``, ``svd`` and Cholesky factorisations of small matrices.
        ``"products"`` uses matrix products alone, for accelerators that factorise slowly. It cannot compute all
        singular values of a matrix, so :func:`singular_values`, :func:`spectral_report` and :func:`plot_spectra`
        refuse it. ``"auto"`` (the default) chooses; today that is ``"decompose"`` on every platform.
      mesh: the frequencies are divided among all devices of this ``jax.sharding.Mesh``, and the kernel is replicated.
        This pays for large layers. On a CPU it needs ``jax.config.update("jax_num_cpu_devices", cores)``: nothing
        else in this library uses several cores.
      chunk_bytes: the matrices of as many frequencies as fit into this number of bytes are computed at a time. A clip's
        peak of memory is about this, that of other functions a few times this.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: an unknown factorization, or a ``chunk_bytes`` below 1.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> products = oj.Execution(factorization="products")
      >>> bool(abs(oj.operator_norm(jnp.ones((3, 3, 2, 2)), (8, 8), execution=products) - 18) < 1e-4)
      True
    """

    factorization: str = "auto"
    mesh: jax.sharding.Mesh | None = None
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    def __post_init__(self):
        if self.factorization not in FACTORIZATIONS:
            raise ValueError(f"expected factorization to be one of {FACTORIZATIONS}, got {self.factorization!r}.")
        if self.mesh is not None and not isinstance(self.mesh, jax.sharding.Mesh):
            raise TypeError(
                f"expected mesh to be a jax.sharding.Mesh or None, got {self.mesh!r}. jax.make_mesh makes one."
            )
        if isinstance(self.chunk_bytes, bool) or not isinstance(self.chunk_bytes, int):
            raise TypeError(f"expected chunk_bytes to be an int, got {self.chunk_bytes!r}.")
        if self.chunk_bytes < 1:
            raise ValueError(f"expected chunk_bytes to be positive, got {self.chunk_bytes}.")

    @property
    def automatic_mesh(self) -> jax.sharding.Mesh:
        """The mesh, with automatic axes: those that computations see (see ``_kernel/compiled.py``)."""
        assert self.mesh is not None
        automatic = (jax.sharding.AxisType.Auto,) * len(self.mesh.axis_names)
        return jax.sharding.Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=automatic)

    def holding(self, arrays: int) -> Execution:
        """Returns the same with smaller chunks, for steps that hold so many arrays of a chunk's size at once."""
        return dataclasses.replace(self, chunk_bytes=max(1, self.chunk_bytes // arrays))


def check_execution(execution: Execution) -> None:
    """Raises a ``TypeError`` if ``execution`` is not an :class:`Execution`."""
    if not isinstance(execution, Execution):
        raise TypeError(
            f"expected execution to be an opnorm_jax.Execution, got {execution!r}. "
            "Write execution=opnorm_jax.Execution(factorization='products'), for example."
        )


_ALL_VALUES = (
    "matrix products alone find the largest singular value, not all of them. Use operator_norm for the largest one."
)


def check_decomposes(execution: Execution, reason: str = _ALL_VALUES) -> None:
    """Raises an error if ``execution`` asks for matrix products alone; the reason says why these are not enough."""
    check_execution(execution)
    if execution.factorization == "products":
        raise ValueError(f"expected factorization 'auto' or 'decompose', got 'products': {reason}")
