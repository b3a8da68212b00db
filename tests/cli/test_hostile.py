"""Files that were made to do harm, or are merely odd: one line and exit code 2, nothing executed, nothing lost."""

import concurrent.futures
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from conftest import THOROUGH, small_disk, trial

import opnorm_jax as oj
from opnorm_jax._cli.checkpoint import UserError, open_checkpoint
from opnorm_jax._cli.main import main

KERNEL = np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)
DATA = KERNEL.tobytes()
SHAPE = ["--input-shape", "8", "8", "--layout", "HWIO"]


def fails(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        main([*map(str, args)])
    out, err = capsys.readouterr()
    assert info.value.code == 2 and not out and "Traceback" not in err
    assert err.splitlines()[-1].startswith("opnorm: error: ")
    return err.splitlines()[-1]


def archive(path, **members):
    """An archive of raw bytes."""
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            target.writestr(name + ".npy", data)
    return path


def npy(array, **header):
    """The bytes of an array, with parts of its header replaced."""
    file = io.BytesIO()
    if not header:
        np.save(file, array)
        return file.getvalue()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue() + array.tobytes()


def patched(path, flag=None, method=None):
    """An archive whose directory says that it is encrypted, or compressed in a way that nobody knows."""
    data = bytearray(archive(path, kernel=npy(KERNEL)).read_bytes())
    for magic, flags, methods in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        at = data.index(magic)
        if flag is not None:
            data[at + flags : at + flags + 2] = struct.pack("<H", flag)
        if method is not None:
            data[at + methods : at + methods + 2] = struct.pack("<H", method)
    path.write_bytes(data)
    return path


HOSTILE = {
    "encrypted": lambda path: patched(path, flag=1),
    "unknown compression": lambda path: patched(path, method=99),
    "10^11 elements": lambda path: archive(path, kernel=npy(KERNEL, shape=(10**5, 10**5, 10, 1))),
    "10^30 elements": lambda path: archive(path, kernel=npy(KERNEL, shape=(10**15, 10**15, 1, 1))),
    "shorter than it says": lambda path: archive(path, kernel=npy(KERNEL, shape=(3, 3, 2, 5))),
    "longer than it says": lambda path: archive(path, kernel=npy(KERNEL, shape=(3, 3, 2, 3))),
    "a header that never ends": lambda path: archive(path, kernel=b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{"),
    "a header that is no literal": lambda path: archive(path, kernel=b"\x93NUMPY\x01\x00\x10\x00__import__('os')"),
    "a deep header": lambda path: archive(path, kernel=b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000),
    "another version": lambda path: archive(path, kernel=b"\x93NUMPY\x09\x00" + npy(KERNEL)[8:]),
    "no array": lambda path: archive(path, kernel=b"hello"),
    "cut off": lambda path: path.write_bytes(archive(path, kernel=npy(KERNEL)).read_bytes()[:-30]) and path,
    "damaged": lambda path: path.write_bytes(archive(path, kernel=npy(KERNEL)).read_bytes().replace(KERNEL.tobytes()[:9], b"x" * 9)) and path,
    "empty": lambda path: path.write_bytes(b"") or path,
    "a pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.") and path,
    "a single array": lambda path: path.write_bytes(npy(KERNEL)) and path,
}  # fmt: skip


def safetensors(path, data=DATA, size=None, text=None, **entry):
    """A file of one kernel, with parts of its header replaced."""
    header = {"kernel": {"dtype": "F32", "shape": [3, 3, 2, 4], "data_offsets": [0, len(DATA)], **entry}}
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


HOSTILE_SAFETENSORS = {
    "a header of 2^63 bytes": lambda path: safetensors(path, size=2**63),
    "a header of 2^40 bytes": lambda path: safetensors(path, size=2**40),
    "a header shorter than it is": lambda path: safetensors(path, size=20),
    "a header that is no JSON": lambda path: safetensors(path, text=b"{kernel: 1}"),
    "a header that is no text": lambda path: safetensors(path, text=b"\xff\xfe{}"),
    "a deep header": lambda path: safetensors(path, text=b'{"kernel":' * 50_000 + b"1" + b"}" * 50_000),
    "a list for a header": lambda path: safetensors(path, text=b"[]"),
    "the same name twice": lambda path: safetensors(path, text=b'{"k": {}, "k": {}}'),
    "an unknown type": lambda path: safetensors(path, dtype="F128"),
    "10^18 elements": lambda path: safetensors(path, shape=[10**9, 10**9]),
    "more elements than numbers go": lambda path: safetensors(path, shape=[2**63, 2, 1, 1]),
    "a negative size": lambda path: safetensors(path, shape=[-3, -3, 2, 4]),
    "shorter than it says": lambda path: safetensors(path, data=KERNEL.tobytes()[:-1]),
    "longer than it says": lambda path: safetensors(path, data=KERNEL.tobytes() + b"x"),
    "data that end before they begin": lambda path: safetensors(path, data_offsets=[KERNEL.nbytes, 0]),
    "data outside of the file": lambda path: safetensors(path, data_offsets=[2**40, 2**40 + KERNEL.nbytes]),
    "a hole": lambda path: safetensors(path, data=b"1234" + DATA, data_offsets=[4, 4 + KERNEL.nbytes]),
    "empty": lambda path: path.write_bytes(b"") or path,
    "a pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.") and path,
    "zeros": lambda path: path.write_bytes(bytes(1000)) and path,
}
FILES = [("npz", name) for name in HOSTILE] + [("safetensors", name) for name in HOSTILE_SAFETENSORS]


@pytest.mark.attack
@pytest.mark.quick
@pytest.mark.parametrize("suffix, name", FILES)
@trial("hostile files")
def test_hostile_archives(suffix, name, tmp_path, capsys):
    path = (HOSTILE if suffix == "npz" else HOSTILE_SAFETENSORS)[name](tmp_path / f"net.{suffix}")
    message = fails(capsys, "report", path, *SHAPE)
    assert f"not a readable .{suffix} file" in message and len(message) < 500
    fails(capsys, "constrain", path, tmp_path / f"out.{suffix}", "--max-norm", "1", *SHAPE)
    assert os.listdir(tmp_path) == [f"net.{suffix}"]


LAYERS = {
    "a deep list": b"[" * 100_000,
    "a deep dictionary": b'{"kernel": ' * 100_000,
    "no JSON": b"{kernel: 1}",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "a list": b"[]",
    "a number": b"1",
    "a number for a layer": b'{"kernel": 1}',
    "no input shape": b'{"kernel": {"strides": 2}}',
    "an unknown field": b'{"kernel": {"input_shape": [8, 8], "stride": 2}}',
    "a huge stride": b'{"kernel": {"input_shape": [8, 8], "strides": 1' + b"0" * 5000 + b"}}",
    "a stride of NaN": b'{"kernel": {"input_shape": [8, 8], "strides": NaN}}',
    "a stride of true": b'{"kernel": {"input_shape": [8, 8], "strides": true}}',
    "a nested shape": b'{"kernel": {"input_shape": [[8], 8]}}',
    "a negative shape": b'{"kernel": {"input_shape": [-8, 8]}}',
    "another's name": b'{"other": {"input_shape": [8, 8]}}',
}


@pytest.mark.attack
@pytest.mark.quick
@pytest.mark.parametrize("name", LAYERS)
@trial("hostile files")
def test_hostile_layers(name, tmp_path, capsys):
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    (tmp_path / "layers.json").write_bytes(LAYERS[name])
    message = fails(capsys, "report", tmp_path / "net.npz", "--layers", tmp_path / "layers.json")
    assert len(message) < 1000 and message.isprintable()


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_archives_with_random_damage(suffix, seed, tmp_path, capsys):
    """30 for each seed: the numbers of the undamaged file, or one line. A .safetensors file has no checksum."""
    rng = np.random.default_rng(seed)
    path = tmp_path / f"net.{suffix}"
    if suffix == "npz":
        archive(path, kernel=npy(KERNEL), bias=npy(np.ones(4, np.float32)))
    else:
        safetensors(path)
    whole = path.read_bytes()
    main(["report", str(path), *SHAPE, "--json"])
    expected = json.loads(capsys.readouterr().out)["layers"]
    for _ in range(30 if THOROUGH or suffix == "npz" else 10):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            data[rng.integers(len(data) if rng.random() < 0.7 else len(data) - KERNEL.nbytes)] = rng.integers(256)
        path.write_bytes(data)
        with trial("damaged archives, command line"):
            try:
                assert main(["report", str(path), *SHAPE, "--json"]) == 0
                found = json.loads(capsys.readouterr().out)["layers"]
                if suffix == "npz":  # its checksum held
                    assert [row["upper"] for row in found] == [row["upper"] for row in expected]
            except SystemExit as error:
                assert error.code == 2
                assert "Traceback" not in capsys.readouterr().err


def test_a_bomb_is_listed_by_its_header(tmp_path, capsys):
    path = tmp_path / "net.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("kernel.npy", npy(KERNEL))
        with target.open("zeros.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**29,)})
            for _ in range(2**9):
                member.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["report", str(path), *SHAPE, "--json"]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB: half of what it would inflate to


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">f8"])
def test_big_endian_kernels_are_read_and_written(dtype, tmp_path, capsys):
    np.savez(tmp_path / "net.npz", odd_name=KERNEL.astype(dtype))
    assert main(["constrain", str(tmp_path / "net.npz"), str(tmp_path / "out.npz"), "--max-norm", "1", *SHAPE]) == 0
    with np.load(tmp_path / "out.npz") as file:
        assert file["odd_name"].dtype == np.dtype(dtype)
        assert oj.operator_norm_bounds(file["odd_name"].astype(np.float32), oj.Conv((8, 8))).upper <= 1 + 2e-3


def test_narrow_floats_of_any_name_are_an_error(tmp_path, capsys):
    """float8 in a .safetensors file: it is no mask, so it may be a kernel."""
    header = {"mystery": {"dtype": "F8_E4M3", "shape": [3, 3, 2, 4], "data_offsets": [0, 72]}}
    header["kernel"] = {"dtype": "F32", "shape": [3, 3, 2, 4], "data_offsets": [72, 72 + KERNEL.nbytes]}
    text = json.dumps(header).encode()
    path = tmp_path / "net.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(72) + KERNEL.tobytes())
    message = fails(capsys, "constrain", path, tmp_path / "out.safetensors", "--max-norm", "1", *SHAPE)
    assert "mystery" in message and "float32" in message


def test_names_do_not_reach_the_terminal_raw(tmp_path, capsys):
    name = "evil\x1b[2J\n\x9b0m\u202e.kernel"
    np.savez(tmp_path / "net.npz", **{name: KERNEL, "other\x1b[31m": np.ones(3, np.float32)})
    main(["report", str(tmp_path / "net.npz"), *SHAPE])
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not any(ord(c) < 32 and c != "\n" or c in "\x9b\u202e" for c in text)
    assert "evil\\x1b[2J\\n" in out
    main(["report", str(tmp_path / "net.npz"), *SHAPE, "--json"])
    assert json.loads(capsys.readouterr().out)["layers"][0]["path"] == name


def test_names_with_endless_numbers(tmp_path, capsys):
    np.savez(tmp_path / "net.npz", **{f"conv{'1' * 5000}.kernel": KERNEL, "conv2.kernel": KERNEL})
    assert main(["report", str(tmp_path / "net.npz"), *SHAPE, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [row["path"][:6] for row in rows] == ["conv2.", "conv11"]


def test_pipes_are_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.npz")
    assert "pipe" in fails(capsys, "report", tmp_path / "pipe.npz", *SHAPE)
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    assert "pipe" in fails(capsys, "report", tmp_path / "net.npz", *SHAPE, "--layers", tmp_path / "pipe.npz")
    bound = ("--max-norm", "1", "--force")
    assert "pipe" in fails(capsys, "constrain", tmp_path / "net.npz", tmp_path / "pipe.npz", *bound, *SHAPE)


def test_a_bound_that_vanishes(tmp_path, capsys):
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    for bound in ("1e-46", "nan", "inf", "-1", "1e400"):
        fails(capsys, "constrain", tmp_path / "net.npz", tmp_path / "out.npz", "--max-norm", bound, *SHAPE)


def constrained(path):
    """Whether a file is what ``opnorm constrain --max-norm 1`` makes of net.npz, whole."""
    with np.load(path) as file:
        return oj.operator_norm_bounds(file["kernel"], oj.Conv((8, 8))).upper <= 1 + 1e-5


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    args = ["constrain", tmp_path / "net.npz", tmp_path / "out.npz", "--max-norm", "1", *SHAPE]
    real = oj.constrain

    def constrain(*positional, **named):
        (tmp_path / "out.npz").write_text("another's")
        return real(*positional, **named)

    monkeypatch.setattr(oj, "constrain", constrain)
    assert "exists by now" in fails(capsys, *args)
    assert (tmp_path / "out.npz").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["net.npz", "out.npz"]
    assert main([*map(str, args), "--force"]) == 0
    assert constrained(tmp_path / "out.npz")


@pytest.mark.parametrize("links", [True, False])
def test_the_last_moment(links, tmp_path, monkeypatch, capsys):
    """A signal just before the file gets its name: there is no file. File systems without hard links work too."""
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    args = ["constrain", str(tmp_path / "net.npz"), str(tmp_path / "out.npz"), "--max-norm", "1", *SHAPE]

    def fail(error):
        def call(*args, **named):
            raise error

        return call

    if links:
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", fail(SystemExit(143)))
            patch.setattr(os, "replace", fail(SystemExit(143)))
            with pytest.raises(SystemExit):
                main(args)
        assert os.listdir(tmp_path) == ["net.npz"]
    else:
        monkeypatch.setattr(os, "link", fail(PermissionError(1, "Operation not permitted")))
    assert main(args) == 0
    assert constrained(tmp_path / "out.npz")
    (tmp_path / "out.npz").write_text("another's")
    checkpoint = open_checkpoint(tmp_path / "net.npz")
    with pytest.raises(UserError, match="exists by now"):
        checkpoint.write(tmp_path / "out.npz", {}, force=False)
    assert (tmp_path / "out.npz").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["net.npz", "out.npz"]


def ends(*args):
    """The exit code of a call that may be one of several threads'."""
    try:
        return main([*map(str, args)])
    except SystemExit as error:
        return error.code


@pytest.mark.attack
def test_races_for_one_file(tmp_path, capsys):
    """Two calls with one OUT, or a file that appears there at any moment: one wins, the other is told or finds it."""
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    out = tmp_path / "out.npz"
    args = ["constrain", tmp_path / "net.npz", out, "--max-norm", "1", *SHAPE]
    assert ends(*args) == 0  # what is compiled is compiled
    began = time.perf_counter()
    assert ends(*args, "--force") == 0
    usual, rng = time.perf_counter() - began, np.random.default_rng(0)

    def appear(delay):
        time.sleep(delay)
        try:
            with open(out, "x") as file:
                file.write("another's")
        except FileExistsError:
            return 2
        return 0

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(20 if THOROUGH else 3):
            with trial("races: two calls, one OUT"):
                out.unlink()
                codes = [call.result() for call in (pool.submit(ends, *args), pool.submit(ends, *args))]
                assert sorted(codes) == [0, 2] and constrained(out)
            with trial("races: a file appears at OUT"):
                out.unlink()
                other = pool.submit(appear, rng.uniform(0, 1.2 * usual))
                code = ends(*args)
                assert sorted([code, other.result()]) == [0, 2]
                assert constrained(out) if code == 0 else out.read_text() == "another's"
            assert sorted(os.listdir(tmp_path)) == ["net.npz", "out.npz"]


@pytest.mark.attack
@pytest.mark.slow
def test_a_full_disk(tmp_path, capsys):
    """Of any size that is too small: one line, and nothing left behind."""
    np.savez(tmp_path / "net.npz", kernel=KERNEL, other=np.zeros(100_000, np.float32))
    (tmp_path / "disk").mkdir()
    args = ["constrain", tmp_path / "net.npz", tmp_path / "disk" / "out.npz", "--max-norm", "1", *SHAPE]
    rng = np.random.default_rng(0)
    for _ in range(20 if THOROUGH else 3):
        with small_disk(tmp_path / "disk", f"{int(rng.integers(4, 390))}k") as grow:
            with trial("full disks: opnorm constrain"):
                assert "cannot be written" in fails(capsys, *args)
                assert not os.listdir(tmp_path / "disk")
                grow("4m")
                assert main([*map(str, args)]) == 0 and constrained(args[2])


@pytest.mark.attack
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_writing(number, tmp_path):
    """At a random moment between the first byte and the last: the whole file or none; SIGTERM leaves nothing else."""
    np.savez(tmp_path / "net.npz", kernel=KERNEL, other=np.zeros(2**23, np.float32))
    command = [sys.executable, "-m", "opnorm_jax", "constrain", "net.npz", "out.npz", "--max-norm", "1", *SHAPE]
    run = lambda: subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def until_writing(process):
        while process.poll() is None and not any(tmp_path.glob("*.part")):
            time.sleep(0.001)
        return time.perf_counter()

    with run() as process:
        began = until_writing(process)
        assert process.wait(60) == 0
        usual = time.perf_counter() - began
    whole, before = (tmp_path / "out.npz").read_bytes(), (tmp_path / "net.npz").read_bytes()
    rng, early = np.random.default_rng(int(number)), 0
    for _ in range(40 if THOROUGH else 2):
        (tmp_path / "out.npz").unlink(missing_ok=True)
        with trial(f"kills of opnorm constrain by {number.name}"), run() as process:
            until_writing(process)
            time.sleep(rng.uniform(0, usual / 2))  # the second half is what comes after
            process.send_signal(number)
            assert process.wait(60) in (0, -number, 128 + number)
            early += process.returncode != 0
            names = {path.name for path in tmp_path.iterdir()}
            assert "out.npz" not in names or (tmp_path / "out.npz").read_bytes() == whole
            assert (tmp_path / "net.npz").read_bytes() == before
            parts = names - {"net.npz", "out.npz"}
            assert not parts or number == signal.SIGKILL
        for part in parts:
            (tmp_path / part).unlink()
    assert early


@pytest.mark.slow
def test_streams_that_cannot_be_written(tmp_path):
    """A full or a closed stdout, a closed stderr, a terminal without UTF-8."""
    np.savez(tmp_path / "net.npz", **{"größe.kernel": KERNEL})
    command = [sys.executable, "-m", "opnorm_jax", "report", str(tmp_path / "net.npz"), *SHAPE]
    shell = lambda redirection: subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *command], capture_output=True, text=True, errors="replace"
    )
    if os.path.exists("/dev/full"):
        done = shell(">/dev/full")
        assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    done = shell("2>&-")
    assert done.returncode == 0 and "opnorm:" not in done.stdout
    done = shell(">&-")
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    )
    assert done.returncode == 0 and b"gr\\xf6" in done.stdout


@pytest.mark.slow
def test_sigterm_leaves_nothing_behind(tmp_path):
    """While the copy is being written."""
    np.savez(tmp_path / "net.npz", kernel=KERNEL)
    script = (
        "import sys, time, shutil; from opnorm_jax._cli import checkpoint, main\n"
        "real = checkpoint._write_npy\n"
        "def slow(*args):\n    real(*args); print('writing', flush=True); time.sleep(60)\n"
        "checkpoint._write_npy = slow\n"
        "main.main(sys.argv[1:])"
    )
    args = ["constrain", "net.npz", "out.npz", "--max-norm", "1", *SHAPE]
    command = [sys.executable, "-c", script, *args]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob("*.part"))) == 1
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["net.npz"]
