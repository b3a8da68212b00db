"""Data sets as uint8 arrays. CIFAR-10 in any of its official forms; scikit-learn's digits, which need no download.

Archives are read member by member in memory and never extracted; the python version's pickles go through an unpickler
that can build arrays of whole numbers and nothing else.
"""

import bz2
import gzip
import hashlib
import http.client
import io
import lzma
import os
import pickle
import re
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
TRAIN_BATCHES = [f"data_batch_{n}" for n in range(1, 6)]
TEST_BATCH = "test_batch"
PIXELS = 3 * 32 * 32
LARGEST_MEMBER = 64 * 2**20
LARGEST_ARCHIVE = 256 * 2**20
LARGEST_CONTENT = 1024 * 2**20


class Dataset(NamedTuple):
    """uint8 images (N, H, W, C) and int32 labels (N,), for training and for testing."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: Path | None = None, download: bool = False) -> Dataset:
    """The data set called ``name``: ``digits`` (bundled) or ``cifar10`` (from ``data_dir``, or downloaded into it)."""
    if name == "digits":
        return digits()
    if name == "cifar10":
        return cifar10(data_dir, download)
    raise ValueError(f"expected dataset to be 'digits' or 'cifar10', got {name!r}.")


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8; every fifth image of each class is for testing (355)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    rank = np.zeros(len(labels), int)
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    test = rank % 5 == 4
    return Dataset(images[~test], labels[~test], images[test], labels[test])


def cifar10(data_dir: Path | None, download: bool = False, url: str = URL) -> Dataset:
    """CIFAR-10 from the official binary or python folder, or either archive (or a folder that holds one of them)."""
    found = find(Path(data_dir)) if data_dir is not None else None
    if found is None:
        if not download:
            where = f"none of them in {data_dir}" if data_dir is not None else "no --data-dir"
            raise FileNotFoundError(
                "expected CIFAR-10 as a folder cifar-10-batches-bin or cifar-10-batches-py, or as an archive "
                f"{' or '.join(SHA256)}; got {where}. Point --data-dir at one, or add --download to fetch {URL}."
            )
        folder = Path(data_dir) if data_dir is not None else Path.home() / ".cache" / "opnorm_jax"
        found = fetch(folder, url)
    if found.is_dir():
        paths = [path for path in found.iterdir() if _is_batch(path.name) and path.is_file()]
        for path in paths:
            if path.stat().st_size > LARGEST_MEMBER:
                raise ValueError(f"{path}: expected at most {LARGEST_MEMBER} bytes, got {path.stat().st_size}.")
        files = {path.name: path.read_bytes() for path in paths}
    else:
        files = read_archive(found)
    return _assemble(files, found)


def find(path: Path) -> Path | None:
    """The folder of batches, or the archive, that ``path`` is or holds."""
    if path.is_file():
        return path
    for folder in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
        if folder.is_dir() and any(_is_batch(child.name) for child in folder.iterdir()):
            return folder
    return next((path / name for name in SHA256 if (path / name).is_file()), None)


def fetch(folder: Path, url: str = URL) -> Path:
    """Downloads the binary archive, checks it, and only then gives it its name."""
    target = folder / "cifar-10-binary.tar.gz"
    folder.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as response:
            while piece := response.read(2**20):
                size += len(piece)
                if size > LARGEST_ARCHIVE:
                    raise ValueError(f"{url}: expected at most {LARGEST_ARCHIVE} bytes, got more. Nothing was kept.")
                digest.update(piece)
                out.write(piece)
        if digest.hexdigest() != SHA256[target.name]:
            raise ValueError(
                f"{url}: expected an archive of SHA-256 {SHA256[target.name]}, got {digest.hexdigest()} "
                f"({size} bytes). Nothing was kept; try again, or fetch the archive by hand and point --data-dir at it."
            )
        os.replace(temporary, target)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url}: expected to download CIFAR-10, got {error}. Nothing was kept; try again, or fetch the archive by "
            "hand and point --data-dir at it."
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def read_archive(path: Path) -> dict[str, bytes]:
    """The batches of an official archive, by name. Checked by SHA-256 where the name is an official one."""
    expected = SHA256.get(path.name)
    if expected and (got := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise ValueError(
            f"{path}: expected the official archive, SHA-256 {expected}, got {got}: corrupted or altered. Fetch it "
            "again; to use data of your own, unpack them and point --data-dir at the folder."
        )
    files: dict[str, bytes] = {}
    try:
        _read_to_the_end(path)
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = Path(member.name).name
                if not (member.isfile() and _is_batch(name)):
                    continue
                if member.size > LARGEST_MEMBER:
                    raise ValueError(f"{name} of {member.size} bytes, more than {LARGEST_MEMBER}")
                stream = archive.extractfile(member)
                assert stream is not None  # it is a file
                files[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a readable tar archive of CIFAR-10, got {error}. Fetch it again."
        ) from error
    return files


def _read_to_the_end(path: Path) -> None:
    """Raises an error if a compressed file is damaged or too large.

    The checksum comes after all that the archive's reader looks at, so that the reader alone would miss damage.
    """
    for opener in (gzip.open, bz2.open, lzma.open):
        with opener(path) as stream:
            try:
                stream.read(1)
            except (OSError, EOFError, lzma.LZMAError):
                continue  # compressed in another way, or not at all
            size = 0
            while piece := stream.read(2**20):
                size += len(piece)
                if size > LARGEST_CONTENT:
                    raise ValueError(f"more than {LARGEST_CONTENT} bytes")


def _is_batch(name: str) -> bool:
    return name.removesuffix(".bin") in (*TRAIN_BATCHES, TEST_BATCH)


def _assemble(files: dict[str, bytes], source: Path) -> Dataset:
    binary = any(name.endswith(".bin") for name in files)
    suffix = ".bin" if binary else ""
    missing = [name + suffix for name in (*TRAIN_BATCHES, TEST_BATCH) if name + suffix not in files]
    if missing:
        raise FileNotFoundError(
            f"{source}: expected data_batch_1 to 5 and test_batch, got {sorted(files)}; missing {missing}."
        )
    decode = _decode_binary if binary else _decode_python
    batch = {name: decode(files[name + suffix], f"{source}: {name + suffix}") for name in (*TRAIN_BATCHES, TEST_BATCH)}
    counts = {name: len(batch[name][1]) for name in batch}
    if len(set(counts.values())) > 1:  # cut between two records, a file is still well formed
        raise ValueError(
            f"{source}: expected batches of equal size (10,000 images each), got {counts}: truncated? Fetch it again."
        )
    images = np.concatenate([batch[name][0] for name in TRAIN_BATCHES])
    labels = np.concatenate([batch[name][1] for name in TRAIN_BATCHES])
    return Dataset(images, labels, *batch[TEST_BATCH])


def _decode_binary(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + PIXELS
    if not data or len(data) % record:
        raise ValueError(
            f"{name}: expected records of {record} bytes (10,000 of them), got {len(data)} bytes: truncated?"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return _images(records[:, 1:], name), _labels(records[:, 0], len(records), name)


def _decode_python(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = (getattr(content[key], "values", content[key]) for key in (b"data", b"labels"))
    except Exception as error:  # what a damaged pickle makes of its opcodes can be of any kind
        raise ValueError(f"{name}: expected a pickled CIFAR-10 batch, got {error!r:.200}.") from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (max(len(pixels), 1), PIXELS):
        got = getattr(pixels, "shape", type(pixels).__name__)
        raise ValueError(f"{name}: expected uint8 data of shape (N, {PIXELS}), got {got}.")
    return _images(pixels, name), _labels(labels, len(pixels), name)


def _images(planes: np.ndarray, name: str) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _labels(labels: Any, count: int, name: str) -> np.ndarray:
    if not isinstance(labels, list | np.ndarray):
        raise ValueError(f"{name}: expected a list of labels, got {type(labels).__name__}.")
    if len(labels) != count:
        raise ValueError(f"{name}: expected as many labels as images, got {len(labels)} and {count}.")
    try:
        found = np.asarray(labels)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected a list of whole numbers as labels, got {error}.") from error
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name}: expected a list of whole numbers as labels, got {found.dtype}{found.shape}.")
    if found.min() < 0 or found.max() > 9:
        raise ValueError(f"{name}: expected labels from 0 to 9, got {found.min()} to {found.max()}: not CIFAR-10?")
    return found.astype(np.int32)


class _Dtype:
    """Stands for ``numpy.dtype`` in a pickle: whole numbers only."""

    def __init__(self, code, *_):
        code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch("[iu][1248]", code):
            raise pickle.UnpicklingError(f"expected an array of whole numbers, got one of {code!r:.20}")
        self.found = np.dtype(code)

    def __setstate__(self, state):
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.found = self.found.newbyteorder(">" if order == ">" else "<")


class _Array:
    """Stands for ``numpy.ndarray`` in a pickle."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("expected an array of whole numbers")
        self.values = np.frombuffer(data, dtype.found).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_):
    return _Array()


def _encode(text, encoding):
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"expected latin1, got {encoding!r:.20}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Loads what CIFAR-10's python batches consist of: dicts, lists, strings, arrays of whole numbers.

    Nothing is called but the stand-ins above. NumPy's own functions crash on some of what a damaged file can ask of
    them.
    """

    _STAND_INS = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"refusing to load {module}.{name}: a CIFAR-10 batch has no use for it")
        return self._STAND_INS[module, name]
