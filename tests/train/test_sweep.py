"""The scripts of section 4.2 and 4.3: members of a stack are the runs they stand for, and nothing is run twice."""

import dataclasses
import json
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

for package in ("flax", "tyro", "sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="the trainer needs the extra [train]")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))

import cifar  # noqa: E402
import curves  # noqa: E402
import datasets  # noqa: E402
import headline  # noqa: E402
import miniature  # noqa: E402
import options  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402

QUIET = Console(quiet=True)
TINY = {"max_norm": (None, 0.5, 1.0), "learning_rate": (0.02, 0.1), "batch_size": (256,), "epochs_per_decay": (1,)}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(sweep.GRIDS, "small", TINY)
    return sweep.Sweep(out_dir=tmp_path / "sweep", phases=2, every=2)


def test_the_papers_grid():
    grid = sweep.groups(sweep.Sweep(grid="paper"))
    members = [tuple(member.values()) for group in grid for member in group]
    assert len(members) == len(set(members)) == 150
    for group in grid:  # one program each
        assert len({(m["batch_size"], m["epochs_per_decay"], m["max_norm"] is None) for m in group}) == 1
    shares = [sweep.share_of(grid, f"{i}/4") for i in range(4)]
    assert sorted(map(str, sum(shares, []))) == sorted(map(str, grid))
    for bad in ("4/4", "-1/2", "x", "1"):
        with pytest.raises(ValueError, match="I/N"):
            sweep.share_of(grid, bad)


@pytest.mark.slow
def test_sweep_and_each_of_its_runs_alone(tiny, monkeypatch, tmp_path):
    """Killed in its second group, it goes on there; at the end a run is what the trainer gives for it alone."""
    original, calls = cifar.end_epoch, []

    def kill_once(run, state, step, record):
        calls.append(run.seeds.count)
        if len(calls) == 3:  # the first epoch of the second group
            signal.raise_signal(signal.SIGTERM)
        return original(run, state, step, record)

    monkeypatch.setattr(cifar, "end_epoch", kill_once)
    with pytest.raises(SystemExit):
        sweep.main(tiny, QUIET)
    assert len(list((tiny.out_dir / "results").glob("*.jsonl"))) == 1
    results = sweep.main(tiny, QUIET)
    assert calls == [2, 2, 4, 4]  # networks at once, epoch by epoch: none trained twice
    assert sweep.main(tiny, QUIET) == results and len(calls) == 4
    assert (tiny.out_dir / "sweep.png").stat().st_size > 5000
    assert len(results) == 6 and not any((tiny.out_dir / "under_way").iterdir())
    for row in results[-1:]:
        config = options.Config(
            out_dir=tmp_path / f"alone{row['max_norm']}",
            constraint=row["constraint"],
            max_norm=row["max_norm"] or 1.0,
            learning_rate=row["learning_rate"],
            batch_size=row["batch_size"],
            epochs=2,
            epochs_per_decay=1,
            every=2,
        )
        monkeypatch.setattr(report, "norms", lambda *args: {})
        monkeypatch.setattr(report, "plot_spectra", lambda *args: None)
        cifar.main(config, QUIET)
        alone = json.loads((config.out_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["train_loss"] == pytest.approx(alone["train_loss"], rel=2e-3)
        assert row["test_error"] == pytest.approx(alone["test_error"], abs=0.02)
        assert alone["learning_rate"] == pytest.approx(0.1 * row["learning_rate"])


@pytest.mark.slow
def test_shards_together_are_the_whole(tiny, monkeypatch):
    """Each runs its own groups only; a machine that shares the folder sees what the other did."""
    ran = []

    def pretend(plan, members, console):
        ran.append([sweep.identity(plan, member) for member in members])
        rows = [{**row, "test_error": 0.5, "train_error": 0.5, "train_loss": np.nan} for row in ran[-1]]
        report.write_lines(plan.out_dir / "results" / f"{len(ran)}.jsonl", rows)

    monkeypatch.setattr(sweep, "run_group", pretend)
    for shard in ("1/2", "0/2", "1/2"):
        sweep.main(dataclasses.replace(tiny, shard=shard, at_once=1), QUIET)
    assert len(ran) == 6 and len(sweep.finished(tiny)) == 6
    sweep.main(dataclasses.replace(tiny, show=True), QUIET)


def test_show_needs_results(tiny):
    with pytest.raises(ValueError, match="got none"):
        sweep.main(dataclasses.replace(tiny, show=True), QUIET)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own sockets
def test_ray(tiny):
    """On this machine as its own cluster."""
    ray = pytest.importorskip("ray", reason="ray is not installed: the extra [sweep]")
    try:
        results = sweep.main(dataclasses.replace(tiny, ray=True, phases=1), QUIET)
    finally:
        ray.shutdown()
    assert len(results) == 6


@pytest.mark.slow
def test_headline(tmp_path, monkeypatch):
    """Arms in one program, stopped after it and begun again; the table's figures from first principles."""
    arms = {"none": np.inf, "clip1.0": 1.0}
    monkeypatch.setattr(headline, "STACKS", {"clip": arms})
    monkeypatch.setattr(report, "norms", lambda networks, convs: {"a": (len(networks), 3.0), "b": (0.5, 0.7)})
    monkeypatch.setattr(report, "plot_spectra", lambda *args: None)
    plan = headline.Headline(out_dir=tmp_path / "headline", stacks=("clip",), seeds=2, epochs=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(cifar, "median_seconds", lambda *args: (_ for _ in ()).throw(RuntimeError("power cut")))
        headline.main(plan, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "end_epoch", None)  # the second time no step is taken
        rows = headline.main(plan, QUIET)
    assert [row["arm"] for row in rows] == list(arms)
    for row in rows:
        a, b = row["test_errors"]
        assert row["mean"] == pytest.approx((a + b) / 2)
        assert row["standard_error"] == pytest.approx(abs(a - b) / 2)
        assert row["interval_95"][1] - row["mean"] == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)
        assert row["largest_norm_of_a_layer"] == {"least": [0.5, 0.7], "greatest": [2, 3.0]}
    last = json.loads((plan.out_dir / "clip1.0" / "metrics.jsonl").read_text())
    assert rows[1]["test_errors"] == last["test_error"]
    before = (plan.out_dir / "headline.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(headline, "train_stack", None)  # the third time there is nothing to do
        headline.main(plan, QUIET)
    assert (plan.out_dir / "headline.jsonl").read_text() == before
    curves.main(curves.Curves((plan.out_dir / "none", plan.out_dir / "clip1.0"), out=tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        curves.main(curves.Curves((tmp_path,), out=tmp_path / "no.png"))


def test_miniature_tunes_all_arms_alike_and_goes_on(tmp_path, monkeypatch):
    """Killed in the middle, it trains no network twice; the test images judge the last networks alone."""
    digits, calls = datasets.digits(), []

    def pretend(config, rate, bound, data, judge, console):
        calls.append((config.constraint, bound, rate, config.seed, len(judge[0])))
        if len(calls) == 8:
            raise RuntimeError("power cut")
        config.out_dir.mkdir(parents=True)
        assert not {image.tobytes() for image in data.train_images} & {image.tobytes() for image in judge[0]}
        return abs(rate - 0.1 * bound) if np.isfinite(bound) else rate, 1.0, 1.0

    monkeypatch.setattr(miniature, "train_one", pretend)
    plan = miniature.Miniature(out_dir=tmp_path, seeds=2)
    with pytest.raises(RuntimeError, match="power cut"):
        miniature.main(plan, QUIET)
    rows = miniature.main(plan, QUIET)
    assert rows == [json.loads(line) for line in (tmp_path / "miniature.jsonl").read_text().splitlines()]
    assert len(calls) == 1 + len(rows) == 1 + 5 * 3 + 5 * 2
    held_out = len(digits.train_images) // 10
    assert {call[-1] for call in calls[:16]} == {held_out}  # one of them twice
    assert {call[-1] for call in calls[16:]} == {len(digits.test_images)}
    arms = {name: (kind, bound) for kind, bounds in headline.STACKS.items() for name, bound in bounds.items()}
    for stage, seeds, rates in (("tuning", [0], [0.03, 0.1, 0.3]), ("test", [1, 2], [0.1])):
        for arm in arms:
            own = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
            wanted = [0.03] if stage == "test" and arm in ("none", "clip0.5") else rates
            assert [(row["seed"], row["learning_rate"]) for row in own] == [(s, r) for s in seeds for r in wanted]
    miniature.main(plan, QUIET)
    assert len(calls) == 26


def test_miniature_hands_on_the_rate_and_the_bound(tmp_path, monkeypatch):
    """To a network that is judged before its first step."""
    prepared = []

    def prepare(config, hyper, numbers, console, data):
        prepared.append(cifar.prepare(config, data, hyper, numbers))
        return *prepared[0], types.SimpleNamespace(timed=(1, 2.0))

    monkeypatch.setattr(cifar, "train_members", prepare)
    monkeypatch.setattr(report, "norms", lambda networks, convs: {"a": (1.0, 3.0), "b": (5.0, 6.0)})
    data = datasets.Dataset(*(array[:128] for array in datasets.digits()))
    plan = miniature.Miniature(out_dir=tmp_path, epochs=1, every=7)
    config = miniature.configure(plan, "digits", "rescale", {"stage": "test", "arm": "rescale0.5", "seed": 3})
    error, norm, seconds = miniature.train_one(config, 0.25, 0.5, data, data[2:], QUIET)
    assert 0.5 < error <= 1 and (norm, seconds) == (6.0, 2.0)
    run, state = prepared[0]
    assert run.seeds.numbers == (3,) and (run.config.constraint, run.config.every) == ("rescale", 7)
    given = state.opt_state.hyperparams
    assert (float(given["learning_rate"]), float(given["max_norm"])) == (0.25, 0.5)


def test_halved_images():
    ramp = np.arange(32 * 32).reshape(1, 32, 32, 1).repeat(3, -1).astype(np.uint8)
    large = miniature.halved(datasets.Dataset(ramp, np.zeros(1), ramp, np.zeros(1)))
    assert large.test_images.shape == (1, 16, 16, 3) and large.test_images.dtype == np.uint8
    assert large.test_images[0, 0, :3, 0].tolist() == [16, 18, 20]  # 16.5, 18.5 and 20.5, rounded to even
    assert miniature.halved(datasets.digits()).train_images.shape[1:] == (8, 8, 1)
