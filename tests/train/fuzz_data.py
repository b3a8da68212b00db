"""CIFAR-10 in its official forms, small; and damaged or hostile in many ways.

``python fuzz_data.py KIND SEED COUNT`` loads COUNT damaged ones in a process of its own, with 2 GiB of memory and under
watch, and prints what came of them.
"""

import collections
import io
import json
import pickle
import re
import resource
import struct
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))

import datasets  # noqa: E402

COUNT = 6
NAMES = [*datasets.TRAIN_BATCHES, datasets.TEST_BATCH]
COMPRESSIONS = ("", "gz", "bz2", "xz")


def batch(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (COUNT, 3072)).astype(np.uint8), rng.integers(0, 10, COUNT).astype(np.uint8)


def binary_files():
    return {
        f"{name}.bin": np.concatenate([labels[:, None], pixels], 1).tobytes()
        for name, (pixels, labels) in ((name, batch(n)) for n, name in enumerate(NAMES))
    }


def pickled(seed, protocol=2, **changes):
    """A python batch, with some of its entries replaced."""
    pixels, labels = batch(seed)
    content = {"data": pixels, "labels": [int(v) for v in labels], "batch_label": b"x"} | changes
    return pickle.dumps({name.encode(): value for name, value in content.items()}, protocol)


def python_files(protocol=2):
    return {name: pickled(n, protocol) for n, name in enumerate(NAMES)}


def write_folder(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path, files, compression="gz"):
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def command(module, name, *arguments):
    """Operations that call something with strings."""
    strings = b"".join(b"U" + bytes([len(a)]) + a.encode() for a in arguments)
    return f"c{module}\n{name}\n(".encode() + strings + b"tR"


SNIPPETS = [  # what a fuzzer finds only after a long time
    command("os", "system", "touch /tmp/owned"),
    command("builtins", "exec", "raise SystemExit"),
    command("_codecs", "encode", "x", "rot13"),
    command("numpy", "dtype", "O"),
    b"cnumpy\nndarray\n(K\x05tR",
    b"cnumpy\nndarray\n((J\xff\xff\xff\x7ftU\x01OtR",
    b"r\xff\xff\xff\x3f",  # object number 10^9
    b"\x82\x01",
    b"Pperson\n",
    b"X\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"\x85" * 200,
    b"((((",
    b"0",
    b"R",
    b"b",
    b"s",
    b"}",
    b"]",
    b"N",
    b"I01\n",
    b"I" + b"9" * 5000 + b"\n",
    b"h\x01",
    b".",
]


def mutated(rng, data, snippets=()):
    """Up to three changes: bytes replaced, cut out, doubled, or one of the snippets put in."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        start = int(rng.choice([rng.integers(len(data) + 1), rng.integers(min(len(data), 200) + 1)]))
        end = start + int(rng.choice([1, 2, 8, 600]))
        match rng.choice(["flip", "flip", "cut", "double", "end", "snippet"]):
            case "flip" if start < len(data):
                data[start] ^= 1 << int(rng.integers(8))
            case "cut":
                del data[start:end]
            case "double":
                data[start:start] = data[start:end]
            case "end":
                del data[max(start, len(data) - 3000) :]
            case "snippet" if snippets:
                data[start:start] = snippets[rng.integers(len(snippets))]
    return bytes(data)


def huge_array():
    return command("numpy", "ndarray")[:-2] + b"J\xff\xff\xff\x7ftR."


BOMBS = {  # pickles that take far more memory than they have bytes, or more stack
    "object number 10^9": lambda: b"\x80\x02}r\xff\xff\xff\x3f.",
    "an array of 2^31": huge_array,
    "bytes of 2^62": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "a key of nested tuples": lambda: b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns.",
    "nested lists": lambda: b"\x80\x02" + b"]" * 900_000 + b"a" * 899_999 + b".",
    "many dictionaries": lambda: b"\x80\x02(" + b"}" * 40_000_000 + b"l.",
    "many encodings": lambda: (
        b"\x80\x02]q\x00(X"
        + struct.pack("<I", 10**7)
        + b"x" * 10**7
        + b"q\x010"
        + b"c_codecs\nencode\nq\x02h\x01U\x06latin1\x86q\x030"
        + b"h\x02h\x03R" * 1000
        + b"e."
    ),
    "a state of objects": lambda: (
        b"\x80\x02cnumpy\nndarray\n)R(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\nU\x01O\x85R\x89]tb."
    ),
}


def watch():
    """Ends the process if anything is run, changed or fetched."""
    "".encode("raw_unicode_escape")  # imported at its first use, by pickletools
    forbidden = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "subprocess",
        "socket",
        "exec",
        "import",
        "ctypes",
    )

    def hook(event, arguments):
        writes = event == "open" and any(c in str(arguments[1]) for c in "wax+") and "test_batch" not in str(arguments)
        if event.startswith(forbidden) or writes and "damaged" not in str(arguments[0]):
            print(f"{event} {arguments}"[:300], flush=True)
            sys.exit(3)

    sys.addaudithook(hook)


def load(path):
    """The data set, None where it is refused as documented; any other exception goes on."""
    try:
        return datasets.load("cifar10", path)
    except (ValueError, FileNotFoundError) as error:
        if len(str(error)) > 1000 or not str(error).isprintable():
            raise AssertionError(str(error)[:2000]) from error
        return None


def sound(data):
    """Whether a data set is one."""
    return all(
        images.shape[1:] == (32, 32, 3)
        and images.dtype == np.uint8
        and labels.shape == images.shape[:1]
        and labels.max() <= 9
        for images, labels in (data[:2], data[2:])
    )


def fuzz_pickles(seed, count, folder):
    rng = np.random.default_rng(seed)
    files = {protocol: python_files(protocol) for protocol in (2, 3, 4)}
    where = write_folder(folder / "batches", files[2])
    for _ in range(count):
        original = files[int(rng.choice([2, 3, 4]))]["test_batch"]
        (where / "test_batch").write_bytes(mutated(rng, original, SNIPPETS))
        yield load(where), None


def fuzz_archives(seed, count, folder):
    """A checksum that holds means the undamaged data; a plain tar has none of its contents."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        files = [binary_files, python_files][n % 2]()
        compression = COMPRESSIONS[n // 2 % len(COMPRESSIONS)]
        path = write_archive(folder / "damaged.tar", files, compression)
        whole = load(path)
        data = mutated(rng, path.read_bytes())
        path.write_bytes(data)
        yield load(path), whole if compression else None


def bombs(seed, count, folder):
    where = write_folder(folder / "batches", python_files())
    for name in list(BOMBS)[seed : seed + count]:
        (where / "test_batch").write_bytes(BOMBS[name]())
        found = load(where)
        assert found is None, name
        yield found, None


KINDS = {"pickles": fuzz_pickles, "archives": fuzz_archives, "bombs": bombs}

if __name__ == "__main__":
    kind, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    came = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, (found, wanted) in enumerate(KINDS[kind](seed, count, Path(folder))):
            if number == 0:
                watch()  # what the first loads import is their own
            if found is not None:
                assert sound(found)
                assert wanted is None or all(np.array_equal(a, b) for a, b in zip(found, wanted)), number
            came["refused" if found is None else "loaded"] += 1
    status = Path("/proc/self/status")  # getrusage's peak is also that of the process before
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) if status.exists() else 0
    print(json.dumps({**came, "peak": peak}))
