"""Data sets as uint8 arrays. CIFAR-10 in any of its official forms; scikit-learn's digits, which need no download.

Archives are read in memory, to their checksum, and never extracted. Of the python version's pickles only what such a
batch consists of is read; nothing that they name is called. What is not understood ends in a ValueError of one line.
"""

import bz2
import gzip
import hashlib
import http.client
import io
import lzma
import os
import pickle
import pickletools
import tarfile
import tempfile
import urllib.error
import urllib.request
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
LARGEST_ARCHIVE = 256 * 2**20  # packed or unpacked


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
        files = {path.name: _read_file(path, LARGEST_MEMBER) for path in found.iterdir() if _is_batch(path.name)}
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
    packed = _read_file(path, LARGEST_ARCHIVE)
    expected = SHA256.get(path.name)
    if expected and (got := hashlib.sha256(packed).hexdigest()) != expected:
        raise ValueError(
            f"{path}: expected the official archive, SHA-256 {expected}, got {got}: corrupted or altered. Fetch it "
            "again; to use data of your own, unpack them and point --data-dir at the folder."
        )
    files: dict[str, bytes] = {}
    try:
        tar = io.BytesIO(_unpacked(packed))
        del packed
        with tarfile.open(fileobj=tar, mode="r:", tarinfo=_Member) as archive:
            for member in archive:
                name = Path(member.name).name
                if not (member.isfile() and _is_batch(name)):
                    continue
                if name in files:
                    raise tarfile.ReadError(f"two members called {name}")
                stream = archive.extractfile(member)
                assert stream is not None  # it is a file
                files[name] = stream.read()
    except Exception as error:  # the readers of damaged archives raise what they like
        raise ValueError(
            f"{path}: expected a readable tar archive of CIFAR-10, got {_short(error)}. Fetch it again."
        ) from error
    return files


def _unpacked(data: bytes) -> bytes:
    """The tar in an archive, read to the end of the stream, where its checksum stands."""
    if data[:2] == b"\x1f\x8b":
        tar = gzip.GzipFile(fileobj=io.BytesIO(data)).read(LARGEST_ARCHIVE + 1)
    elif data[:3] == b"BZh":
        tar = bz2.BZ2File(io.BytesIO(data)).read(LARGEST_ARCHIVE + 1)
    elif data[:6] == b"\xfd7zXZ\0":
        reader = lzma.LZMADecompressor(memlimit=LARGEST_ARCHIVE)
        tar = reader.decompress(data, LARGEST_ARCHIVE + 1)
        if len(tar) <= LARGEST_ARCHIVE and (not reader.eof or reader.unused_data):
            raise EOFError("a stream that does not end where the file does")
    else:
        return data
    if len(tar) > LARGEST_ARCHIVE:
        raise tarfile.ReadError(f"more than {LARGEST_ARCHIVE} bytes when unpacked")
    return tar


class _Member(tarfile.TarInfo):
    """A member no larger than a batch may be; headers that go on in members of their own (long names) are short."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        limit = LARGEST_MEMBER if info.type in tarfile.REGULAR_TYPES else 2**20
        if not 0 <= info.size <= limit:
            raise tarfile.ReadError(f"expected members under {limit} bytes, got {info.name[:100]!r}: {info.size}")
        return info


def _read_file(path: Path, limit: int) -> bytes:
    """A file's bytes, if it is one and not too large."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got a folder, a pipe or a device.")
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes, got {size}.")
    return path.read_bytes()


def _short(error: object) -> str:
    """An error in one printable line."""
    return ascii(str(error) or type(error).__name__)[1:-1][:200]


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
    return _images(records[:, 1:], name), _labels(records[:, 0], name)


def _decode_python(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        _check_pickle(data)
        content = _BatchUnpickler(data).load()
        pixels, labels = content[b"data"], content[b"labels"]
    except Exception as error:  # a damaged pickle raises what it likes
        raise ValueError(
            f"{name}: expected a pickled CIFAR-10 batch, got {type(error).__name__}: {_short(error)}."
        ) from error
    planes = pixels.array() if isinstance(pixels, _Described) else None
    if planes is None or planes.ndim != 2 or planes.shape[1] != PIXELS:
        got = "something else" if planes is None else planes.shape
        raise ValueError(f"{name}: expected uint8 data of shape (N, {PIXELS}), got {got}.")
    if type(labels) is not list or not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise ValueError(f"{name}: expected a list of labels, ints from 0 to 9, got something else: not CIFAR-10?")
    if len(labels) != len(planes):
        raise ValueError(f"{name}: expected as many labels as images, got {len(labels)} and {len(planes)}.")
    return _images(planes, name), np.asarray(labels, np.int32)


def _images(planes: np.ndarray, name: str) -> np.ndarray:
    if not len(planes):
        raise ValueError(f"{name}: expected images, got none.")
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _labels(labels: np.ndarray, name: str) -> np.ndarray:
    if labels.max() > 9:
        raise ValueError(f"{name}: expected labels from 0 to 9, got {labels.min()} to {labels.max()}: not CIFAR-10?")
    return labels.astype(np.int32)


# What the pickle of a dictionary of lists, strings, numbers and arrays consists of.
_OPERATIONS = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_DICT DICT EMPTY_LIST LIST EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()
)
_MOST_OPERATIONS = 200_000  # a batch of 10,000 images and names has up to 100,000


def _check_pickle(data: bytes) -> None:
    """An error for pickles that would call something, or that take much more memory to load than their own size."""
    tuples, last = 0, ""
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"the operation {name}, for which a batch has no use")
        if number > _MOST_OPERATIONS:
            raise pickle.UnpicklingError(f"more than {_MOST_OPERATIONS} operations")
        if name.endswith("PUT") and int(argument or 0) > number:  # the memo is a table of that size
            raise pickle.UnpicklingError(f"object number {argument} after {number} operations")
        # Tuples are arguments. Others are few: nested, they overflow the stack when they are a key.
        tuples += name.startswith("TUPLE") - (name == "REDUCE" and last.startswith("TUPLE"))
        if tuples > 100:
            raise pickle.UnpicklingError("more than 100 tuples")
        last = last if name.endswith("PUT") or name == "MEMOIZE" else name


class _Described:
    """Stands for a NumPy array or dtype: what its pickle says of it, believed only by :meth:`array`."""

    def __init__(self, *args: Any):
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray | None:
        """The array, if it is one of uint8 with as many bytes as its shape says."""
        try:
            _, shape, dtype, fortran, data = self.state  # type: ignore[misc]
            if isinstance(data, bytes) and dtype.args[0] in ("u1", b"u1"):
                return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
        except Exception:  # whatever such a description leads to
            pass
        return None


class _Encode:
    """Stands for the way in which Python 3 writes bytes in an old protocol; gives no more of them than it is told."""

    __slots__ = ("left",)

    def __init__(self, most: int):
        self.left = most

    def __call__(self, text: Any, encoding: Any) -> bytes:
        data = text.encode("latin1")
        self.left -= len(data)
        if encoding not in ("latin1", b"latin1") or self.left < 0:
            raise pickle.UnpicklingError("bytes in another encoding, or many times the same")
        return data

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function with a state")


class _BatchUnpickler(pickle.Unpickler):
    """Loads what CIFAR-10's python batches consist of: dicts, lists, strings, arrays. Nothing else is called."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _Described,
            ("numpy._core.multiarray", "_reconstruct"): _Described,
            ("numpy", "ndarray"): _Described,
            ("numpy", "dtype"): _Described,
            ("_codecs", "encode"): _Encode(len(data)),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"refusing to load {module}.{name}: a CIFAR-10 batch has no use for it")
        return self._allowed[module, name]
