"""The map of rooms is whole, and every path that CONTRIBUTING names is there."""

import re

import pytest

from tests import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FLOORS = ("launch", "bench", "train", "fault", "checkpoint", "parallel")


@pytest.mark.parametrize("floor", FLOORS)
def test_every_room_is_on_the_map(floor: str) -> None:
    table = TEXT.split(f"| room of `{floor}/`")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w/.]+)`", table.split("|---|---|")[1]))
    rooms = {path.name for path in (ROOT / floor).glob("*.py")} - {"__init__.py"}
    rooms |= {f"{path.parent.name}/" for path in (ROOT / floor).glob("*/__init__.py")}
    assert rooms - named == set()


def test_every_path_is_there() -> None:
    floors = "|".join((*FLOORS, "configs", "tests"))
    paths = set(re.findall(rf"`((?:{floors})/[\w/]*(?:\.py)?)`", TEXT))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_name_is_in_its_file() -> None:
    named = re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", TEXT)
    assert len(named) > 8
    for path, name in named:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (ROOT / path).read_text()), name
