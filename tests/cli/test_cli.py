"""The command line: what it prints, what it writes, and one line for whatever goes wrong."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy

import opnorm_jax as oj
from opnorm_jax._cli import checkpoint, layers
from opnorm_jax._cli.hints import hints
from opnorm_jax._cli.main import main

RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.standard_normal(shape).astype(np.float32) for shape in ((3, 3, 2, 4), (3, 3, 4, 5)))
TORCH = {
    "conv1.weight": FIRST.transpose(3, 2, 0, 1).copy(),
    "bn.running_mean": RNG.standard_normal(4).astype(np.float32),
    "layer2.0.conv.weight": SECOND.transpose(3, 2, 0, 1).copy(),
    "fc.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "steps": np.asarray(7, np.int64),
}
FILE = Path(tempfile.mkdtemp()) / "layers.json"
FILE.write_text('{"layer2.0.conv": {"strides": 2}}')
LAYERS = ["--input-shape", "8", "8", "--padding", "1", "--layers", str(FILE)]
TRUE = {
    "conv1.weight": oracle.dense_singular_values(FIRST, (8, 8), padding=((1, 1), (1, 1)))[0],
    "layer2.0.conv.weight": oracle.dense_singular_values(SECOND, (8, 8), strides=2, padding=((1, 1), (1, 1)))[0],
}


def flax_tree(dtype=np.float32):
    return {
        "params": {
            "conv1": {"kernel": FIRST.astype(dtype), "bias": np.ones(4, np.float32)},
            "layer2": {"conv": {"kernel": SECOND.astype(dtype)}},
        },
        "batch_stats": {"mean": np.arange(3, dtype=np.float32)},
        "opt_state": [{"trace": {"conv1": {"kernel": FIRST.astype(dtype)}}}, None],
        "step": np.asarray(7, np.int32),
    }


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "net.npz", **TORCH)
    return str(tmp_path / "net.npz")


@pytest.fixture
def tensors(tmp_path):
    arrays = TORCH | {"layer2.0.conv.weight": TORCH["layer2.0.conv.weight"].astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "net.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as the trainer writes it: step 10 holds the network, step 9 another."""
    folder = tmp_path_factory.mktemp("run")
    with ocp.CheckpointManager(folder / "checkpoints", item_names=("state",)) as manager:
        for step, scale in ((9, 2.0), (10, 1.0)):
            tree = flax_tree()
            tree["params"]["conv1"]["kernel"] *= scale
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
    return folder


def report(capsys, *args):
    assert main(["report", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def fails(capsys, *args):
    """The one line an error leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        main([*map(str, args)])
    out, err = capsys.readouterr()
    assert info.value.code == 2 and not out
    line = err.splitlines()[-1]
    assert line.startswith("opnorm: error: ") and "Traceback" not in err
    return line


def test_report_against_the_oracle(npz, tensors, capsys):
    for path in (npz, tensors):
        facts, err = report(capsys, path, *LAYERS)
        rows = {row["path"]: row for row in facts["layers"]}
        assert list(rows) == ["conv1.weight", "layer2.0.conv.weight"]
        for name, row in rows.items():
            near = 1e-2 if path == tensors and "layer2" in name else 0  # rounded to bfloat16
            assert row["lower"] * (1 - near) <= TRUE[name] <= row["upper"] * (1 + near)
            assert row["conv"]["kernel_layout"] == "OIHW"
        assert rows["layer2.0.conv.weight"]["conv"]["strides"] == [2, 2]
        assert facts["skipped"] == ["bn.running_mean", "fc.weight", "steps"]
        assert "layout OIHW" in err and "3 other arrays passed over" in err


def test_report_of_every_folder_of_a_run(run, capsys):
    item = run / "checkpoints" / "10" / "state"
    expected = oj.operator_norm_bounds(FIRST, oj.Conv((8, 8), padding="SAME"))
    for folder in (run, run / "checkpoints", item.parent, item):
        facts, err = report(capsys, folder, "--input-shape", "8", "8")
        assert [row["path"] for row in facts["layers"]] == ["conv1/kernel", "layer2/conv/kernel"]
        assert facts["layers"][0]["upper"] == pytest.approx(float(expected.upper), rel=1e-6)
        assert facts["skipped"] == ["conv1/bias"] and "layout HWIO" in err
    facts, _ = report(capsys, run / "checkpoints" / "9", "--input-shape", "8", "8")
    assert facts["layers"][0]["upper"] == pytest.approx(2 * float(expected.upper), rel=1e-6)


def test_the_module_prints_a_table_and_draws(npz, tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "opnorm_jax", "report", npz, *LAYERS, "--plot", str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["layer", "kernel"] and lines[3].startswith("layer2.0.conv.weight")
    assert "3x3 4->5" in lines[3] and "8x8 /2 pad 1" in lines[3]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_descriptions_by_file(npz, tmp_path, capsys):
    """Later patterns prevail key by key, the file over the flags; a dense layer is one of no spatial axes."""
    path = tmp_path / "layers.json"
    given = {
        "*": {"input_shape": [4, 4]},
        "layer2.*": {"strides": 2},
        "fc": {"input_shape": []},
        "layer2.0.conv": {"padding": "CIRCULAR"},
    }
    path.write_text(json.dumps(given))
    facts, _ = report(capsys, npz, "--layers", path, "--strides", 3, "--input-shape", 5, 5)
    rows = {row["path"]: row for row in facts["layers"]}
    assert rows["conv1.weight"]["conv"]["strides"] == [3, 3] and rows["conv1.weight"]["conv"]["input_shape"] == [4, 4]
    conv = rows["layer2.0.conv.weight"]["conv"]
    assert (conv["input_shape"], conv["strides"], conv["padding"]) == ([4, 4], [2, 2], "CIRCULAR")
    norm = np.linalg.norm(TORCH["fc.weight"], 2)
    assert rows["fc.weight"]["norm"] == pytest.approx(norm, rel=1e-5)
    exact = oracle.dense_singular_values(SECOND, (4, 4), strides=2)
    assert rows["layer2.0.conv.weight"]["smallest"] == pytest.approx(exact[-1], abs=1e-5 * exact[0])


def test_kernels_without_an_input_shape_are_named(npz, tmp_path, capsys):
    path = tmp_path / "layers.json"
    path.write_text('{"conv1": {"input_shape": [8, 8]}}')
    facts, _ = report(capsys, npz, "--layers", path)
    assert facts["layers"][1]["upper"] is None and "no input shape given" in facts["layers"][1]["reason"]
    line = fails(capsys, "constrain", npz, tmp_path / "out.npz", "--max-norm", 1, "--layers", path)
    assert "layer2.0.conv.weight: no input shape given" in line
    facts, _ = report(capsys, npz, "--input-shape", 8, 8, "--exclude", "layer2")
    assert [row["path"] for row in facts["layers"]] == ["conv1.weight"]
    facts, _ = report(capsys, npz, "--input-shape", 8, 8, "--include", "layer2|bn")
    assert facts["skipped"] == ["bn.running_mean"]


KERNEL = FIRST.transpose(3, 2, 0, 1).copy()
# name: (arrays, those refused, what the message says)
FACTORS = {
    "weight norm": (
        {"c.weight_g": np.full((4, 1, 1, 1), 5.0), "c.weight_v": KERNEL},
        ["c.weight_g", "c.weight_v"],
        "computed from weight_g and weight_v.*remove_weight_norm",
    ),
    "weight norm as a parametrization": (
        {
            "c.parametrizations.weight.original0": np.full((4, 1, 1, 1), 5.0),
            "c.parametrizations.weight.original1": KERNEL,
        },
        ["c.parametrizations.weight.original0", "c.parametrizations.weight.original1"],
        "a factor.*remove_parametrizations",
    ),
    "spectral norm as a parametrization": (
        {
            "c.parametrizations.weight.original": KERNEL,
            "c.parametrizations.weight.0._u": np.ones(4),
            "c.parametrizations.weight.0._v": np.ones(18),
        },
        ["c.parametrizations.weight.original"],
        "a factor.*remove_parametrizations",
    ),
    "spectral norm": (
        {"c.weight_orig": KERNEL, "c.weight_u": np.ones(4), "c.weight_v": np.ones(18)},
        ["c.weight_orig"],
        "not the weight that the layer uses.*remove_spectral_norm",
    ),
    "pruning": (
        {"c.weight_orig": KERNEL, "c.weight_mask": np.ones(KERNEL.shape, bool)},
        ["c.weight_orig"],
        "not the weight that the layer uses.*prune.remove",
    ),
    "pruning, with a mask of numbers": (
        {"c.weight_orig": KERNEL, "c.weight_mask": np.ones(KERNEL.shape)},
        ["c.weight_mask", "c.weight_orig"],
        "(a mask|not the weight that the layer uses.*prune.remove)",
    ),
    "a mask": (
        {"c.weight": KERNEL, "c.mask": np.ones(KERNEL.shape)},
        ["c.mask", "c.weight"],
        "(a mask, not a layer's weight|which is masked by mask)",
    ),
    "a boolean mask": ({"c.weight": KERNEL, "c.mask": np.ones(KERNEL.shape, bool)}, ["c.weight"], "masked by mask"),
    "a gain": (
        {"c.weight": KERNEL, "c.gain": np.ones((4, 1, 1, 1))},
        ["c.gain", "c.weight"],
        "(the gain of a standardised kernel|standardised and multiplied by gain)",
    ),
    "a low-rank change": (
        {"c.base_layer.weight": KERNEL, "c.lora_A.default.weight": KERNEL},
        ["c.base_layer.weight", "c.lora_A.default.weight"],
        "low-rank change",
    ),
    "Flax's weight norm": (
        {"Conv_0/kernel": FIRST, "WeightNorm_0/Conv_0/kernel/scale": np.ones(4)},
        ["Conv_0/kernel"],
        "Flax's WeightNorm normalises",
    ),
    "Flax's spectral norm": (
        {"params/Conv_0/kernel": FIRST, "batch_stats/SpectralNorm_0/Conv_0/kernel/sigma": np.asarray(2.0)},
        ["params/Conv_0/kernel"],
        "Flax's SpectralNorm normalises",
    ),
    "complex": (
        {"c.weight": KERNEL.astype(np.complex64)},
        ["c.weight"],
        r"dtype complex64.*the real one with the kernel \[\[Re, Im\], \[-Im, Re\]\]",
    ),
    "integers": ({"c.weight": (9 * KERNEL).astype(np.int8)}, ["c.weight"], "dtype int8.*multiply by its scale"),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_is_no_kernel_is_refused_by_name(name, suffix, tmp_path, capsys):
    """Alone it is an error; beside a kernel the report has a row that says why, and constraining is an error."""
    arrays, refused, message = FACTORS[name]
    arrays = {
        key: np.asarray(array, np.float32 if array.dtype == np.float64 else None) for key, array in arrays.items()
    }
    path, out = tmp_path / ("net" + suffix), tmp_path / ("out" + suffix)
    save = safetensors.numpy.save_file if suffix == ".safetensors" else lambda tree, file: np.savez(file, **tree)
    save(arrays, path)
    common = ["--input-shape", 8, 8, "--padding", 1]
    assert re.search(f"{re.escape(refused[-1])}.*{message}", fails(capsys, "report", path, *common))
    other = "d/kernel" if "Flax" in name else "d.weight"
    save(arrays | {other: FIRST if "Flax" in name else KERNEL}, path)
    facts, _ = report(capsys, path, *common)
    rows = {row["path"]: row for row in facts["layers"]}
    assert set(rows) == {other, *refused}
    for key in refused:
        assert re.search(message, rows[key]["reason"]) and rows[key]["upper"] is None
    assert re.search(message, fails(capsys, "constrain", path, out, "--max-norm", 1, *common)) and not out.exists()
    without = ["--exclude", "^(" + "|".join(map(re.escape, refused)) + ")$"]
    assert main([*map(str, ["constrain", path, out, "--max-norm", 1, *common, *without])]) == 0
    made = safetensors.numpy.load_file(out) if suffix == ".safetensors" else dict(np.load(out))
    for key in arrays:
        assert made[key].tobytes() == arrays[key].tobytes()
    assert oracle_norm(made[other], "HWIO" if "Flax" in name else "OIHW") <= 1


def batch_norm(channels):
    return {
        "running_mean": RNG.standard_normal(channels).astype(np.float32),
        "running_var": RNG.uniform(0.2, 3, channels).astype(np.float32),
        "weight": RNG.uniform(-2, 2, channels).astype(np.float32),
        "bias": RNG.standard_normal(channels).astype(np.float32),
    }


def folded_norm(kernel, norm, epsilon=1e-5):
    factor = norm["weight"] / np.sqrt(norm["running_var"].astype(np.float64) + epsilon)
    return oracle.dense_singular_values(kernel * factor, (8, 8), padding=((1, 1), (1, 1)))[0]


def test_batch_norm_is_folded_on_request(tmp_path, capsys):
    """Pairs by name, in a sequence by number; by the file of layers where names do not tell."""
    norms = {"bn1": batch_norm(4), "block.1": batch_norm(5), "other": batch_norm(4)}
    arrays = {"conv1.weight": TORCH["conv1.weight"], "block.0.weight": TORCH["layer2.0.conv.weight"]}
    arrays |= {f"{layer}.{name}": array for layer, norm in norms.items() for name, array in norm.items()}
    path, rules = tmp_path / "net.safetensors", tmp_path / "layers.json"
    safetensors.numpy.save_file(arrays, path)
    common = [path, "--input-shape", 8, 8, "--padding", 1]
    true = {"conv1.weight": folded_norm(FIRST, norms["bn1"]), "block.0.weight": folded_norm(SECOND, norms["block.1"])}
    facts, _ = report(capsys, *common, "--fold-batch-norm")
    assert facts["batch_norms"] == {"block.0.weight": "block.1", "conv1.weight": "bn1"}
    for row in facts["layers"]:
        assert row["lower"] <= true[row["path"]] * (1 + 1e-6) and true[row["path"]] <= row["upper"]
        assert row["norm"] == pytest.approx(true[row["path"]], rel=1e-5)
    picture = tmp_path / "net.svg"
    assert main(["report", *map(str, common), "--fold-batch-norm", "--plot", str(picture)]) == 0
    assert picture.exists() and "conv1.weight is folded with bn1" in capsys.readouterr().out
    rules.write_text('{"conv1": {"batch_norm": "other"}, "block.0": {"batch_norm": null}}')
    facts, _ = report(capsys, *common, "--fold-batch-norm", "1e-3", "--layers", rules)
    assert facts["batch_norms"] == {"conv1.weight": "other"}
    rows = {row["path"]: row["norm"] for row in facts["layers"]}
    assert rows["conv1.weight"] == pytest.approx(folded_norm(FIRST, norms["other"], 1e-3), rel=1e-5)
    assert rows["block.0.weight"] == pytest.approx(
        oracle.dense_singular_values(SECOND, (8, 8), padding=((1, 1), (1, 1)))[0], rel=1e-5
    )
    out = tmp_path / "out.safetensors"
    line = fails(capsys, "constrain", path, out, *common[1:], "--fold-batch-norm", "--max-norm", 1)
    assert 'folds no "batch_norm" (block.0.weight, conv1.weight)' in line and not out.exists()
    for content, message in (
        ('{"conv1": {"batch_norm": "block.1"}}', "block.1' to have 4 channels, got shape (5,)"),
        ('{"conv1": {"batch_norm": "bn7"}}', "'bn7' to be a batch normalisation.*found block.1, bn1, other"),
        ('{"conv1": {"batch_norm": 7}}', "a layer's name or null, got 7"),
    ):
        rules.write_text(content)
        assert re.search(re.escape(message).replace(r"\.\*", ".*"), fails(capsys, "report", *common, "--layers", rules))
    rules.write_text('{"conv1": {"batch_norm": null}}')
    line = fails(capsys, "report", *common, "--include", "conv1", "--layers", rules, "--fold-batch-norm")
    assert "no kernel's name tells the batch normalisation behind it (3 found" in line


def test_batch_norm_of_flax(tmp_path, capsys):
    norm = batch_norm(4)
    tree = {
        "params": {"block": {"Conv_0": {"kernel": FIRST}, "BatchNorm_0": {"scale": norm["weight"]}}},
        "batch_stats": {"block": {"BatchNorm_0": {"mean": norm["running_mean"], "var": norm["running_var"]}}},
        "opt_state": [{"trace": {"block": {"BatchNorm_0": {"scale": norm["bias"]}}}}],
    }
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "flax", tree)
    facts, _ = report(capsys, tmp_path / "flax", "--input-shape", 8, 8, "--padding", 1, "--fold-batch-norm")
    (row,) = facts["layers"]
    assert facts["batch_norms"] == {"block/Conv_0/kernel": "block/BatchNorm_0"}
    assert row["norm"] == pytest.approx(folded_norm(FIRST, norm), rel=1e-5)


def test_states_of_nnx_need_no_value_in_patterns(tmp_path, capsys):
    tree = {"conv": {"kernel": {"value": FIRST}}, "bn": {"scale": {"value": np.ones(4, np.float32)}}}
    tree["bn"]["var"] = {"value": np.full(4, 4.0, np.float32)}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "nnx", tree)
    rules = tmp_path / "layers.json"
    for pattern in ("conv", "conv/kernel", "conv/kernel/value"):
        rules.write_text(json.dumps({pattern: {"input_shape": [8, 8], "padding": 1}}))
        facts, _ = report(capsys, tmp_path / "nnx", "--layers", rules, "--fold-batch-norm", "1e-12")
        (row,) = facts["layers"]
        assert row["path"] == "conv/kernel/value" and facts["batch_norms"] == {"conv/kernel/value": "bn"}
        assert row["norm"] == pytest.approx(TRUE["conv1.weight"] / 2, rel=1e-5)


CHAINS = {  # (output, input) channels as they are stored, by name; those that are transposed
    "DCGAN": (
        {f"main.{3 * n}": sizes for n, sizes in enumerate([(100, 512), (512, 256), (256, 128), (128, 3)])},
        "0 3 6 9",
    ),
    "an encoder and a decoder": ({"0": (16, 3), "2": (32, 16), "4": (32, 16), "6": (16, 3)}, "4 6"),
    "U-Net": ({"inc.0": (64, 3), "up1.conv.0": (512, 1024), "up1.conv.3": (512, 512), "up1.up": (1024, 512)}, "up"),
    "sorted, but not in order": ({"blocks.0.conv1": (32, 16), "blocks.0.conv2": (32, 32), "conv1": (16, 3)}, ""),
    "ResNet": (
        {"conv1": (16, 3), "layer1.0.conv1": (16, 16), "layer2.0.conv1": (32, 16), "layer2.0.conv2": (32, 32)},
        "",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_transposed_layers_are_hinted_at(name):
    chain, transposed = CHAINS[name]
    entries = {f"{layer}.weight": checkpoint.Entry((*sizes, 3, 3), "float32") for layer, sizes in chain.items()}
    convs = dict.fromkeys(entries, oj.Conv((8, 8), padding=1, kernel_layout="OIHW"))
    found = [hint.split(".weight")[0].split(".")[-1] for hint in hints(convs, entries)]
    assert found == transposed.split()


def test_layers_that_look_like_others_are_hinted_at(tmp_path, capsys):
    """Depthwise, grouped and transposed layers, by their names and by the channels of the kernel before."""
    kernel = lambda *shape: np.ones(shape, np.float32)
    arrays = {
        "0.weight": kernel(8, 3, 3, 3),
        "1.weight": kernel(8, 1, 3, 3),  # depthwise
        "2.weight": kernel(16, 8, 1, 1),
        "3.weight": kernel(16, 4, 3, 3),  # of four groups
        "3.downsample.weight": kernel(16, 8, 1, 1),
        "4.weight": kernel(16, 6, 4, 4),  # transposed: 16 in, 6 out
        "5.weight": kernel(6, 6, 3, 3),
        "6.up.weight": kernel(6, 6, 4, 4),  # transposed by its name
    }
    np.savez(tmp_path / "net.npz", **arrays)
    common = [tmp_path / "net.npz", "--input-shape", 8, 8, "--padding", 1, "--layout", "OIHW"]
    facts, _ = report(capsys, *common)
    hints = {hint.split()[0]: hint for hint in facts["hints"]}
    assert set(hints) == {"1.weight", "3.weight", "4.weight", "6.up.weight"}
    assert "may be depthwise" in hints["1.weight"] and 'give it 8 as "feature_group_count"' in hints["1.weight"]
    assert "may be grouped" in hints["3.weight"] and "give it 4 as" in hints["3.weight"]
    assert "may be a transposed layer" in hints["4.weight"] and "transposed" in hints["6.up.weight"]
    assert main(["report", *map(str, common)]) == 0
    assert "\n? 1.weight may be depthwise" in capsys.readouterr().out
    rules = tmp_path / "layers.json"
    transposed = {"padding": 2, "input_dilation": 2, "kernel_layout": "IOHW"}
    groups = {"1": {"feature_group_count": 8}, "3": {"feature_group_count": 4}}
    rules.write_text(json.dumps({**groups, "4": transposed, "6.up": transposed}))
    assert report(capsys, *common, "--layers", rules)[0]["hints"] == []


def test_masks_of_four_axes_are_no_kernels(tmp_path, capsys):
    np.savez(tmp_path / "net.npz", **{"c.weight": KERNEL, "attention.bias": np.ones((1, 1, 8, 8), bool)})
    facts, _ = report(capsys, tmp_path / "net.npz", "--input-shape", 8, 8)
    assert facts["skipped"] == ["attention.bias"]


@pytest.mark.slow
def test_one_thread_of_openblas(npz):
    """Set before the library that reads it is loaded: no threads but XLA's are started for a factorisation."""
    script = (
        "import os, sys; from opnorm_jax._cli.main import main; main(sys.argv[1:]); "
        "print(os.environ['OPENBLAS_NUM_THREADS'], 'scipy.linalg' in sys.modules, file=sys.stderr)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    probe = "from opnorm_jax._cli import main; import sys; sys.exit('scipy.linalg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], env=env, timeout=300).returncode == 0
    command = [sys.executable, "-c", script, "report", npz, *LAYERS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stderr.splitlines()[-1].split() == ["1", "True"], done.stderr


def oracle_norm(kernel, layout, **geometry):
    canonical = np.asarray(kernel, np.float64).transpose([layout.index(letter) for letter in "HWIO"])
    return oracle.dense_singular_values(canonical, (8, 8), padding=((1, 1), (1, 1)), **geometry)[0]


@pytest.mark.parametrize("constraint", ["rescale", pytest.param("project", marks=pytest.mark.slow)])
def test_constrain_npz(npz, tmp_path, capsys, constraint):
    before, out = Path(npz).read_bytes(), tmp_path / "out.npz"
    os.chmod(npz, 0o640)
    assert main(["constrain", npz, str(out), "--max-norm", "2", "--constraint", constraint, *LAYERS]) == 0
    text = capsys.readouterr().out
    assert "2 of 2 kernels changed" in text and "still above" not in text
    assert Path(npz).read_bytes() == before and out.stat().st_mode & 0o777 == 0o640
    with np.load(out) as made:
        assert made.files == list(TORCH)
        assert 1.9 < oracle_norm(made["conv1.weight"], "OIHW") <= 2 * (1 + 1e-5)
        assert 1.5 < oracle_norm(made["layer2.0.conv.weight"], "OIHW", strides=2) <= 2 * (1 + 1e-5)
        for name in ("bn.running_mean", "fc.weight", "steps"):
            assert made[name].tobytes() == TORCH[name].tobytes() and made[name].dtype == TORCH[name].dtype
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.npz", "out.npz"]


def test_constrain_safetensors(tensors, tmp_path, capsys):
    """Only the kernels' bytes differ; the one of bfloat16 stays one; what is inside stays bit for bit."""
    out = tmp_path / "out.safetensors"
    assert main(["constrain", tensors, str(out), "--max-norm", "2", *LAYERS]) == 0
    old, new = (safetensors.numpy.load_file(path) for path in (tensors, out))
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert {n: a.dtype for n, a in old.items()} == {n: a.dtype for n, a in new.items()}
    assert {n for n in old if old[n].tobytes() != new[n].tobytes()} == {"conv1.weight", "layer2.0.conv.weight"}
    assert oracle_norm(new["conv1.weight"], "OIHW") <= 2 * (1 + 1e-5)
    assert oracle_norm(new["layer2.0.conv.weight"], "OIHW", strides=2) <= 2 * (1 + 2**-6)
    again = tmp_path / "again.safetensors"
    assert main(["constrain", str(out), str(again), "--max-norm", "100", *LAYERS]) == 0
    assert again.read_bytes() == out.read_bytes() and "0 of 2 kernels changed" in capsys.readouterr().out


def test_constrain_orbax_writes_every_array(run, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["constrain", str(run), str(out), "--max-norm", "1", "--input-shape", "8", "8", "--padding", "1"]) == 0
    made = safetensors.numpy.load_file(out)
    assert oracle_norm(made["params/conv1/kernel"], "HWIO") <= 1 + 1e-5
    assert made["params/conv1/bias"].tolist() == [1] * 4 and made["batch_stats/mean"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(made["opt_state/0/trace/conv1/kernel"], FIRST)  # not a parameter
    assert made["step"] == 7 and made["step"].dtype == np.int32
    again = tmp_path / "out.npz"
    assert (
        main(["constrain", str(run), str(again), "--max-norm", "1", "--input-shape", "8", "8", "--padding", "1"]) == 0
    )
    with np.load(again) as same:
        assert set(same) == set(made) and all(same[name].tobytes() == made[name].tobytes() for name in made)
    line = fails(capsys, "constrain", run, tmp_path / "folder", "--max-norm", 1, "--input-shape", 8, 8)
    assert "ends in .safetensors or .npz" in line


def test_one_clip_says_what_it_leaves(npz, tmp_path, capsys):
    assert main(["constrain", npz, str(tmp_path / "o.npz"), "--max-norm", "1", "--constraint", "clip", *LAYERS]) == 0
    assert "2 still above 1: one clip" in capsys.readouterr().out


@pytest.mark.slow
def test_float64_stays_float64(tmp_path, capsys):
    path, out = tmp_path / "wide.npz", tmp_path / "out.npz"
    np.savez(path, kernel=FIRST.astype(np.float64))
    assert main(["constrain", str(path), str(out), "--max-norm", "1", "--input-shape", "8", "8", "--padding", "1"]) == 0
    with np.load(out) as made:
        assert made["kernel"].dtype == np.float64
        assert oracle_norm(made["kernel"], "HWIO") <= 1 + 1e-12


class Bomb:
    def __reduce__(self):
        return open, (os.environ["OPNORM_TEST_BOMB"], "w")


def test_stacked_kernels(tmp_path, capsys):
    path, out = tmp_path / "net.npz", tmp_path / "out.npz"
    np.savez(path, **{"blocks/kernel": np.stack([FIRST, FIRST / 100])})
    (tmp_path / "layers.json").write_text('{"blocks": {"input_shape": [8, 8], "padding": [1, 1], "stacked": 1}}')
    command = ["constrain", str(path), str(out), "--max-norm", "1", "--layers", str(tmp_path / "layers.json")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("blocks/kernel[0]") and lines[3].startswith("blocks/kernel[1]")
    assert lines[3].endswith(" 0") and not lines[2].endswith(" 0")
    with np.load(out) as made:
        assert oracle_norm(made["blocks/kernel"][0], "HWIO") <= 1 + 1e-5
        assert made["blocks/kernel"][1].tobytes() == (FIRST / 100).tobytes()


def test_kernels_stacked_along_an_inner_axis(tmp_path, capsys):
    path, out, layers = tmp_path / "net.npz", tmp_path / "out.npz", tmp_path / "layers.json"
    stack = np.stack([FIRST, FIRST / 100], axis=2)
    np.savez(path, **{"blocks/kernel": stack, "blocks_bn/var": np.ones((2, FIRST.shape[-1]), np.float32)})
    entry = {"input_shape": [8, 8], "padding": [1, 1], "stacked": [2]}
    layers.write_text(json.dumps({"blocks": entry}))
    assert main(["constrain", str(path), str(out), "--max-norm", "1", "--layers", str(layers)]) == 0
    assert "blocks/kernel[1]" in capsys.readouterr().out
    with np.load(out) as made:
        assert oracle_norm(made["blocks/kernel"][:, :, 0], "HWIO") <= 1 + 1e-5
        assert (made["blocks/kernel"][:, :, 1] == stack[:, :, 1]).all()
    layers.write_text(json.dumps({"blocks": entry | {"batch_norm": "blocks_bn"}}))
    assert main(["report", str(path), "--layers", str(layers)]) == 0
    layers.write_text(json.dumps({"blocks": entry | {"stacked": [5]}}))
    assert "different axes" in fails(capsys, "report", path, "--layers", layers)


def test_bfloat16_does_not_fit_npz(tmp_path, capsys):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", {"kernel": FIRST.astype(ml_dtypes.bfloat16)})
    common = ("--max-norm", 1, "--input-shape", 8, 8)
    line = fails(capsys, "constrain", tmp_path / "tree", tmp_path / "out.npz", *common)
    assert "cannot hold bfloat16" in line and [p.name for p in tmp_path.iterdir()] == ["tree"]


def test_pickles_are_never_loaded(tmp_path, capsys, monkeypatch):
    """Nor lost: a copy carries them unread."""
    crater = tmp_path / "crater"
    monkeypatch.setenv("OPNORM_TEST_BOMB", str(crater))
    path, out = tmp_path / "net.npz", tmp_path / "out.npz"
    np.savez(path, kernel=FIRST, extra=np.asarray([Bomb()], object))
    facts, _ = report(capsys, path, "--input-shape", 8, 8)
    assert facts["skipped"] == ["extra"] and len(facts["layers"]) == 1
    assert main(["constrain", str(path), str(out), "--max-norm", "1", "--input-shape", "8", "8"]) == 0
    (tmp_path / "whole.npz").write_bytes(pickle.dumps(Bomb()))
    assert "not a readable .npz" in fails(capsys, "report", tmp_path / "whole.npz", "--input-shape", 8, 8)
    (tmp_path / "net.pt").write_bytes(pickle.dumps(Bomb()))
    assert "can run code when read" in fails(capsys, "report", tmp_path / "net.pt", "--input-shape", 8, 8)
    assert not crater.exists()
    with np.load(out, allow_pickle=True) as made:
        made["extra"][0].close()
    assert crater.exists()  # the bomb was a live one


def test_padding_may_be_a_name_and_a_number(npz, capsys):
    """One for each axis, in any mixture."""
    facts, _ = report(capsys, npz, "--input-shape", 8, 8, "--padding", "reflect", 1, "--include", "conv1")
    (row,) = facts["layers"]
    true = oracle.dense_singular_values(FIRST, (8, 8), padding=("REFLECT", (1, 1)))[0]
    assert row["lower"] <= true * (1 + 1e-6) and true <= row["upper"]


# name: (arguments after the file, message)
USAGE = {
    "no input shape": ([], "conv1.weight: no input shape given: --input-shape, or --layers"),
    "batch and channels": (["--input-shape", "1", "8", "8", "3"], "no batch, no channels"),
    "zero pixels": (["--input-shape", "0", "8"], "conv1.weight.*input_shape to be at least 1"),
    "wrong layout": (["--input-shape", "2", "2", "--layout", "HWIO"], "conv1.weight.*looks like OIHW"),
    "no layout": (["--input-shape", "8", "8", "--layout", "NCHW"], "--layout to be a permutation of HWIO.*'NCHW'"),
    "padding": (["--input-shape", "8", "8", "--padding", "same-ish"], "expected padding.*'SAME-ISH'"),
    "no output": (["--input-shape", "2", "2", "--padding", "VALID"], "conv1.weight.*at least one output pixel"),
    "too many strides": (
        ["--input-shape", "8", "8", "--strides", "1", "2", "3"],
        "conv1.weight.*strides to be an int or 2",
    ),
    "stride that is no number": (
        ["--input-shape", "8", "8", "--strides", "two"],
        "--strides: invalid int value: 'two'",
    ),
    "too many pads": (["--input-shape", "8", "8", "--padding", "1", "2", "3"], "conv1.weight.*padding"),
    "nothing selected": (["--input-shape", "8", "8", "--include", "fc"], "no convolution kernels are left"),
    "regex": (["--input-shape", "8", "8", "--include", "("], "not a regular expression"),
    "no such flag": (["--inputshape", "8"], "unrecognized arguments"),
    "no such file of shapes": (["--layers", "nowhere.json"], "not a readable JSON file"),
    "picture's format": (["--input-shape", "8", "8", "--plot", "out.txt"], "expected a picture's suffix"),
    "picture's folder": (["--input-shape", "8", "8", "--plot", "no/where.png"], "folder does not exist"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(name, npz, capsys):
    arguments, message = USAGE[name]
    assert re.search(message, fails(capsys, "report", npz, *arguments))


def test_broken_files(npz, tensors, run, tmp_path, capsys):
    shape = ("--input-shape", 8, 8)
    assert "no such file" in fails(capsys, "report", tmp_path / "nowhere.npz", *shape)
    for path in (npz, tensors):
        for cut in (0, 3, 200, -40):
            broken = tmp_path / ("broken" + Path(path).suffix)
            broken.write_bytes(Path(path).read_bytes()[:cut])
            assert "not a readable" in fails(capsys, "report", broken, *shape)
    data = bytearray(Path(npz).read_bytes())
    data[data.index(TORCH["conv1.weight"].tobytes()) + 5] ^= 1  # caught by the archive's checksum
    broken = tmp_path / "flipped.npz"
    broken.write_bytes(data)
    assert "CRC" in fails(capsys, "report", broken, *shape)
    with zipfile.ZipFile(tmp_path / "version.npz", "w") as archive:
        archive.writestr("kernel.npy", b"\x93NUMPY\x09\x00")
    assert "not a readable .npz" in fails(capsys, "report", tmp_path / "version.npz", *shape)
    np.save(tmp_path / "one.npy", FIRST)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    assert "not a zip file" in fails(capsys, "report", tmp_path / "one.npz", *shape)
    assert "no orbax checkpoint found" in fails(capsys, "report", tmp_path, *shape)
    folder = tmp_path / "7"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "_METADATA").write_text("{")
    assert "not a readable orbax checkpoint" in fails(capsys, "report", folder, *shape)
    (tmp_path / "shapes.json").write_text('{"*": {"input_shape": [8, 8], "stride": 2}}')
    assert "unknown ['stride']" in fails(capsys, "report", npz, "--layers", tmp_path / "shapes.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[8, 8]", r'expected \{"PATTERN": \{"input_shape"'),
        ('{"*": 8}', r'expected \{"PATTERN": \{"input_shape"'),
        ('{"*": {"input_shape": 8}}', "input_shape to be a list of ints.*8"),
        ('{"*": {"input_shape": [8, 8], "stacked": "1"}}', "stacked an int.*'1'"),
        ('{"cnov1": {"input_shape": [8, 8]}}', r"'cnov1' matches no array.*did you mean 'conv1'\?"),
        ('{"bn.running_mean": {"input_shape": [8, 8]}}', r"bn.running_mean: expected a kernel of 4 axes.*\(4,\)"),
        ('{"conv1": {"input_shape": [8, 8], "strife": 2}}', "unknown .'strife'.; expected some of input_shape"),
        ('{"conv1": {"input_shape": [8, 8], "strides": "two"}}', "conv1.weight.*strides to be made of ints"),
        ('{"conv1": {"input_shape": [8, 8], "feature_group_count": 3}}', "multiple of feature_group_count=3"),
        ("[" * 100_000, "not a readable JSON file"),
    ],
)
def test_odd_files_of_shapes(npz, tmp_path, capsys, content, message):
    (tmp_path / "shapes.json").write_text(content)
    assert re.search(message, fails(capsys, "report", npz, "--layers", tmp_path / "shapes.json"))


def test_layouts_given_one_by_one_are_not_assumed(npz, tmp_path, capsys):
    (tmp_path / "shapes.json").write_text('{"conv*": {"input_shape": [8, 8], "kernel_layout": "OIHW"}}')
    facts, _ = report(capsys, npz, "--layers", tmp_path / "shapes.json", "--include", "conv1")
    assert facts["layers"][0]["conv"]["kernel_layout"] == "OIHW" and not facts["notes"]


def test_a_layout_goes_to_kernels_of_other_ranks(tmp_path, capsys):
    np.savez(tmp_path / "net.npz", kernel=FIRST[0])
    facts, _ = report(capsys, tmp_path / "net.npz", "--input-shape", 8, "--layout", "HWIO")
    assert facts["layers"][0]["conv"]["kernel_layout"] == "WIO"


def test_a_picture_that_cannot_be_written(npz, tmp_path, capsys):
    (tmp_path / "taken.png").mkdir()
    line = fails(capsys, "report", npz, *LAYERS, "--plot", tmp_path / "taken.png")
    assert "taken.png: cannot be written" in line


def test_on_a_terminal(npz, capsys, monkeypatch):
    """By rich, with the same figures."""
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", npz, *LAYERS]) == 0
    plain, _ = capsys.readouterr()
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main(["report", npz, *LAYERS]) == 0
    rich, _ = capsys.readouterr()
    figures = re.findall(r"\d+\.\d+", plain)
    assert figures and figures == re.findall(r"\d+\.\d+", re.sub(r"\x1b\[[0-9;]*m", "", rich))
    assert rich != plain


def test_a_reader_that_has_had_enough(npz):
    """No error, as of any command before head."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "opnorm_jax", "report", npz, *LAYERS]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert done.returncode == 0 and "Error" not in done.stderr


def test_what_constrain_refuses(npz, tmp_path, capsys, monkeypatch):
    common = ("--max-norm", 1, *LAYERS)
    link = tmp_path / "link.npz"
    link.symlink_to(npz)
    for out in (npz, link):
        assert "another file" in fails(capsys, "constrain", npz, out, *common, "--force")
    taken = tmp_path / "taken.npz"
    taken.write_text("precious")
    assert "--force" in fails(capsys, "constrain", npz, taken, *common)
    assert "ends in .npz" in fails(capsys, "constrain", npz, tmp_path / "out.safetensors", *common)
    assert "folder does not exist" in fails(capsys, "constrain", npz, tmp_path / "no" / "out.npz", *common)
    for bad in ("0", "-1", "nan", "inf", "one"):
        assert "--max-norm" in fails(capsys, "constrain", npz, tmp_path / "out.npz", "--max-norm", bad, *LAYERS)
    np.savez(tmp_path / "nan.npz", kernel=np.full_like(FIRST, np.nan))
    line = fails(capsys, "constrain", tmp_path / "nan.npz", tmp_path / "out.npz", "--max-norm", 1, *LAYERS[:3])
    assert "NaN or infinity in kernel" in line

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert "disk full" in fails(capsys, "constrain", npz, taken, *common, "--force")
    assert taken.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == names


def test_missing_packages_are_named(tensors, run, npz, tmp_path, capsys, monkeypatch):
    for name in ("safetensors", "orbax.checkpoint", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in ([tensors], [run], [npz, "--plot", "out.png"]):
        line = fails(capsys, "report", *arguments, "--input-shape", 8, 8)
        assert "pip install 'opnorm-jax[cli]'" in line
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    out = tmp_path / "out.safetensors"
    line = fails(capsys, "constrain", run, out, "--max-norm", 1, "--input-shape", 8, 8)
    assert "pip install 'opnorm-jax[cli]'" in line and not out.exists()


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((16, 3, 3, 3), "OIHW"),
        ((64, 32, 3, 3), "OIHW"),
        ((3, 3, 64, 32), "HWIO"),
        ((4, 2, 3, 3), "OIHW"),
        ((3, 3, 4, 2), "HWIO"),
        ((3, 3, 3, 3), None),
        ((16, 16, 3, 768), None),
        ((5, 64, 32), "HWIO"),
        ((32, 64, 5), "OIHW"),
        ((64, 32), None),
    ],
)
def test_layouts_told_by_shape(shape, layout):
    assert layers._by_shape(shape) == layout


def test_names_and_shapes_must_agree(tmp_path, capsys):
    shape = ("--input-shape", 8, 8)
    for arrays, message in (
        ({"conv.weight": FIRST}, "names and shapes disagree about"),
        ({"conv.weight": FIRST, "other.kernel": FIRST}, "names and shapes disagree about"),
        ({"conv": FIRST[:, :, :1, :1]}, "nothing tells"),
    ):
        np.savez(tmp_path / "net.npz", **arrays)
        assert message in fails(capsys, "report", tmp_path / "net.npz", *shape)
    facts, err = report(capsys, tmp_path / "net.npz", *shape, "--layout", "HWIO")
    assert facts["layers"][0]["conv"]["kernel_layout"] == "HWIO" and "layout" not in err


@pytest.mark.parametrize(
    "given, expected",
    [
        (["same"], "SAME"),
        (["1"], ((1, 1), (1, 1))),
        (["1", "2"], ((1, 1), (2, 2))),
        (["-1"], ((-1, -1), (-1, -1))),
    ],
    ids=str,
)
def test_padding_by_flag(given, expected, npz):
    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    options = parser.parse_args(["--input-shape", "8", "8", "--padding", *given])
    found = layers.find_kernels(checkpoint.open_checkpoint(npz), options)
    assert {conv.padding for conv in found.convs.values()} == {expected}


def test_pads_of_two_sides_by_file(npz, tmp_path, capsys):
    (tmp_path / "layers.json").write_text('{"conv1": {"input_shape": [8, 8], "padding": [[0, 1], 2]}}')
    facts, _ = report(capsys, npz, "--layers", tmp_path / "layers.json", "--include", "conv1")
    assert facts["layers"][0]["conv"]["padding"] == [[0, 1], [2, 2]]


def test_temporary_files_vanish_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoint.atomic_write(tmp_path / "out") as temporary:
        assert temporary.parent == tmp_path
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
