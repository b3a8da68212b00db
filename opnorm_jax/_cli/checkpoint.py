"""Files of parameters, read and copied without ever running or unpickling what they hold."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class UserError(Exception):
    """What is wrong, in one line, for the person at the command line."""


class Entry(NamedTuple):
    """One array of a checkpoint, not yet read."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """A file or folder of named arrays."""

    path: Path
    entries: dict[str, Entry]  # the parameters
    names: list[str]  # of all arrays

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of the files that a copy can be written to."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads some of the arrays: parameters, or others by their names in ``names``."""
        ...

    def write(self, out: Path, replaced: Mapping[str, np.ndarray], force: bool) -> None:
        """Writes all of it, with some arrays replaced by others of the same shape and dtype.

        A file that is there is replaced only by ``force``.
        """
        ...


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the checkpoint at a path: its arrays are listed, but not kept."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    if path.is_dir():
        return _Orbax(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a file or a folder, got a pipe or a device.")
    kinds = {".safetensors": _Safetensors, ".npz": _Npz}
    if path.suffix not in kinds:
        raise UserError(
            f"{path}: expected a .safetensors file, an .npz file or a folder with an orbax checkpoint. Other formats "
            "(PyTorch's .pt, pickles) can run code when read: convert them first."
        )
    return kinds[path.suffix](path)


@contextlib.contextmanager
def atomic_write(out: Path, like: Path | None = None, replace: bool = False) -> Iterator[Path]:
    """Gives a temporary file in the folder of ``out`` that takes its place at the end, or vanishes after an error.

    Without ``replace`` a file that has come to be there meanwhile is left alone: that is an error.
    """
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=out.name + ".", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if like is not None and like.is_file():
            shutil.copymode(like, temporary)
        else:  # mkstemp's is for the owner alone
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, out)
        else:
            _name_new(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _name_new(temporary: Path, out: Path) -> None:
    """Gives a file its name, if no file has it: in one step, so that a kill cannot come in between."""
    try:
        try:
            os.link(temporary, out)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(temporary, out)
    except FileExistsError:
        raise UserError(f"{out}: exists by now. Pass --force to replace it.") from None


class _Safetensors:
    suffixes = (".safetensors",)

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            self.entries = {name: Entry(tuple(s.get_shape()), _name_of(s.get_dtype())) for name, s in slices.items()}
            self.names = list(slices)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        with self._open() as file:
            return {name: file.get_tensor(name) for name in names}

    def write(self, out: Path, replaced: Mapping[str, np.ndarray], force: bool) -> None:
        # The file itself with the bytes of some arrays exchanged: order, metadata and foreign dtypes stay as they are.
        with atomic_write(out, self.path, force) as temporary:
            shutil.copyfile(self.path, temporary)
            with open(temporary, "rb+") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))  # valid: the library has opened it
                for name, array in replaced.items():
                    start, end = header[name]["data_offsets"]
                    data = np.ascontiguousarray(array).tobytes()
                    assert len(data) == end - start
                    file.seek(8 + size + start)
                    file.write(data)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            import safetensors
        except ImportError:
            raise UserError(".safetensors files need safetensors: pip install 'opnorm-jax[cli]'.") from None
        try:
            with safetensors.safe_open(self.path, framework="np") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{self.path}: not a readable .safetensors file ({_line(error)}).") from None


class _Npz:
    suffixes = (".npz",)

    def __init__(self, path: Path):
        self.path = path
        self.entries, self._dtypes = {}, {}
        with self._open() as archive:
            for info in archive.infolist():  # headers alone: nothing is inflated
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    if name in self.entries:
                        raise ValueError(f"it holds {name!r} twice")
                    with archive.open(info) as member:
                        shape, dtype = _read_npy_header(member)
                        size = member.tell() + math.prod(shape) * dtype.itemsize
                    if not dtype.hasobject and size != info.file_size:
                        raise ValueError(f"{name!r} is not as long as its header says")
                    self._dtypes[name] = dtype
                    self.entries[name] = Entry(shape, "object" if dtype.hasobject else dtype.newbyteorder("=").name)
        self.names = list(self.entries)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        arrays = {}
        with self._open() as archive:
            for name in names:
                with archive.open(name + ".npy") as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
        return arrays

    def write(self, out: Path, replaced: Mapping[str, np.ndarray], force: bool) -> None:
        with (
            atomic_write(out, self.path, force) as temporary,
            zipfile.ZipFile(self.path) as source,
            zipfile.ZipFile(temporary, "w") as target,
        ):
            for info in source.infolist():  # all else is copied unread
                fresh = zipfile.ZipInfo(info.filename, info.date_time)
                fresh.compress_type, fresh.external_attr = info.compress_type, info.external_attr
                if (name := info.filename.removesuffix(".npy")) in replaced:
                    _write_npy(target, fresh, replaced[name].astype(self._dtypes[name], copy=False))
                    continue
                with source.open(info) as original, target.open(fresh, "w", force_zip64=True) as member:
                    shutil.copyfileobj(original, member)

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except Exception as error:  # the readers of headers, compressions and encryptions raise what they like
            raise UserError(f"{self.path}: not a readable .npz file ({_line(error)}).") from None


class _Orbax:
    suffixes = (".safetensors", ".npz")

    def __init__(self, path: Path):
        self.path = _item_folder(path)
        try:
            import orbax.checkpoint
        except ImportError:
            raise UserError("orbax checkpoints need orbax: pip install 'opnorm-jax[cli]'.") from None
        self._orbax = orbax.checkpoint
        import jax
        from etils import epath

        with self._guarded():
            self._tree = orbax.checkpoint.PyTreeCheckpointHandler().metadata(epath.Path(self.path.absolute())).tree
        is_leaf = lambda node: hasattr(node, "shape")
        leaves = jax.tree_util.tree_flatten_with_path(self._tree, is_leaf=is_leaf)[0]
        self._flat = {_joined(at): Entry(tuple(leaf.shape), str(leaf.dtype)) for at, leaf in leaves if is_leaf(leaf)}
        self.names = list(self._flat)
        # The parameters alone, where they can be told: optimizers keep arrays of the same shapes.
        split = [name.split("/") for name in self._flat]
        found = {tuple(parts[: parts.index("params") + 1]) for parts in split if "params" in parts[:-1]}
        roots = {"/".join(root) + "/" for root in found if len(root) == min(map(len, found))}
        short = (lambda name: name.removeprefix(min(roots))) if len(roots) == 1 else (lambda name: name)
        self._full = {short(name): name for name in self._flat if not roots or name.startswith(tuple(roots))}
        self.entries = {name: self._flat[full] for name, full in self._full.items()}

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        everything = self._restore()
        return {name: everything[self._full.get(name, name)] for name in names}

    def write(self, out: Path, replaced: Mapping[str, np.ndarray], force: bool) -> None:
        arrays = self._restore()
        arrays.update({self._full[name]: array for name, array in replaced.items()})
        with atomic_write(out, replace=force) as temporary:
            if out.suffix == ".npz":
                with zipfile.ZipFile(temporary, "w") as target:
                    for name, array in arrays.items():
                        _write_npy(target, zipfile.ZipInfo(name + ".npy"), array)
                return
            try:
                from safetensors.numpy import save
            except ImportError:
                raise UserError(".safetensors files need safetensors: pip install 'opnorm-jax[cli]'.") from None
            temporary.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))

    def _restore(self) -> dict[str, np.ndarray]:
        import jax

        ocp = self._orbax
        is_leaf = lambda node: hasattr(node, "shape")
        # As NumPy arrays, wherever the arrays lay when they were saved.
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree, is_leaf=is_leaf)
        with self._guarded():
            restore = ocp.args.PyTreeRestore(restore_args=arguments)
            tree = ocp.PyTreeCheckpointer().restore(self.path.absolute(), args=restore)
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {_joined(path): np.asarray(leaf) for path, leaf in leaves if not isinstance(leaf, str)}

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its readers raise whatever the damage leads to
            raise UserError(f"{self.path}: not a readable orbax checkpoint ({_line(error)}).") from None


def _read_npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the shape and the dtype of an array; of a hostile header no more than NumPy's limit of 10,000 bytes."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in read:
        raise ValueError(f"an array of the unknown format {version}")
    shape, _, dtype = read[version](member)
    return shape, dtype


def _write_npy(target: zipfile.ZipFile, info: zipfile.ZipInfo, array: np.ndarray) -> None:
    if array.dtype.kind == "V":
        raise UserError(f"{info.filename}: .npz files cannot hold {array.dtype}. Write a .safetensors file.")
    with target.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _item_folder(path: Path) -> Path:
    """Returns the folder of the saved tree, given that of a run, its checkpoints or a step, or that folder itself."""
    at = path
    if not _is_item(at) and (at / "checkpoints").is_dir():
        at = at / "checkpoints"
    if not _is_item(at):
        numbered = ((re.search(r"(?:^|_)(\d+)$", folder.name), folder) for folder in at.iterdir() if folder.is_dir())
        at = max(((int(found[1]), folder) for found, folder in numbered if found), default=(0, at))[1]
    if not _is_item(at):
        items = [at / name for name in ("state", "default", "params")] + sorted(p for p in at.iterdir() if p.is_dir())
        at = next((item for item in items if _is_item(item)), at)
    if not _is_item(at):
        raise UserError(
            f"{path}: no orbax checkpoint found in this folder. Give that of a run, its checkpoints, or a step."
        )
    return at


def _is_item(path: Path) -> bool:
    return (path / "_METADATA").is_file()


def _joined(path: tuple) -> str:
    import jax

    return jax.tree_util.keystr(path, simple=True, separator="/")


def _name_of(dtype: str) -> str:
    """Returns NumPy's name of a safetensors dtype."""
    found = re.fullmatch(r"(BF|F|I|U|C)(16|32|64|128|8)", dtype)
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "C": "complex"}
    return kinds[found[1]] + found[2] if found else dtype


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
