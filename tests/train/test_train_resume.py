"""A run that is stopped, killed or damaged in any way ends as one that never was."""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import train_run
from conftest import THOROUGH, count_trials, small_disk, trial

for package in ("flax", "orbax.checkpoint", "rich", "tyro", "sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="the trainer needs the extra [train]")
sys.path.insert(0, str(train_run.TRAIN))

import checkpoint  # noqa: E402
import cifar  # noqa: E402
import datasets  # noqa: E402
import loop  # noqa: E402
import options  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import safetensors.numpy  # noqa: E402

# Without a constraint a run starts in half the time, which counts where there are hundreds.
LONG = ("--epochs", 30, *(("--constraint", "none") if THOROUGH else ()))
PER_EPOCH = 22


def outcome(folder: Path) -> dict:
    """What must not depend on interruptions: the last checkpoint's digest, the weights, the metrics less timings."""
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": int(last.name),
        "sha256": json.loads((last / "run" / "metadata").read_text())["sha256"],
        "weights": (folder / "params.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if k not in record.TIMINGS} for row in rows],
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return train_run.cache_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    """The outcome of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_run.run(cache, "--out-dir", folder, *LONG)
    result = outcome(folder)
    assert result["step"] == PER_EPOCH * LONG[1] and len(result["metrics"]) == LONG[1]
    return result


def start(cache, *options):
    return subprocess.Popen(
        train_run.command(*options),
        env=train_run.environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process, folder, condition):
    """Waits for ``condition(folder)``; False if the process has ended before."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        if condition(folder):
            return True
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return False


@pytest.mark.slow
def test_stopped_and_continued_to_the_same_bits(tmp_path, monkeypatch):
    """In this process: 8 steps, then the same command again, against one that was never stopped."""
    monkeypatch.setattr(report, "norms", lambda *args: {})
    monkeypatch.setattr(report, "plot_spectra", lambda *args: None)
    config = cifar.Config(width=2, batch_size=64, max_norm=0.5, every=3, epochs=1)
    for folder, stops in (("one", [None]), ("two", [8, None])):
        for max_steps in stops:
            cifar.main(dataclasses.replace(config, out_dir=tmp_path / folder, max_steps=max_steps))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    assert outcome(tmp_path / "one")["step"] == PER_EPOCH
    kernel = safetensors.numpy.load_file(tmp_path / "two" / "params.safetensors")["params/stem/kernel"]
    assert 0.4 < oracle.dense_singular_values(kernel, (8, 8), padding="SAME")[0] <= 0.5


def being_saved(folder):
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any("tmp" in name for name in os.listdir(checkpoints))


def asked_for(kind, wanted, kill, finish):
    """Kills runs until so many kills are done, up to five in one run; each run ends as if it had not been."""
    done = 0
    for _ in range(wanted + 10):
        killed = 0
        while killed < min(5, wanted - done) and kill(killed):
            killed += 1
            count_trials(kind, tried=1)
        finish()
        count_trials(kind, held=killed)
        done += killed
        if done == wanted:
            return
    raise AssertionError(f"{done} kills came in time, {wanted} were wanted")


@pytest.mark.attack
@pytest.mark.slow
@pytest.mark.timeout(1800 if THOROUGH else 300)
@pytest.mark.parametrize("moment", ["any", "saving"])
def test_killed(moment, cache, undisturbed, tmp_path):
    """SIGKILL at random moments after the start, or a few milliseconds into a save, which then stays half written."""
    rng = random.Random(moment)

    def kill(killed):
        for attempt in range(10):  # until one hits a save
            process = start(cache, "--out-dir", tmp_path, *LONG)
            assert process.stdout is not None
            if moment == "any":
                assert "ResNet-8" in process.stdout.readline()
                time.sleep(rng.uniform(0, 3))
            else:
                for _ in range(rng.randrange(1, 4)):
                    until(process, tmp_path, lambda folder: not being_saved(folder))
                    until(process, tmp_path, being_saved)
                time.sleep(0 if attempt else rng.uniform(0, 0.05))
            process.kill()
            output = process.communicate()[0]
            assert process.returncode in (0, -signal.SIGKILL), output
            if process.returncode == 0:  # a fast machine was done before
                return False
            if moment == "any" or being_saved(tmp_path):
                return True
        raise AssertionError("no kill came during a save")

    def finish():
        train_run.run(cache, "--out-dir", tmp_path, *LONG)
        assert outcome(tmp_path) == undisturbed
        shutil.rmtree(tmp_path)

    asked_for(f"kills of the trainer, {moment}", 40 if THOROUGH else 2, kill, finish)


@pytest.mark.attack
@pytest.mark.slow
@pytest.mark.timeout(1800 if THOROUGH else 300)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), *([(signal.SIGINT, 130)] if THOROUGH else [])])
def test_asked_to_stop(number, code, cache, undisturbed, tmp_path):
    """It saves and says so; the same command goes on from there."""
    rng, options = random.Random(0), ("--out-dir", tmp_path, *LONG, "--save-every", 1000)
    metrics, steps = tmp_path / "metrics.jsonl", []

    def kill(killed):
        before = metrics.stat().st_size if killed else 0
        process = start(cache, *options)
        if not until(process, tmp_path, lambda _: metrics.exists() and metrics.stat().st_size > before):
            return False
        time.sleep(rng.uniform(0, 0.1) if THOROUGH else 0)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        if process.returncode == 0:  # it was in its last step
            return False
        assert process.returncode == code, output
        if killed:
            assert f"continuing from the checkpoint of step {steps[-1]}" in output
        steps.append(int(re.search(r"asked to stop: saved at step ([\d,]+)", output)[1].replace(",", "")))
        assert str(steps[-1]) in os.listdir(tmp_path / "checkpoints")
        return True

    def finish():
        for step in (steps[-1], undisturbed["step"]):
            output = train_run.run(cache, "--out-dir", tmp_path, *LONG)
            assert f"continuing from the checkpoint of step {step}" in output
            assert outcome(tmp_path) == undisturbed
            if THOROUGH and steps != steps[:1]:
                break
        shutil.rmtree(tmp_path)

    asked_for(f"kills of the trainer, {number.name}", 40 if THOROUGH and code == 143 else 1, kill, finish)


@pytest.mark.attack
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10 if THOROUGH else 1))
def test_full_disk(seed, cache, undisturbed, tmp_path):
    """On a small tmpfs: a clear error, the last checkpoint intact; with more room the same command goes on."""
    size, margin = (420 + 60 * seed, "-1000000") if seed % 2 == 0 else (2500 + 60 * seed, None)
    with small_disk(tmp_path, f"{size}k") as grow, trial("full disks: the trainer"):
        keep = ("--out-dir", tmp_path, *LONG, "--keep", 100)
        output = train_run.run(cache, *keep, code=1, **({"CHECKPOINT_MARGIN": margin} if margin else {}))
        error = next(line for line in output.splitlines() if line.startswith("error: "))
        assert re.search(
            r"error: .*expected to save a checkpoint of step \d+, got .*(free, where|No space left)", error
        )
        step = int(re.search(r"That of step (\d+) is intact", error)[1])
        assert margin or "Traceback" not in output
        grow("100m")
        output = train_run.run(cache, *keep)
        assert f"continuing from the checkpoint of step {step}" in output
        assert outcome(tmp_path) == undisturbed


@pytest.mark.attack
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_in_one_folder(cache, undisturbed, tmp_path):
    """At once: one trains as if it were alone, the other is told."""
    for number in range(8 if THOROUGH else 1):
        with trial("races: two runs, one folder"):
            folder = tmp_path / str(number)
            runs = [start(cache, "--out-dir", folder, *LONG) for _ in range(2)]
            outputs = [run.communicate(timeout=120)[0] for run in runs]
            assert sorted(run.returncode for run in runs) == [0, 1], outputs
            (loser,) = (output for run, output in zip(runs, outputs) if run.returncode)
            assert "error: " in loser and "no other run is using" in loser and "Traceback" not in loser
            assert outcome(folder) == undisturbed


# --- one checkpoint -----------------------------------------------------------------------------------------------


def small_state(step=0):
    params = {"conv": {"kernel": jnp.arange(36.0).reshape(3, 3, 2, 2) + step}}
    tx = loop.optimizer("sgd", 0.1, 0.0, None, None)
    return loop.TrainState(params, {}, tx.init(params), jnp.int32(step), jax.random.key(7))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(checkpoint.plain_tree(a)), jax.tree.leaves(checkpoint.plain_tree(b))):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, of which two are kept."""
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, small_state(step), {"step": step, "half": 0.1})
    assert checkpoints.steps() == [3, 2]
    checkpoints.close()
    return tmp_path / "checkpoints"


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder):
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[:-5])


def empty(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def other_values(folder):
    """Well formed, but not what was saved."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "2" / "state", folder / "state")


DAMAGES = {
    "a bit": flip_a_bit,
    "cut": cut,
    "emptied": empty,
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no position": lambda folder: shutil.rmtree(folder / "run"),
    "position cut": lambda folder: (folder / "run" / "metadata").write_text('{"step": 3, "sha'),
    "another's state": other_values,
    "nothing left": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


def test_newest_is_restored(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    state, run = checkpoints.restore(small_state(), print)
    equal(state, small_state(3))
    assert run["step"] == 3 and run["half"] == 0.1
    checkpoints.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_falls_back(damage, saved):
    DAMAGES[damage](saved / "3")
    said = []
    checkpoints = checkpoint.Checkpoints(saved)
    state, run = checkpoints.restore(small_state(), said.append)
    equal(state, small_state(2))
    assert run["step"] == 2
    assert f"{saved / '3'} is damaged" in said[0] and said[1] == "falling back to the checkpoint of step 2"
    assert (saved.parent / "damaged-checkpoint-3").is_dir()
    checkpoints.save(3, small_state(3), {"step": 3})  # its number is free again
    equal(checkpoints.restore(small_state(), said.append)[0], small_state(3))
    checkpoints.close()


def test_all_damaged(saved):
    for step in (2, 3):
        cut(saved / str(step))
    checkpoints = checkpoint.Checkpoints(saved)
    with pytest.raises(ValueError, match="a checkpoint that can be read, got none.*step 3.*step 2.*--resume never"):
        checkpoints.restore(small_state(), print)
    assert (saved / "3").is_dir()
    checkpoints.close()


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="expected a folder to keep checkpoints in"):
        checkpoint.Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_whole_state_comes_back(seeds, tmp_path):
    """With batch statistics and a projection's dual variables; and without this code, as nested dictionaries."""
    import orbax.checkpoint as ocp

    config = options.resolve(cifar.Config(width=2, constraint="project", seeds=seeds, out_dir=tmp_path))
    _, state = cifar.prepare(config, datasets.digits())
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, state, {})
    found, _ = checkpoints.restore(jax.tree.map(jnp.copy, state), print)
    equal(found, state)
    checkpoints.close()
    with ocp.StandardCheckpointer() as reader:
        plain = reader.restore(tmp_path / "checkpoints" / "0" / "state")
    assert set(plain) == {"params", "batch_stats", "opt_state", "step", "key"}
    np.testing.assert_array_equal(plain["params"]["stem"]["kernel"], state.params["stem"]["kernel"])
    assert plain["params"]["stem"]["kernel"].ndim == (4 if seeds == 1 else 5) and plain["step"].shape == ()


# --- the folder ---------------------------------------------------------------------------------------------------


def rewritten(name, change):
    """A run's folder with one array of its weights changed."""

    def damage(folder):
        weights = safetensors.numpy.load_file(folder / "params.safetensors")
        weights[f"params/{name}"] = change(weights[f"params/{name}"])
        safetensors.numpy.save_file(weights, folder / "params.safetensors")

    return damage


def without(folder):
    weights = safetensors.numpy.load_file(folder / "params.safetensors")
    del weights["params/stem/kernel"]
    safetensors.numpy.save_file(weights, folder / "params.safetensors")


def said(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


HOSTILE_RUNS = {  # name: (damage, message)
    "a deep configuration": (said(b"[" * 100_000), "config.json: expected JSON"),
    "a configuration in no text": (said(b"\xff\xfe{}"), "config.json: expected JSON"),
    "a list for a configuration": (said(b"[]"), "config.json: expected a JSON object, got a list"),
    "an endless number": (said(b'{"depth": 1' + b"0" * 5000 + b"}"), "config.json: expected JSON"),
    "a depth in words": (said(b'{"depth": "eight"}'), "depth to be one of int or NoneType, got 'eight'"),
    "a number for a folder": (said(b'{"data_dir": 3}'), "data_dir to be one of Path or NoneType, got 3"),
    "another network": (said(b'{"dataset": "digits", "depth": 8, "width": 4, "batch_norm_momentum": 0.9}'), "weights of the network"),
    "no weights": (lambda folder: (folder / "params.safetensors").write_bytes(b""), "weights that can be read"),
    "an array less": (without, r"\['params'\]\['stem'\]\['kernel'\]: .*, got none"),
    "another shape": (rewritten("stem/kernel", lambda a: a[:2].copy()), "got \\(2, 3, 1, 2\\)"),
    "another type": (rewritten("stem/kernel", lambda a: a.astype(np.int8)), "got .* int8"),
    "one array in a stack": (rewritten("stem/kernel", lambda a: a[None]), "weights of the network"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was not trained."""
    folder = tmp_path_factory.mktemp("finished")
    config = options.resolve(cifar.Config(width=2, constraint="none", out_dir=folder))
    _, state = cifar.prepare(config, datasets.digits())
    report.save_json(folder / "config.json", options.plain(config))
    report.save_params(folder / "params.safetensors", state.params, state.batch_stats)
    assert 0 < cifar.main(cifar.Config(evaluate_only=folder / "params.safetensors"))["test_error"] <= 1
    return folder


@pytest.mark.attack
@pytest.mark.parametrize("name", HOSTILE_RUNS)
@trial("hostile files")
def test_hostile_runs(name, finished, tmp_path):
    """What --evaluate-only says of another's folder."""
    damage, message = HOSTILE_RUNS[name]
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        cifar.main(cifar.Config(evaluate_only=folder / "params.safetensors"))
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\ntwo\nthr")
    with record.open_at(path, 4) as file:
        file.write("zwei\n")
    assert path.read_text() == "one\nzwei\n"
    with pytest.raises(ValueError, match="expected the 400 bytes that the checkpoint goes with, got 9"):
        record.open_at(path, 400)


def test_position_survives_json(tmp_path):
    loss = np.float32(0.1)
    first = record.Record(tmp_path, None)
    first.add(3, loss, np.float32(0.7), 0.5, True)
    position = json.loads(json.dumps(first.position(3)))
    first.close()
    second = record.Record(tmp_path, position)
    second.add(1, np.float32(0.3), np.float32(0.2), 0.5, True)
    row = second.end_epoch({"epoch": 1, "step": 4}, 0.25, 10)
    second.close()
    assert row["train_loss"] == (3 * float(loss) + float(np.float32(0.3))) / 4
    assert row["seconds"] == 1 and row["images_per_second"] == 40 and second.timed == [4, 1.0]


def test_another_configuration_is_refused(tmp_path):
    config = options.resolve(cifar.Config(width=2, out_dir=tmp_path))
    cifar.open_folder(config).close()
    same = options.resolve(cifar.Config(width=2, out_dir=tmp_path, keep=5, max_steps=3))
    cifar.check_folder(same)
    other = options.resolve(cifar.Config(width=4, seed=1, out_dir=tmp_path))
    with pytest.raises(ValueError, match="width is 2 there and 4 here, seed is 0 there and 1 here.*--resume never"):
        cifar.main(other)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint for --resume must, got none"):
        cifar.main(options.resolve(cifar.Config(width=2, out_dir=tmp_path, resume="must")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        cifar.main(other)


def test_a_checkpoint_knows_whose_it_is(tmp_path):
    """Without config.json too: another configuration, other data, or a checkpoint that says nothing."""
    small = {"width": 2, "epochs": 1, "max_steps": 2, "constraint": "none", "out_dir": tmp_path}
    config = options.resolve(cifar.Config(**small))
    owner = {"config": options.identity(config), "data": "a" * 64}
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, small_state(1), {"step": 1, "owner": owner})
    restore = lambda config, owner: checkpoints.restore(
        small_state(), print, functools.partial(cifar.check_owner, config, owner)
    )
    equal(restore(config, owner)[0], small_state(1))
    with pytest.raises(ValueError, match="learning_rate is 0.1 there and 0.2 here"):
        restore(dataclasses.replace(config, learning_rate=0.2), owner)
    with pytest.raises(ValueError, match="data set that its checkpoint was trained on"):
        restore(config, {**owner, "data": "b" * 64})
    checkpoints.save(2, small_state(2), {"step": 2})
    with pytest.raises(ValueError, match="does not say of which run it is"):
        restore(config, owner)


def test_one_run_a_folder(tmp_path):
    with cifar.locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="no other run is using"), cifar.locked(tmp_path / "run"):
            pass
    script = f"import sys, time; sys.path.insert(0, {str(train_run.TRAIN)!r}); import cifar, pathlib\n"
    script += (
        f"with cifar.locked(pathlib.Path({str(tmp_path / 'run')!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(train_run.TRAIN.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="no other run is using"), cifar.locked(tmp_path / "run"):
            pass
        process.kill()  # SIGKILL: the system gives the lock back
    with cifar.locked(tmp_path / "run"):
        pass


def test_an_old_run_that_cannot_be_deleted_is_an_error(saved, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        cifar.open_folder(options.resolve(cifar.Config(width=2, out_dir=saved.parent, resume="never")))


def test_never_discards(saved):
    config = options.resolve(cifar.Config(width=2, out_dir=saved.parent, resume="never"))
    checkpoints = cifar.open_folder(config)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_the_default_folder_is_the_runs_own():
    names = {
        options.resolve(cifar.Config(**o)).out_dir for o in ({}, {"seed": 1}, {"constraint": "none"}, {"width": 4})
    }
    assert len(names) == 4
    assert options.resolve(cifar.Config(keep=7, max_steps=3)).out_dir == options.resolve(cifar.Config()).out_dir
    config = options.resolve(cifar.Config(data_dir=Path("data")))
    assert options.load(json.loads(json.dumps(options.plain(config)))) == config
