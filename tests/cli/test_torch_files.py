"""Files that PyTorch wrote: what the command says of a layer, against that layer's own Jacobian in PyTorch.

Skipped where torch is not installed.
"""

import json
import re

import numpy as np
import pytest
from oracle import torch_jacobian

from opnorm_jax._cli.main import main

torch = pytest.importorskip("torch", reason="torch is not installed")
import safetensors.torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm, weight_norm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(network, path):
    safetensors.torch.save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


def report(capsys, *args):
    assert main(["report", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# name: (layer, its input's size, what the file of layers says besides the shape)
LAYERS = {
    "plain": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 7), {"padding": 1}),
    "strided": (lambda: nn.Conv2d(3, 5, 3, padding=1, stride=2), (6, 7), {"padding": 1, "strides": 2}),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (7, 6), {"padding": 2, "kernel_dilation": 2}),
    "1-D": (lambda: nn.Conv1d(3, 4, 5, padding=2), (9,), {"padding": 2}),
    "3-D": (lambda: nn.Conv3d(2, 3, 3, padding=1), (3, 4, 3), {"padding": 1}),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (6, 6), {"padding": 1, "feature_group_count": 2}),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 6), {"padding": 1, "feature_group_count": 6}),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (6, 5), {"padding": "CIRCULAR"}),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (6, 5), {"padding": "REFLECT"}),
    "replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (6, 5), {"padding": "EDGE"}),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        (4, 5),
        {"input_dilation": 2, "padding": 2, "kernel_layout": "IOHW"},
    ),
    "transposed, output padding": (
        lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        (4, 5),
        {"input_dilation": 2, "padding": [[2, 1], [2, 1]], "kernel_layout": "IOHW"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_as_described(name, tmp_path, capsys):
    torch.manual_seed(0)
    make, size, options = LAYERS[name]
    net = nn.Sequential(make())
    path, rules = saved(net, tmp_path / "net.safetensors"), tmp_path / "layers.json"
    rules.write_text(
        json.dumps({"0": {"input_shape": size, "kernel_layout": "OI" + "DHW"[3 - len(size) :], **options}})
    )
    channels = net[0].in_channels
    true = np.linalg.svd(torch_jacobian(net, channels, size), compute_uv=False)
    (row,) = report(capsys, path, "--layers", rules, "--smallest")["layers"]
    assert row["lower"] <= true[0] * (1 + 1e-6) and true[0] <= row["upper"]
    assert row["norm"] == pytest.approx(true[0], rel=1e-5)
    if net[0].groups == 1 and row["smallest_of"] == "layer":
        assert row["smallest"] == pytest.approx(true[-1], abs=2e-6 * true[0])
    out, bound = tmp_path / "out.safetensors", 0.7 * true[0]
    command = ["constrain", path, out, "--max-norm", f"{bound:.6f}", "--constraint", "project", "--layers", rules]
    assert main([*map(str, command)]) == 0
    net.load_state_dict(safetensors.torch.load_file(out))
    assert np.linalg.norm(torch_jacobian(net, channels, size), 2) <= bound * (1 + 1e-5)


NORMALISED = {
    "weight_norm": (weight_norm, remove_weight_norm),
    "weight_norm, parametrization": (
        parametrizations.weight_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "spectral_norm, parametrization": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_factors_are_refused_until_they_are_removed(name, tmp_path, capsys):
    torch.manual_seed(0)
    wrap, unwrap = NORMALISED[name]
    net = nn.Sequential(wrap(nn.Conv2d(3, 4, 3, padding=1)), nn.Conv2d(4, 4, 3, padding=1)).eval()
    path = saved(net, tmp_path / "net.safetensors")
    common = ["--input-shape", 6, 6, "--padding", 1]
    rows = report(capsys, path, *common)["layers"]
    assert [row["path"] for row in rows if not row["reason"]] == ["1.weight"]
    assert all("computed from" in row["reason"] for row in rows if row["reason"]) and len(rows) > 1
    with pytest.raises(SystemExit):
        main([*map(str, ["constrain", path, tmp_path / "out.safetensors", "--max-norm", 1, *common])])
    assert re.search("0.*computed from", capsys.readouterr().err)
    unwrap(net[0])
    true = np.linalg.norm(torch_jacobian(nn.Sequential(net[0]), 3, (6, 6)), 2)
    rows = {row["path"]: row for row in report(capsys, saved(net, path), *common)["layers"]}
    assert rows["0.weight"]["norm"] == pytest.approx(true, rel=1e-5)


def test_batch_norm_is_folded(tmp_path, capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
    with torch.no_grad():
        net[1].weight.uniform_(-2, 2)
        net[1].running_var.uniform_(0.1, 3)
    net.eval()
    true = np.linalg.norm(torch_jacobian(net, 3, (6, 6)), 2)
    path = saved(net, tmp_path / "net.safetensors")
    facts = report(capsys, path, "--input-shape", 6, 6, "--padding", 1, "--fold-batch-norm")
    assert facts["batch_norms"] == {"0.weight": "1"}
    (row,) = facts["layers"]
    assert row["lower"] <= true * (1 + 1e-6) and true <= row["upper"]


def test_layers_that_are_misdescribed_are_hinted_at(tmp_path, capsys):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1),
        nn.Conv2d(6, 3, 3, padding=1),
    )
    hints = report(capsys, saved(net, tmp_path / "net.safetensors"), "--input-shape", 6, 6, "--padding", 1)["hints"]
    assert [(hint.split()[0], "depthwise" in hint) for hint in hints] == [("1.weight", True), ("3.weight", False)]
    assert "transposed" in hints[1]
