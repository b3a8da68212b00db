"""The promise table names tests that exist."""

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
