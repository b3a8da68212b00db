"""The benchmarks run, at sizes that take seconds; their figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import THOROUGH

from benchmarks.measure import RESULTS
from benchmarks.tables import PAGES, filled

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["spectrum", *(["claims", "gpu", "training", "scaling", "throughput", "rivals"] if THOROUGH else [])]
)
def test_benchmark_runs(name):
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ms:" in done.stdout


NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.slow
def test_real_networks_are_read_from_a_folder(tmp_path):
    """Small networks with the keys of published ones, and a run of the trainer's; of another network a line says so."""
    rng = np.random.default_rng(0)
    kernel = lambda o, i: (rng.standard_normal((o, i, 3, 3)) / np.sqrt(9 * i)).astype(np.float32)
    resnet = {"linear.weight": rng.standard_normal((10, 8)).astype(np.float32), "linear.bias": np.zeros(10, np.float32)}
    layers = {"conv1": kernel(4, 3), "layer1.0.conv1": kernel(4, 4), "layer1.0.conv2": kernel(4, 4)}
    layers |= {"layer2.0.conv1": kernel(8, 4), "layer2.0.conv2": kernel(8, 8)}
    for name, weight in layers.items():
        resnet[f"{name}.weight"] = weight
        for key in NORM:
            resnet[f"{name.replace('conv', 'bn')}.{key}"] = np.ones(len(weight), np.float32)
    dncnn = {f"model.{n}.weight": kernel(o, i) for n, (o, i) in zip((0, 2, 10), ((4, 1), (4, 4), (1, 4)))}
    dncnn |= {name.replace("weight", "bias"): np.zeros(len(weight), np.float32) for name, weight in dncnn.items()}
    np.savez(tmp_path / "resnet.npz", **resnet)
    np.savez(tmp_path / "dncnn.npz", **dncnn)
    torchvision = {name.replace("linear", "fc"): value for name, value in resnet.items()}
    torchvision["conv1.weight"] = rng.standard_normal((4, 3, 7, 7)).astype(np.float32) / 12
    torchvision["layer2.0.downsample.0.weight"] = kernel(8, 4)[:, :, :1, :1]
    torchvision |= {f"layer2.0.downsample.1.{key}": resnet[f"layer2.0.bn1.{key}"] for key in NORM}
    np.savez(tmp_path / "torchvision.npz", **torchvision)
    trainer = [
        sys.executable,
        "train/cifar.py",
        "--epochs",
        "1",
        "--max-steps",
        "2",
        "--out-dir",
        str(tmp_path / "run"),
    ]
    assert subprocess.run(trainer, cwd=ROOT, capture_output=True).returncode == 0

    def run(*options, name="real_networks"):
        command = [sys.executable, "-m", "benchmarks", name, "--out", str(tmp_path / "out"), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert "holds no .npz files" in run("--weights", str(tmp_path / "run" / "checkpoints")).stderr
    done = run("--weights", str(tmp_path), "--sizes", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "real_networks.jsonl").read_text().splitlines()]
    names = ["dncnn", "resnet", "ResNet-8 of train/, 1 epoch, rescale 1", "torchvision"]
    assert [row["network"] for row in rows] == names
    assert all(row["seen"] < row["sdp"] < row["product"] for row in rows)
    done = run("--weights", str(tmp_path), "--quick", name="trained_networks")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ResNet-8 of train/, 1 epoch, rescale 1 stem 3 8 1 (1, 16)" in done.stdout
    assert "resnet conv1 3 32 1 (3, 4)" in done.stdout
    np.savez(tmp_path / "other.npz", odd=np.zeros(3))
    assert "no network that is known here" in run("--weights", str(tmp_path), "--sizes", "8").stderr


def test_pages_hold_the_tables_of_the_results():
    for page in PAGES:
        assert filled(page, RESULTS) == page.read_text(), "python -m benchmarks --table writes them"


def test_tables_are_made_from_the_results():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--table"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| spectrum; ours |" in done.stdout
