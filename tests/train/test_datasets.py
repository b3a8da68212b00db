"""The data: every official form is read, everything else is refused in one line, and nothing of it is executed."""

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import fuzz_data
import numpy as np
import pytest
from conftest import THOROUGH, count_trials, trial
from fuzz_data import COUNT, batch, binary_files, datasets, pickled, python_files, write_archive, write_folder

pytest.importorskip("sklearn", reason="the trainer needs the extra [train]")


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("form", ["folder", "parent", *(f"archive {c}".strip() for c in fuzz_data.COMPRESSIONS)])
def test_every_official_form(kind, form, tmp_path):
    files = binary_files() if kind == "binary" else python_files()
    if form.startswith("archive"):
        where = write_archive(tmp_path / "mine", files, form.removeprefix("archive").strip())
    else:
        where = write_folder(tmp_path / f"cifar-10-batches-{kind[:3] if kind == 'binary' else 'py'}", files)
        where = where.parent if form == "parent" else where
    check_data(datasets.load("cifar10", where))


def check_data(data):
    assert data.train_images.shape == (5 * COUNT, 32, 32, 3) and data.test_images.shape == (COUNT, 32, 32, 3)
    pixels, labels = batch(5)
    np.testing.assert_array_equal(data.test_images[2, 3, 4], pixels[2].reshape(3, 32, 32)[:, 3, 4])
    np.testing.assert_array_equal(data.test_labels, labels)
    assert data.test_labels.dtype == np.int32


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_every_protocol(protocol, tmp_path):
    """With as many labels and names as a batch has in truth."""
    names = [f"{number}.png".encode() for number in range(20_000)]
    files = python_files(protocol) | {
        "test_batch": pickled(5, protocol, filenames=names[:10_000], batch_label=names[10_000:])
    }
    check_data(datasets.load("cifar10", write_folder(tmp_path / "data", files)))


def test_pickles_as_python_2_wrote_them(tmp_path):
    """The official ones: byte strings, and names of an older NumPy."""
    files = python_files()
    pixels, labels = batch(5)
    files["test_batch"] = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x04testq\x03U\x06labelsq\x04]q\x05("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        + b"(K\x01K\x06M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x48\x00\x00"
        + pixels.tobytes()
        + b"tbu."
    )
    check_data(datasets.load("cifar10", write_folder(tmp_path / "data", files)))


class Attack:
    def __reduce__(self):
        return print, ("run by a pickle",)


def broken(change, kind="binary"):
    def make(tmp_path):
        files = binary_files() if kind == "binary" else python_files()
        change(files)
        return write_folder(tmp_path / "data", files)

    return make


def one_batch(data):
    """A folder of which one batch is this."""
    return broken(lambda files: files.update(test_batch=data), "python")


def changed(**changes):
    return one_batch(pickled(5, **changes))


def altered(change, files=binary_files, compression="gz"):
    """An archive of which the bytes were changed."""

    def make(tmp_path):
        path = write_archive(tmp_path / "mine", files(), compression)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def official_name(tmp_path):
    write_archive(tmp_path / "cifar-10-binary.tar.gz", binary_files())
    return tmp_path


def packed(*members):
    """A gzipped tar of members: the type, the size in the header, and the MiB that follow it."""

    def make(tmp_path):
        path = tmp_path / "mine.tar.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            for kind, size, written in members:
                info = tarfile.TarInfo("cifar-10-batches/data_batch_1.bin")
                info.type, info.size = kind, size
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                for _ in range(written):
                    file.write(bytes(2**20))
        return path

    return make


def instead(make):
    """Something that is no file in the place of a batch."""

    def folder(tmp_path):
        files = binary_files()
        del files["test_batch.bin"]
        make(write_folder(tmp_path / "data", files) / "test_batch.bin")
        return tmp_path / "data"

    return folder


def twice(tmp_path):
    path = write_archive(tmp_path / "mine.tar", binary_files(), "")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("again/data_batch_1.bin"), io.BytesIO())
    return path


first, pixels, labels = "data_batch_1.bin", batch(5)[0], [1] * COUNT
LABELS = "a list of labels, ints from 0 to 9"
PIXELS = r"uint8 data of shape \(N, 3072\)"
BAD_DATA = {
    "nothing there": (lambda path: path, FileNotFoundError, "cifar-10-batches-bin.*none of them in.*--download"),
    "a batch missing": (broken(lambda f: f.pop(first)), FileNotFoundError, r"missing \['data_batch_1.bin'\]"),
    "truncated": (broken(lambda f: f.update({first: f[first][:-1]})), ValueError, "records of 3073 bytes.*truncated"),
    "a record less": (broken(lambda f: f.update({first: f[first][3073:]})), ValueError, "batches of equal size"),
    "empty file": (broken(lambda f: f.update({first: b""})), ValueError, "records of 3073 bytes.*got 0 bytes"),
    "label out of range": (broken(lambda f: f.update({first: b"\x0b" + f[first][1:]})), ValueError, "from 0 to 9"),
    "a folder for a batch": (instead(os.mkdir), ValueError, "a file, got a folder, a pipe"),
    "a pipe for a batch": (instead(os.mkfifo), ValueError, "a file, got a folder, a pipe"),
    "a device for a batch": (instead(lambda path: path.symlink_to("/dev/zero")), ValueError, "a file, got a folder"),
    "a huge batch": (instead(lambda path: path.touch() or os.truncate(path, 2**40)), ValueError, "at most 67108864"),
    "not a pickle": (one_batch(b"hello"), ValueError, "a pickled CIFAR-10 batch"),
    "an empty pickle": (one_batch(b""), ValueError, "a pickled CIFAR-10 batch"),
    "malicious pickle": (one_batch(pickle.dumps(Attack())), ValueError, "refusing to load builtins.print"),
    "pickle of a list": (one_batch(pickle.dumps([1], 2)), ValueError, "a pickled CIFAR-10 batch, got TypeError"),
    "pickle of a number": (changed(data=3, labels=[]), ValueError, PIXELS),
    "a wrong shape": (changed(data=pixels[:, :-1]), ValueError, PIXELS),
    "one axis": (changed(data=pixels.ravel()), ValueError, PIXELS),
    "a wrong type": (changed(data=pixels.astype(np.int8)), ValueError, PIXELS),
    "objects": (changed(data=pixels.astype(object)), ValueError, "a pickled CIFAR-10 batch|" + PIXELS),
    "a list of pixels": (changed(data=[0] * 3072), ValueError, PIXELS),
    "no images": (changed(data=pixels[:0], labels=[]), ValueError, "images, got none|refusing to load __builtin__.bytes"),
    "labels missing": (changed(labels=[1]), ValueError, "as many labels as images, got 1 and 6"),
    "labels of shape (N, 1)": (changed(labels=[[1]] * COUNT), ValueError, LABELS),
    "labels of shape (N, 1), an array": (changed(labels=np.ones((COUNT, 1), np.uint8)), ValueError, LABELS),
    "labels that are a number": (changed(labels=3), ValueError, LABELS),
    "labels that are text": (changed(labels="123456"), ValueError, LABELS),
    "labels that are a dict": (changed(labels=dict.fromkeys(range(COUNT))), ValueError, LABELS),
    "no labels": (changed(labels=None), ValueError, LABELS),
    "bools": (changed(labels=[True] * COUNT), ValueError, LABELS),
    "floats": (changed(labels=[1.0] * COUNT), ValueError, LABELS),
    "a label of NaN": (changed(labels=[*labels[1:], float("nan")]), ValueError, LABELS),
    "a label of 10": (changed(labels=[*labels[1:], 10]), ValueError, LABELS),
    "a negative label": (changed(labels=[*labels[1:], -1]), ValueError, LABELS),
    "a huge label": (changed(labels=[*labels[1:], 10**300]), ValueError, LABELS),
    **{
        name: (one_batch(make()), ValueError, "a pickled CIFAR-10 batch")
        for name, make in fuzz_data.BOMBS.items()
        if name != "many dictionaries"  # 40 MB; see test_memory_is_bounded
    },
    "altered official archive": (official_name, ValueError, "official archive, SHA-256 c4a3.*corrupted or altered"),
    "truncated archive": (altered(lambda data: data[:-2000]), ValueError, "readable tar archive"),
    "a checksum's last byte": (altered(lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]), ValueError, "CRC"),
    "damage after the last member, gz": (altered(lambda data: data[:-4] + b"abcd"), ValueError, "length|Incorrect"),
    "damage after the last member, xz": (altered(lambda data: data[:-9] + bytes(9), compression="xz"), ValueError, "readable"),
    "damage after the last member, bz2": (altered(lambda data: data[:-1], compression="bz2"), ValueError, "readable"),
    "something after the archive": (altered(lambda data: data + b"x" * 99), ValueError, "readable tar archive"),
    "something after the archive, xz": (altered(lambda data: data + b"x" * 99, compression="xz"), ValueError, "readable"),
    "no archive": (altered(lambda data: b"hello"), ValueError, "readable tar archive"),
    "an empty archive": (altered(lambda data: b""), ValueError, "readable tar archive"),
    "the same batch twice": (twice, ValueError, "two members called data_batch_1.bin"),
    "a member of 1 TB": (packed((tarfile.REGTYPE, 2**40, 1)), ValueError, "members under 67108864 bytes"),
    "a name of 200 MB": (packed((tarfile.GNUTYPE_LONGNAME, 200 * 2**20, 200)), ValueError, "members under 1048576 bytes"),
    "a header of 200 MB": (packed((tarfile.XHDTYPE, 200 * 2**20, 200)), ValueError, "members under 1048576 bytes"),
    "a bomb": (packed((tarfile.REGTYPE, 2**28, 257)), ValueError, "more than 268435456 bytes"),
}  # fmt: skip


@pytest.mark.attack
@pytest.mark.parametrize("name", BAD_DATA)
@trial("hostile files")
def test_bad_data(name, tmp_path, capsys):
    make, error, message = BAD_DATA[name]
    with pytest.raises(error, match=message) as caught:  # one line: no (?s)
        datasets.load("cifar10", make(tmp_path))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert "run by a pickle" not in capsys.readouterr().out


def fuzz(kind, seed, count):
    """What became of so many, in a process with little memory that is watched for what it runs."""
    command = [sys.executable, fuzz_data.__file__, kind, str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    came = json.loads(done.stdout)
    assert came["peak"] < 2**19 and came["refused"] + came.get("loaded", 0) == count  # KiB
    return came


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind, each", [("pickles", 250 if THOROUGH else 25), ("archives", 64 if THOROUGH else 8)])
def test_random_damage(kind, each, seed):
    """The undamaged data where there is a checksum, a ValueError, or FileNotFoundError for a batch that is not found."""
    count_trials(f"damaged {kind}, data", tried=each)
    came = fuzz(kind, seed, each)
    count_trials(f"damaged {kind}, data", held=each)
    assert came["refused"] > each / 4


def test_memory_is_bounded():
    """Of pickles that ask for a thousand times their size."""
    fuzz("bombs", 0, len(fuzz_data.BOMBS))


def test_the_watch_notices():
    """What is executed, written or fetched ends the process that loads."""
    for deed in ("os.system('true')", "open('/tmp/x', 'w')", "import wave", "exec('1')"):
        script = f"import os, fuzz_data; fuzz_data.watch(); {deed}"
        folder = os.path.dirname(fuzz_data.__file__)
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 3, deed


def test_oversized_member_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_MEMBER", 100)
    with pytest.raises(ValueError, match="members under 100 bytes"):
        datasets.load("cifar10", write_archive(tmp_path / "mine.tar.gz", binary_files()))


def test_download_is_checked_and_atomic(tmp_path, monkeypatch):
    source = write_archive(tmp_path / "source.tar.gz", binary_files())
    folder = tmp_path / "data"
    with pytest.raises(ValueError, match="(?s)archive of SHA-256 c4a3.*Nothing was kept"):
        datasets.cifar10(folder, download=True, url=source.as_uri())
    assert list(folder.iterdir()) == []
    monkeypatch.setitem(datasets.SHA256, "cifar-10-binary.tar.gz", hashlib.sha256(source.read_bytes()).hexdigest())
    data = datasets.cifar10(folder, download=True, url=source.as_uri())
    assert len(data.train_images) == 5 * COUNT
    assert [path.name for path in folder.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_digits():
    data = datasets.load("digits")
    assert len(data.train_images) + len(data.test_images) == 1797 and data.train_images.max() == 255
    assert np.bincount(data.test_labels).min() > 30
    with pytest.raises(ValueError, match="'digits' or 'cifar10', got 'mnist'"):
        datasets.load("mnist")
