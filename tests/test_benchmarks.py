"""The benchmarks run, at sizes that take seconds; their figures are not judged here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import THOROUGH

from benchmarks.measure import RESULTS
from benchmarks.tables import DOCS, filled

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


def test_pages_hold_the_tables_of_the_results():
    for page in DOCS.glob("*.md"):
        assert filled(page, RESULTS) == page.read_text(), "python -m benchmarks --table writes them"


def test_tables_are_made_from_the_results():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--table"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| spectrum; ours |" in done.stdout
