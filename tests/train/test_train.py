"""The trainer: the network, the data, the step, and one short run from end to end."""

import io
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import train_run

import opnorm_jax as oj

nn = pytest.importorskip("flax.linen", reason="the trainer needs the extra [train]")
for package in ("rich", "tyro", "sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="the trainer needs the extra [train]")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))

import arms  # noqa: E402
import cifar  # noqa: E402
import loop  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import resnet  # noqa: E402
from rich.console import Console  # noqa: E402

# --- the network --------------------------------------------------------------------------------------------------


def initialise(depth, image=(32, 32, 3), **options):
    model = resnet.ResNet(depth, **options)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image)), train=False))


def test_resnet32_has_the_official_number_of_parameters():
    _, variables = initialise(32)
    assert resnet.count_parameters(variables["params"]) == 466_970
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if len(leaf.shape) == 4]
    assert sum(shape[0] == 3 for shape in kernels) == 31 and sum(shape[0] == 1 for shape in kernels) == 3


@pytest.mark.parametrize("depth", [0, 7, 18, 33])
def test_depth(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        resnet.blocks(depth, 16)


@pytest.mark.parametrize("image", [(32, 32), (8, 8), (9, 7)], ids=str)
def test_the_described_convolutions_are_those_of_the_model(image):
    """Against what Flax's own modules are called with."""
    model, variables = initialise(14, (*image, 3))
    convs = resnet.convolutions(model, variables, (*image, 3), "layer")
    seen = {}

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Conv):
            seen[context.module.path] = (args[0].shape[1:3], context.module)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v: model.apply(v, jnp.zeros((1, *image, 3)), train=False), variables)
    flat = {tuple(k.key for k in path[:-1]): conv for path, conv in jax.tree_util.tree_leaves_with_path(convs)}
    assert set(flat) == set(seen) and len(seen) == 1 + 3 + 12
    for path, (shape, module) in seen.items():
        conv = flat[path]
        assert conv.input_shape == shape
        assert conv.strides == (module.strides,) * 2
        same = tuple((k // 2, k // 2) for k in module.kernel_size)  # at stride 1, which is where the model says SAME
        assert conv.padding == {"SAME": same, "VALID": ((0, 0), (0, 0))}.get(module.padding, module.padding)
    circular = resnet.convolutions(model, variables, (*image, 3), "circular")
    assert all(conv.padding == "CIRCULAR" and conv.strides == (1, 1) for conv in jax.tree.leaves(circular))


def test_without_batch_norm():
    _, variables = initialise(8, batch_norm=False)
    assert "batch_stats" not in variables


# --- the step -----------------------------------------------------------------------------------------------------


def test_standardise_is_the_papers_recipe():
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    images[1] = 7  # constant: the floor keeps it finite
    x = images.astype(np.float64) / 255
    mean, std = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    want = (x - mean) / np.maximum(std, 1 / np.sqrt(3072))
    np.testing.assert_allclose(loop.standardise(jnp.asarray(images)), want, atol=2e-5)


def test_augment_crops_and_flips():
    images = np.random.default_rng(0).integers(1, 256, (64, 8, 8, 3)).astype(np.uint8)
    out = np.asarray(loop.augment(jax.random.key(0), jnp.asarray(images), 2, True))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, source in zip(out, padded):
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            if (image == source[dy : dy + 8, dx : dx + 8][:, :: -1 if flip else 1]).all()
        ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 20 and {flip for *_, flip in seen} == {False, True}
    untouched = loop.augment(jax.random.key(0), jnp.asarray(images), 0, False)
    assert (untouched == images).all()


def test_schedule_falls_where_the_paper_says():
    steps = 97_656
    rate = loop.schedule(0.1, steps)
    for boundary, after in ((39_062, 0.01), (58_593, 0.001), (78_124, 0.0001)):
        assert rate(boundary - 1) == pytest.approx(10 * after) and rate(boundary + 1) == pytest.approx(after)


def test_decay_enters_before_the_momentum():
    params = {"w": jnp.asarray([2.0])}
    tx = loop.optimizer("sgd", lambda count: 0.1, 0.5, None, None)
    state = tx.init(params)
    for want in (-0.1, -0.19):  # 0.5 * 2 = 1; then 1 + 0.9 * 1
        updates, state = tx.update({"w": jnp.zeros(1)}, state, params)
        np.testing.assert_allclose(updates["w"], want, rtol=1e-6)


def test_calls_cover_an_epoch():
    for platform in ("cpu", "gpu"):
        for per_epoch in (1, 11, 50, 390):
            ends = loop.call_ends(per_epoch, platform)
            assert ends[-1] == per_epoch and 0 < min(np.diff([0, *ends])) and max(np.diff([0, *ends])) <= 50


@pytest.mark.slow
def test_a_scan_of_steps_is_single_steps():
    model = resnet.ResNet(8, 2)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
    labels = np.arange(16, dtype=np.int32) % 10
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    tx = loop.optimizer("sgd", 0.1, 2e-4, None, None)
    run = loop.make_run_steps(arms.make_forward(model, "none", 1.0), tx, loop.Batches(4, 4, 1, False))

    def start():
        copy = jax.tree.map(jnp.copy, variables)
        opt_state = tx.init(copy["params"])
        return loop.TrainState(copy["params"], copy["batch_stats"], opt_state, jnp.int32(0), jax.random.key(1))

    together, loss, _ = run(start(), images, labels, steps=4)
    state, losses = start(), []
    for _ in range(4):
        state, one, _ = run(state, images, labels, steps=1)
        losses.append(float(one))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_evaluate_counts_the_last_partial_batch():
    def forward(params, batch_stats, x, train):
        return jnp.tile(jnp.arange(10.0), (len(x), 1))  # always class 9

    labels = np.array([9] * 5 + [0] * 8, np.int32)
    images = np.zeros((13, 4, 4, 1), np.uint8)
    assert loop.make_evaluate(forward, 5)({}, {}, jnp.asarray(images), jnp.asarray(labels)) == pytest.approx(8 / 13)


# --- the whole ----------------------------------------------------------------------------------------------------

COUNTS = "width epochs batch_size eval_batch_size every seeds save_every keep certify_images max_steps devices".split()


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 9}, r"6n \+ 2"),
        ({"max_norm": -1.0}, "max_norm to be positive"),
        *[
            ({name: value}, f"{name} to be .*finite, got {value}")
            for name in ("learning_rate", "max_norm", "weight_decay", "save_minutes")
            for value in (math.inf, math.nan)
        ],
        ({"batch_norm_momentum": math.nan}, r"batch_norm_momentum to be in \[0, 1\), got nan"),
        *[({name: 1e-46}, f"{name} to be .*float32 finite") for name in ("learning_rate", "max_norm", "weight_decay")],
        *[({name: 1e39}, f"{name} to be .*float32 finite") for name in ("learning_rate", "max_norm", "weight_decay")],
        *[({name: value}, f"{name} to be at least 1") for name in COUNTS for value in (0, -1, 2**31)],
        *[({name: value}, f"{name} to be one of") for name in ("depth", *COUNTS) for value in ("3", 2.0, True, [2])],
        *[({name: "sgb"}, f"{name} to be one of") for name in ("optimizer", "constraint", "norm_of", "resume", "bf16")],
        ({"coordinator": "host:1"}, "coordinator, num_processes and process_id together"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id to be 0 or more and below"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": -1}, "process_id to be 0 or more and below"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 1}, "coordinator to be HOST:PORT"),
        ({"learning_rate": 10**400}, "learning_rate to be"),
        ({"learning_rate": "0.1"}, "learning_rate to be one of"),
        ({"out_dir": 3}, "out_dir to be one of"),
        ({"epochs": 2**30}, r"fewer steps than 2\^31"),
        ({"seed": 2**63}, "seed to be 0 or more and below"),
        ({"seed": 2**63 - 2, "seeds": 2}, "seed to be 0 or more and below"),
        ({"seed": 10**20}, "seed to be 0 or more and below"),
        ({"seed": -1}, "seed to be 0 or more and below"),
        ({"epochs": 0}, "epochs to be at least 1"),
        ({"every": 0}, "every to be at least 1"),
        ({"batch_size": 5000}, "batch_size of at most 1442 images"),
        ({"weight_decay": -1.0}, "weight_decay to be 0 or more"),
        ({"batch_norm_momentum": 1.0}, r"batch_norm_momentum to be in \[0, 1\)"),
        ({"dataset": "mnist"}, "dataset to be one of"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        cifar.main(cifar.Config(**options))


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["none", "normalize"])
def test_end_to_end(constraint, tmp_path):
    optimizer = "conv-muon" if constraint == "normalize" else "sgd"
    shared = {"width": 4, "epochs": 2, "every": 3, "max_norm": 0.8}
    config = cifar.Config(out_dir=tmp_path, constraint=constraint, optimizer=optimizer, **shared)
    summary = cifar.main(config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["train_loss"] < rows[0]["train_loss"]
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert json.loads((tmp_path / "config.json").read_text())["every"] == 3
    assert (tmp_path / "spectra.png").stat().st_size > 10_000
    from safetensors.numpy import load_file

    weights = load_file(tmp_path / "params.safetensors")
    norms = {}
    for name, size, options in (
        ("stem", (8, 8), {"padding": "SAME"}),
        ("stage1_block0/conv1", (8, 8), {"padding": ((1, 1), (1, 1)), "strides": 2}),
        ("stage1_block0/projection", (8, 8), {"padding": "VALID", "strides": 2}),
        ("stage2_block0/conv2", (2, 2), {"padding": "SAME"}),
    ):
        norms[name] = oracle.dense_singular_values(weights[f"params/{name}/kernel"], size, **options)[0]
    if constraint == "normalize":
        error = cifar.evaluate_only(cifar.Config(evaluate_only=tmp_path), Console())["test_error"]
        assert error == pytest.approx(summary["test_error"])
    if constraint != "none":
        assert max(norms.values()) <= 0.8 * (1 + 1e-5)
        assert all(upper <= 0.8 * (1 + 1e-5) for _, upper in summary["norms_after"].values())
    else:
        assert max(norms.values()) > 0.8


def strict_json(text):
    """As other languages read it: NaN and Infinity are no JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.slow
def test_a_diverged_run_says_so(tmp_path):
    """NaN in the table, never "yes"; valid JSON with a reason; exit code 1."""
    cache = tmp_path / "cache"
    options = ["--epochs", 2, "--learning-rate", "1e38", "--out-dir", tmp_path / "run"]
    output = train_run.run(cache, *options, code=1, REPORT_NORMS="1")
    assert "error: the run diverged: the weights hold NaN" in output
    rows = [line for line in output.splitlines() if "stage" in line or "stem" in line]
    assert len(rows) == 10 and all("nan" in row and "yes" not in row for row in rows), output
    assert all(re.search(r"\bno\b", row) for row in rows)
    summary = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert "NaN" in summary["diverged"] and summary["norms_after"]["stem"] == [None, None]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = strict_json(line)
        assert row["train_loss"] is None and "diverged" in row["reason"]
    for document in (tmp_path / "run" / "checkpoints").rglob("metadata"):
        strict_json(document.read_text())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1  # it stopped after an epoch of two
    assert "no checkpoint was saved before" in summary["diverged"]
    assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    train_run.run(cache, *options, "--no-halt-on-nan", code=1)
    assert any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_norms_that_are_not_finite_are_not_lost_among_others():
    """Of several networks the largest norm counts, and NaN is larger than all."""
    convs = {"stem": {"kernel": oj.Conv((8, 8), padding="SAME")}}
    networks = [{"stem": {"kernel": jnp.full((3, 3, 2, 2), value)}} for value in (1.0, jnp.nan, 2.0)]
    assert all(map(math.isnan, report.norms(networks, convs)["stem"]))
    assert report.norms(networks[::2], convs)["stem"][1] == pytest.approx(36, rel=0.2)
    assert not report.is_finite(networks) and report.is_finite(networks[::2])


def test_the_table_of_a_diverged_run():
    """The same without a run: NaN is printed, and is within no bound."""
    console = Console(width=150, record=True, file=io.StringIO())
    nan = float("nan")
    summary = {
        "config": {"constraint": "rescale", "max_norm": 1.0, "norm_of": "layer", "seeds": 1},
        "norms_before": {"stem": (1.0, 2.0), "block": (1.0, 2.0)},
        "norms_after": {"stem": (nan, nan), "block": (0.9, 1.0)},
        "diverged": "the weights hold NaN or infinity",
        **dict.fromkeys(["test_error", "images_per_second", "compile_seconds", "total_seconds"], 0.9),
        "constraint_share": nan,
    }
    report.print_table(console, summary)
    lines = console.export_text().splitlines()
    (stem,), (block,) = ([line for line in lines if name in line] for name in ("stem", "block"))
    assert stem.count("nan") == 2 and re.search(r"\bno\b", stem) and "yes" not in stem
    assert re.search(r"\byes\b", block) and any("the weights hold NaN" in line for line in lines)


def test_json_of_a_diverged_run_is_valid(tmp_path):
    nan, infinite = float("nan"), float("inf")
    report.save_json(tmp_path / "summary.json", {"a": [nan, 1.0, (infinite, 2)], "b": {"c": -infinite}, "d": "NaN"})
    assert strict_json((tmp_path / "summary.json").read_text()) == {
        "a": [None, 1.0, [None, 2]],
        "b": {"c": None},
        "d": "NaN",
    }
    run = record.Record(tmp_path, None)
    run.add(3, np.float32(nan), np.float32(0.5), 0.5, True)
    position = strict_json(json.dumps(run.position(3)))
    run.close()
    run = record.Record(tmp_path, position)  # null is NaN again
    row = run.end_epoch({"epoch": 1, "step": 3}, 0.25, 10)
    run.close()
    assert math.isnan(row["train_loss"]) and row["train_error"] == 0.5
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    saved = strict_json(line)
    assert saved["train_loss"] is None and saved["test_error"] == 0.25 and "the run diverged" in saved["reason"]
