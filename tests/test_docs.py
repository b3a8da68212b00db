"""The site's code runs as printed. The networks that it trains are measured by the oracle, not by the library."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from oracle import dense_matrix

import opnorm_jax as oj

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TUTORIALS = [page.stem for page in PAGES if page.parent.name == "tutorials"]
BLOCKS = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in PAGES
    if page.parent.name != "tutorials" and page.stem != "frameworks"
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
FRAMEWORKS = dict(
    re.findall(
        r"^## .*?(\w+)`?\n.*?^```python\n(.*?)^```", (DOCS / "frameworks.md").read_text(), re.DOTALL | re.MULTILINE
    )
)


def require(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block):
    if "import keras" in block:
        require("keras")
    exec(compile(block, "docs", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial(name, tmp_path):
    """A page is one program: its Python from top to bottom, its commands where they stand, its output as printed."""
    page = (DOCS / "tutorials" / f"{name}.md").read_text()
    script, printed = ["import subprocess"], []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "python":
            script.append(f"print('<<<')\n{block}\nprint('>>>')")
            printed.append(None)
        elif language == "bash":
            command = re.sub("^opnorm ", f"{shlex.quote(sys.executable)} -m opnorm_jax ", block, flags=re.MULTILINE)
            script.append(f"subprocess.run({command!r}, shell=True, check=True, stdout=subprocess.DEVNULL)")
        elif language == "text":
            printed[-1] = block
        else:
            assert language == "console"  # output that differs a little between machines
    path = tmp_path / "tutorial.py"
    path.write_text("\n".join(script))
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = re.findall(r"<<<\n(.*?)>>>\n", done.stdout, re.DOTALL)
    assert len(outputs) == len(printed)
    for output, expected in zip(outputs, printed):
        assert expected is None or output == expected


@pytest.mark.parametrize("name", [pytest.param(f, marks=[] if f == "lax" else pytest.mark.slow) for f in FRAMEWORKS])
def test_frameworks(name):
    """Same network, same convolutions; and after training every layer's dense matrix has norm <= 0.5."""
    require({"Linen": "flax", "NNX": "flax", "lax": "jax"}.get(name, name.lower()))
    space: dict = {}
    exec(compile(FRAMEWORKS[name], f"docs/frameworks.md, {name}", "exec"), space)
    kernels, convs = (jax.tree.leaves(space[key], is_leaf=lambda node: node is None) for key in ("params", "convs"))
    assert len(kernels) == len(convs)
    found = [(kernel, conv) for kernel, conv in zip(kernels, convs) if conv is not None]
    layout = "OIHW" if name == "Equinox" else "HWIO"
    expected = [
        oj.Conv((8, 8), kernel_layout=layout, padding=1),
        oj.Conv((8, 8), kernel_layout=layout, padding=((0, 1), (0, 1)), strides=2),
        oj.Conv((4, 4), kernel_layout=layout, padding="CIRCULAR"),
    ]
    assert sorted(map(str, expected)) == sorted(str(conv) for _, conv in found)
    for kernel, conv in found:
        canonical = np.asarray(kernel).transpose([layout.index(letter) for letter in "HWIO"])
        matrix = dense_matrix(canonical, conv.input_shape, strides=conv.strides, padding=conv.padding)
        assert 0.4 < np.linalg.norm(matrix, 2) <= 0.5 * (1 + 1e-5)


def test_six_frameworks_and_six_tutorials():
    assert list(FRAMEWORKS) == ["Linen", "NNX", "Equinox", "Haiku", "Keras", "lax"] and len(TUTORIALS) == 6


def test_every_public_name_is_in_the_reference():
    entries = re.findall(r"^::: opnorm_jax\.(\w+)$", "\n".join(p.read_text() for p in (DOCS / "api").iterdir()), re.M)
    assert sorted(entries) == oj.__all__


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
