"""The README's code runs as printed, and its commands are the ones that CI runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {n}" for n in range(len(BLOCKS))])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_one():
    assert BLOCKS


def test_it_is_short():
    assert len(README.split()) <= 900


def test_commands_name_files_and_extras_that_exist():
    commands = re.findall(r"<!-- (run|test) command -->\n```bash\n(.*?)\n```", README)
    assert [name for name, _ in commands] == ["run", "test"]
    project = (ROOT / "pyproject.toml").read_text()
    for name, command in commands:
        assert f"\n{'train' if name == 'run' else 'test'} = [" in project and "pip install -e" in command
    assert (ROOT / "train" / "cifar.py").is_file()


def test_links_lead_somewhere():
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (ROOT / target).exists(), target
