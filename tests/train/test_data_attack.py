"""Damaged and hostile data files: the data set, or one clear ValueError; nothing is executed, and memory is bounded."""

import bz2
import gzip
import io
import lzma
import pickle
import resource
import sys
import tarfile

import numpy as np
import pytest
import train_run
from conftest import THOROUGH

pytest.importorskip("tyro", reason="the trainer needs the extra [train]")
sys.path.insert(0, str(train_run.TRAIN))

import datasets  # noqa: E402

PICKLES, ARCHIVES = (20_000, 2_000) if THOROUGH else (2000, 500)
COUNT = 3

looked_up: list = []
sys.addaudithook(lambda event, args: looked_up.append(args) if event == "pickle.find_class" else None)


def batch(rng):
    return {
        b"data": rng.integers(0, 256, (COUNT, datasets.PIXELS), np.uint8),
        b"labels": [0, 9, 4],
        b"batch_label": b"x",
    }


def mutated(data, rng, hot=200):
    """Flips, inserts, deletes and copies bytes, most of them near the ends, where a file's structure is."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(len(data))) if rng.random() < 0.2 else int(rng.integers(-hot, hot)) % len(data)
        kind = rng.integers(5)
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place] = int(rng.integers(256))
        elif kind == 2:
            del data[place : place + int(rng.integers(1, 9))]
        elif kind == 3:
            data[place:place] = rng.bytes(int(rng.integers(1, 9)))
        else:
            other = int(rng.integers(len(data)))
            data[place:place] = data[other : other + 20]
    return bytes(data)


def test_fuzzed_pickles():
    rng, loaded = np.random.default_rng(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    looked_up.clear()
    for number in range(PICKLES):
        data = pickle.dumps(batch(rng), protocol=number % 5 + 1)
        try:
            images, labels = datasets._decode_python(mutated(data, rng), "fuzzed")
        except ValueError as error:
            assert str(error).startswith("fuzzed: expected") and len(str(error)) < 500
            continue
        loaded += 1
        assert images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3)
        assert labels.dtype == np.int32 and 0 <= labels.min() and labels.max() <= 9
    assert 0 < loaded < PICKLES
    assert not looked_up  # no name is ever imported
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


HOSTILE = {
    "columns of labels": {b"labels": np.zeros((COUNT, 1), int)},
    "labels that are no list": {b"labels": 7},
    "labels by name": {b"labels": {0: 1, 1: 2, 2: 3}},
    "labels that are text": {b"labels": b"012"},
    "broken numbers": {b"labels": [0.5, 1.0, 2.0]},
    "truth values": {b"labels": [True, False, True]},
    "nested labels": {b"labels": [[1], [2, 3], [4]]},
    "huge labels": {b"labels": [10**30, 1, 2]},
    "negative labels": {b"labels": [-1, 1, 2]},
    "pixels of another type": {b"data": np.zeros((COUNT, datasets.PIXELS), np.int64)},
    "pixels of another shape": {b"data": np.zeros((COUNT, 3, 1024), np.uint8)},
    "no images": {b"data": np.zeros((0, datasets.PIXELS), np.uint8), b"labels": []},
    "labels that are an array of objects": {b"labels": np.array([None] * COUNT, object)},
    "objects": {b"data": np.array([None] * COUNT, object)},
}


@pytest.mark.quick
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_batches(change):
    data = pickle.dumps(batch(np.random.default_rng(0)) | change)
    with pytest.raises(ValueError, match="^hostile: expected"):
        datasets._decode_python(data, "hostile")


@pytest.mark.quick
@pytest.mark.parametrize("call", [b"cos\nsystem\n(S'exit'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"c__main__\nmain\n."])
def test_nothing_else_is_called(call):
    with pytest.raises(ValueError, match="refusing to load"):
        datasets._decode_python(call, "hostile")


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "tar": bytes}


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def binary_files(rng):
    names = [*datasets.TRAIN_BATCHES, datasets.TEST_BATCH]
    records = lambda: np.concatenate([rng.integers(0, 10, (1, 1)), rng.integers(0, 256, (1, datasets.PIXELS))], 1)
    return {f"{name}.bin": records().astype(np.uint8).tobytes() for name in names}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_damaged_archives(kind, tmp_path):
    """Compressed ones have checksums, so that what is loaded is what was written."""
    rng, path = np.random.default_rng(1), tmp_path / "mine.archive"
    whole = COMPRESSORS[kind](tar_of(binary_files(rng)))
    path.write_bytes(whole)
    truth = datasets.load("cifar10", path)
    for _ in range(ARCHIVES // len(COMPRESSORS)):
        path.write_bytes(mutated(whole, rng, hot=len(whole) // 2))
        try:
            found = datasets.load("cifar10", path)
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            continue
        if kind != "tar":
            assert all((a == b).all() for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_damage_behind_the_last_member_is_noticed(kind, tmp_path):
    """The archive's reader stops before it. The last bytes are the checksum."""
    whole = bytearray(COMPRESSORS[kind](tar_of(binary_files(np.random.default_rng(2)))))
    whole[-8 if kind == "gz" else -9 if kind == "xz" else -5] ^= 255
    path = tmp_path / "mine.archive"
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="readable tar archive"):
        datasets.load("cifar10", path)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_CONTENT", 2**20)
    path = tmp_path / "mine.tar.gz"
    path.write_bytes(gzip.compress(tar_of(binary_files(np.random.default_rng(3)) | {"filler": bytes(2**22)})))
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        datasets.load("cifar10", path)


@pytest.mark.parametrize(
    "labels", [[1, 2, 3], np.array([1, 2, 3]), np.array([1, 2, 3], ">i4")], ids=["list", "int64", ">i4"]
)
@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.quick
def test_pickles_of_every_protocol(protocol, labels):
    change = {b"labels": labels, b"data": np.asfortranarray(batch(np.random.default_rng(0))[b"data"])}
    images, found = datasets._decode_python(pickle.dumps(change, protocol=protocol), "whole")
    assert list(found) == [1, 2, 3]
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(COUNT, -1), change[b"data"])
