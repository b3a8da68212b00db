"""The promise table names tests that exist, and the fast tests check something of every promise."""

import ast
import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_named_exists():
    table = (HERE.parent / "docs" / "guarantees.md").read_text()
    source = {path.name: path.read_text() for path in HERE.rglob("test_*.py")}
    files = set(re.findall(r"`(test_\w+\.py)", table))
    assert len(files) > 15 and files <= set(source)
    functions = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+?)(\*?)`", table))
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(source.values()), re.M))
    for name, star in functions:
        assert any(other.startswith(name) if star else other == name for other in defined), name


def fast_tests(source):
    """The tests of a file of which ``-m "not slow"`` runs at least one case."""
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    slow = lambda node: any(ast.unparse(mark).startswith("pytest.mark.slow") for mark in node.decorator_list)
    return {node.name for node in functions if node.name.startswith("test_") and not slow(node)}


def test_every_promise_has_a_fast_case():
    table = (HERE.parent / "docs" / "guarantees.md").read_text()
    fast = {path.name: fast_tests(path.read_text()) for path in HERE.rglob("test_*.py")}
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*`test_[^|]*) \|[^|]*\|$", table, re.M)
    assert len(rows) > 60
    for promise, tests in rows:
        named = [name.replace("*", r"\w*") for name in re.findall(r"\b(test_\w+\*?)[`,]", tests)]
        of_files = [fast[name] for name in re.findall(r"test_\w+\.py", tests)] or fast.values()
        candidates = set().union(*of_files)
        assert any(re.fullmatch("|".join(named) or ".*", name) for name in candidates), promise


def test_the_table_of_attacks_is_what_was_counted():
    counted = json.loads((HERE.parent / "docs" / "attack.json").read_text())
    section = (HERE.parent / "docs" / "guarantees.md").read_text().split("## Under attack")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| ([\d,]+) \|$", section, re.M)
    table = {surface: (int(tried.replace(",", "")), int(held.replace(",", ""))) for surface, tried, held in rows}
    assert table == {surface: (trials["tried"], trials["held"]) for surface, trials in counted["trials"].items()}
    assert all(tried == held > 0 for tried, held in table.values())
    assert f"jax {counted['jax']}" in section and counted["profile"] == "thorough"
