"""Imports run one way only, as docs/architecture.md says."""

import re
from pathlib import Path

import opnorm_jax as oj

PACKAGE = Path(oj.__file__).parent
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "architecture.md").read_text()
ROOMS = re.findall(r"^\| `(_\w+)(?:\.py|/)` \|", PAGE.split("\n## ")[0], re.MULTILINE)


def test_the_page_lists_every_room():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.name.startswith("_") and not path.name.startswith("__")}
    assert set(ROOMS) == rooms


def test_a_room_imports_only_rooms_listed_before_it():
    for room in ROOMS:
        modules = (PACKAGE / room).glob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
        for module in modules:
            for imported in re.findall(r"^ *(?:from|import) opnorm_jax\.(\w+)", module.read_text(), re.MULTILINE):
                assert ROOMS.index(imported) <= ROOMS.index(room), (module.name, imported)
