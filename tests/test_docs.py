"""The documentation's code runs as printed; the networks it trains are measured by the oracle, not by the library."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from oracle import dense_matrix

import opnorm_jax as oj

PAGES = sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.md"))
BLOCKS = [
    (f"{page.stem} {number}", block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
FRAMEWORKS = dict(
    zip(("linen", "nnx", "equinox", "haiku", "lax"), [b for n, b in BLOCKS if n.startswith("frameworks")])
)


@pytest.mark.parametrize("block", [block for n, block in BLOCKS if not n.startswith("frameworks")])
def test_code_runs(block):
    exec(compile(block, "docs", "exec"), {})


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(name):
    """Same network, same convolutions; and after training every layer's dense matrix has norm <= 0.5."""
    pytest.importorskip({"linen": "flax", "nnx": "flax", "lax": "jax"}.get(name, name))
    space: dict = {}
    exec(compile(FRAMEWORKS[name], f"docs/frameworks.md, {name}", "exec"), space)
    kernels, convs = (jax.tree.leaves(space[key], is_leaf=lambda node: node is None) for key in ("params", "convs"))
    assert len(kernels) == len(convs)
    found = [(kernel, conv) for kernel, conv in zip(kernels, convs) if conv is not None]
    layout = "OIHW" if name == "equinox" else "HWIO"
    options = {"kernel_layout": layout, "padding": ((1, 1), (1, 1))}
    expected = [
        oj.Conv((8, 8), **options),
        oj.Conv((8, 8), strides=2, **options | {"padding": ((0, 1), (0, 1))}),
        oj.Conv((4, 4), kernel_layout=layout, padding="CIRCULAR"),
    ]
    assert sorted(map(str, expected)) == sorted(str(conv) for _, conv in found)
    for kernel, conv in found:
        canonical = np.asarray(kernel).transpose([layout.index(letter) for letter in "HWIO"])
        matrix = dense_matrix(canonical, conv.input_shape, strides=conv.strides, padding=conv.padding)
        assert 0.4 < np.linalg.norm(matrix, 2) <= 0.5 * (1 + 1e-5)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
