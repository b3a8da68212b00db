"""Checkpoints of a run: written whole or not at all, verified when read, and readable without this code.

``checkpoints/STEP/state`` is an Orbax tree of plain dictionaries with "params", "batch_stats", "opt_state", "step" and
"key" (key data) at the top, ``checkpoints/STEP/run`` a JSON document: where the metrics stand, and the state's SHA-256.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import parallel

MARGIN = 2**21  # bytes: what a checkpoint takes besides twice its arrays' size


class Checkpoints:
    """The checkpoints in one folder, the newest ``keep`` of them."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder.absolute()
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,  # of a save that was killed
            enable_async_checkpointing=False,  # a save takes about a tenth of a second, and its errors belong here
            lightweight_initialize=True,
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        try:
            return ocp.CheckpointManager(self.folder, options=self._options, item_names=("state", "run"))
        except OSError as error:
            raise OSError(f"{self.folder}: expected a folder to keep checkpoints in, got {error}.") from error

    def steps(self) -> list[int]:
        """Of which steps there is one, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """One more, unless there is one of this step; then the oldest go."""
        if step in self._manager.all_steps():
            return
        tree = plain_tree(state)
        content = {**run, "sha256": digest(tree)}
        # A write that fails halfway is survived too, but Orbax's threads then print pages before the error comes.
        needed, free = (
            MARGIN + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)),
            shutil.disk_usage(self.folder).free,
        )
        if free < needed:
            raise OSError(self._failure(step, f"a disk with {free:,} bytes free, where {needed:,} are wanted"))
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), run=ocp.args.JsonSave(content))
        try:
            self._manager.save(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise what they please
            raise OSError(self._failure(step, first_line(error))) from error

    def _failure(self, step: int, reason: str) -> str:
        last = max((s for s in self._manager.all_steps() if s != step), default=None)
        kept = "There is no earlier one." if last is None else f"That of step {last} is intact."
        return (
            f"{self.folder}: expected to save a checkpoint of step {step}, got {reason}. {kept} "
            "When the cause is removed, the same command continues."
        )

    def restore(
        self, like: Any, say: Callable[[str], None], check: Callable[[dict[str, Any]], None] = lambda run: None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest that is sound, placed like ``like``, and what was saved with it; None if there is none at all.

        ``check`` is called with what was saved with it, and raises an error if that belongs to another run.
        """
        template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), plain_tree(like))
        read = lambda step, **items: self._manager.restore(step, args=ocp.args.Composite(**items))
        failures: dict[int, str] = {}
        for step in self.steps():
            try:
                run = dict(read(step, run=ocp.args.JsonRestore())["run"])
            except Exception as error:  # whatever a damaged file leads to
                failures[step] = first_line(error)
                continue
            check(run)
            try:
                state = read(step, state=ocp.args.StandardRestore(template))["state"]
                if (got := digest(state)) != run["sha256"]:
                    raise ValueError(f"expected a state with SHA-256 {run['sha256']}, got {got}")
            except Exception as error:  # whatever a damaged file leads to
                failures[step] = first_line(error)
                continue
            for bad, reason in failures.items():
                aside = self.folder.parent / f"damaged-checkpoint-{bad}"
                say(f"checkpoint {self.folder / str(bad)} is damaged ({reason}): put aside as {aside.name}")
                if parallel.is_first():
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.folder / str(bad)).rename(aside)
            if failures:
                say(f"falling back to the checkpoint of step {step}")
                parallel.wait("damaged checkpoints put aside")
                self._manager.reload()
            return from_plain_tree(state, like), run
        if failures:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in failures.items())
            raise ValueError(
                f"{self.folder}: expected a checkpoint that can be read, got none ({reasons}). Begin anew with "
                "--resume never."
            )
        return None

    def close(self) -> None:
        """Lets go of Orbax's threads."""
        self._manager.close()


def plain_tree(state: Any) -> dict[str, Any]:
    """A state as nested dictionaries of arrays, named by the paths in it; keys as their data."""
    plain: dict[str, Any] = {name: {} for name in state._fields}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *parents, name = [jax.tree_util.keystr((part,), simple=True) for part in path]
        node = plain
        for parent in parents:
            node = node.setdefault(parent, {})
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        node[name] = jax.random.key_data(leaf) if is_key else leaf
    return plain


def from_plain_tree(plain: dict[str, Any], like: Any) -> Any:
    """The inverse of :func:`plain_tree`, in the structure of ``like``."""

    def one(path, leaf):
        node = plain
        for part in path:
            node = node[jax.tree_util.keystr((part,), simple=True)]
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(node, impl=jax.random.key_impl(leaf)) if is_key else node

    return jax.tree_util.tree_map_with_path(one, like)


def digest(plain: Any) -> str:
    """SHA-256 of names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):  # dictionaries flatten in sorted order
        host = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {host.shape} {host.dtype}\n".encode())
        total.update(np.ascontiguousarray(host).tobytes())
    return total.hexdigest()


def load_weights(path: Path) -> tuple[dict[str, Any], Path]:
    """{"params", "batch_stats"} of a checkpoint, a run's newest one, or a safetensors file; and the run's folder."""
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors.numpy import load_file

        try:
            arrays = load_file(path)
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"{path}: expected weights that can be read, got {first_line(error)}.") from error
        weights: dict[str, Any] = {"params": {}, "batch_stats": {}}
        for name, array in arrays.items():
            *parents, last = name.split("/")
            node = weights
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = array
        return weights, path.parent
    path = path.absolute()
    if (path / "checkpoints").is_dir():
        steps = [int(child.name) for child in (path / "checkpoints").iterdir() if child.name.isdigit()]
        path = path / "checkpoints" / str(max(steps, default="none"))
    if path.name == "state":
        path = path.parent
    if not (path / "state").is_dir():
        raise FileNotFoundError(
            f"expected a checkpoint (OUT_DIR/checkpoints/STEP), a run's folder or params.safetensors, got {path}."
        )
    try:
        with ocp.StandardCheckpointer() as reader:
            found = reader.metadata(path / "state").item_metadata
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), found)
            state = reader.restore(path / "state", like)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{path}: expected weights that can be read, got {first_line(error)}.") from error
    return {"params": state["params"], "batch_stats": state.get("batch_stats", {})}, path.parent.parent


def check_weights(weights: dict[str, Any], wanted: Any, source: Path) -> None:
    """An error that names an array that is missing, too much, or of another shape or type than those of a network."""
    flat = lambda tree: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    there, here = flat(weights), flat(wanted)
    stack = next(
        (np.shape(leaf)[: np.ndim(leaf) - len(here[name].shape)] for name, leaf in there.items() if name in here), ()
    )
    for name in sorted({*there, *here}):
        got = f"{np.shape(there[name])} {there[name].dtype}" if name in there else "none"
        want = f"{(*stack, *here[name].shape)} {here[name].dtype}" if name in here else "none"
        if got != want:
            raise ValueError(
                f"{source}: expected the weights of the network in its config.json; {name}: {want}, got {got}."
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened in its middle: TensorStore puts the reason last."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-180:]}"
