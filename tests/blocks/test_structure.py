"""What the layout promises: imports run downward, and static geometry needs no jax."""

import ast
from pathlib import Path

import pytest

import opnorm_jax

PACKAGE = Path(opnorm_jax.__file__).parent


def imported(path):
    """The modules of this package that a file imports at its top level, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_geometry_and_rounding_use_no_jax():
    for name in ("_geometry.py", "_rounding.py"):
        assert not [m for m in imported(PACKAGE / name) if m.split(".")[0] == "jax"], name


@pytest.mark.parametrize("path", sorted((PACKAGE / "_blocks").glob("*.py")), ids=lambda path: path.name)
def test_blocks_know_no_convolution(path):
    forbidden = ("opnorm_jax._conv", "opnorm_jax._kernel", "opnorm_jax._program", "opnorm_jax._tree")
    assert not [m for m in imported(path) if m.startswith(forbidden)]


@pytest.mark.parametrize("path", sorted((PACKAGE / "_kernel").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_no_trees(path):
    assert not [m for m in imported(path) if m.startswith(("opnorm_jax._program", "opnorm_jax._tree"))]


@pytest.mark.parametrize("folder", ["", "_blocks", "_cli", "_kernel", "_program", "_tree"])
def test_no_function_takes_more_than_six_arguments(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                # The options that users choose from by name are keyword-only, and do not count.
                assert len(node.args.posonlyargs) + len(node.args.args) <= 6, f"{path.name}: {node.name}"
