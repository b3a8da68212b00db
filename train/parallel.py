"""Several devices, several hosts, several seeds: where arrays lie, and which of their axes are mapped.

Data parallelism is the compiler's: parameters are replicated, each batch is split over the mesh's one axis, and batch
norm's statistics and the gradients are those of the whole batch. Every device constrains its own copy of the kernels.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


def start(config: Any) -> None:
    """What must happen before the first use of a device."""
    if config.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)


def is_first() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


class Layout(NamedTuple):
    """The two ways an array lies on the devices."""

    everywhere: NamedSharding
    split: NamedSharding  # its first axis over the devices

    @property
    def devices(self) -> int:
        """How many they are."""
        return self.split.mesh.size

    def place(self, tree: Any) -> Any:
        """A tree of host arrays on every device. All processes must hold the same."""

        def one(leaf):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(one(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, self.everywhere, lambda index: host[index])

        return jax.tree.map(one, tree)


def layout(batch_size: int, devices: int | None = None) -> Layout:
    """The layout over all devices, or the first few local ones."""
    found = jax.devices()
    if devices is not None:
        if jax.process_count() > 1 or devices > len(found):
            raise ValueError(
                f"expected devices to be at most the {len(found)} at hand, and left open on several hosts, "
                f"got {devices} on {jax.process_count()} host(s)."
            )
        found = found[:devices]
    if batch_size % len(found):
        raise ValueError(
            f"expected batch_size to be a multiple of the {len(found)} devices, got {batch_size}. Change it, or use "
            "fewer with --devices."
        )
    mesh = jax.sharding.Mesh(np.array(found), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return Layout(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))


def agree(stop: bool, due: bool) -> tuple[bool, bool]:
    """The same decision on every host: stop if any was asked to, save when the first one's clock says so."""
    if jax.process_count() == 1:
        return stop, due
    flags = np.asarray(multihost_utils.process_allgather(np.array([stop, due])))
    return bool(flags[:, 0].any()), bool(flags[0, 1])


def wait(name: str) -> None:
    """Until every host is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def stack_axes(state: Any) -> Any:
    """For ``vmap`` over seeds: 0 for what differs between them, None for counters, which all of them share.

    A shared counter keeps the constraint's ``lax.cond`` a branch. Were it mapped, both sides would run on every step.
    """
    shared = lambda leaf: leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
    return jax.tree.map(lambda leaf: None if shared(leaf) else 0, state)


class Seeds(NamedTuple):
    """The networks that are trained at once, by their seeds. One is not stacked; several are, on a leading axis.

    ``hyper`` may hold, by name, an array of one value each.
    """

    numbers: tuple[int, ...]
    hyper: dict[str, np.ndarray] | None = None

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.numbers)

    def create(self, make: Callable[[jax.Array, Any], Any]) -> tuple[Any, Any]:
        """``make(key, hyper)`` for each, compiled; and the axes to map over, None for a single one."""
        # Run once: on a CPU its compilation took 7 s with optimisations, 1 s without.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        keys = jnp.stack([jax.random.key(seed) for seed in self.numbers])
        one = keys[0], jax.tree.map(lambda values: jnp.float32(values[0]), self.hyper)
        if self.count == 1:
            return jax.jit(make, compiler_options=quick)(*one), None
        axes = stack_axes(jax.eval_shape(make, *one))
        hyper = jax.tree.map(jnp.float32, self.hyper)
        return jax.jit(jax.vmap(make, out_axes=axes), compiler_options=quick)(keys, hyper), axes

    def map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of one argument, over the seeds."""
        return function if self.count == 1 else jax.vmap(function)

    def split(self, tree: Any) -> list[Any]:
        """A stacked tree as one tree a seed, on the host."""
        if self.count == 1:
            return [jax.tree.map(np.asarray, tree)]
        return [jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n]), tree) for n in range(self.count)]
