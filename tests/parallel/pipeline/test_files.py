"""Schedules in files: the same when read again, and refused with a reason when they cannot run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.parallel.pipeline.files import load_schedule, save_schedule
from phalanx.parallel.pipeline.schedules.registry import GENERATORS, make_schedule


@pytest.mark.parametrize("name", GENERATORS)
def test_read_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    schedule = make_schedule(name, num_ranks=3, num_microbatches=5)
    save_schedule(schedule, tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == schedule


def test_a_file_has_one_line_a_rank(tmp_path: Path) -> None:
    save_schedule(make_schedule("1f1b", num_ranks=2, num_microbatches=2), tmp_path / "s.json")
    lines = (tmp_path / "s.json").read_text().splitlines()
    assert '    "0F0 0F1 0BW0 0BW1",' in lines
    assert '    "1F0 1BW0 1F1 1BW1"' in lines


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({key: value})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_set("format", "other"), "no schedule"),
        (_set("version", 2), "version 2"),
        (lambda data: data.pop("placement"), "'placement' is missing"),
        (_set("colour", "red"), "'colour' is unknown"),
        (_set("name", 3), "name 3"),
        (_set("num_microbatches", "2"), "num_microbatches: '2'"),
        (_set("num_microbatches", True), "num_microbatches: True"),
        (_set("num_microbatches", 0), "num_microbatches: 0"),
        (_set("placement", "01"), "placement"),
        (_set("placement", [0, -1]), "placement: -1"),
        (_set("placement", [0, 0]), "ranks"),
        (_set("orders", ["0F0", 1]), "orders"),
        (_set("orders", ["0F0 0X0", "1F0 1BW0"]), "rank 0: '0X0'"),
        (_set("orders", ["0F0 0F1 0BW0", "1F0 1BW0 1F1 1BW1"]), "0B1 is missing"),
        (_set("orders", ["0F0 0F0 0F1 0BW0 0BW1", "1F0 1BW0 1F1 1BW1"]), "0F0 is done 2 times"),
        (_set("orders", ["0F0 0BW0 0F1 0BW1", "1F0 1F1 1BW0 1BW1"]), "0BW0"),
        (_set("orders", ["0F1 0F0 0BW0 0BW1", "1F0 1BW0 1F1 1BW1"]), "0F1 comes before 0F0"),
        (_set("orders", ["0F0 0F1 0BW0 0BW1", "1F0 1BW0 1F1 2BW1"]), "2BW1"),
    ],
)
def test_what_cannot_run_is_refused(
    spoil: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.json"
    save_schedule(make_schedule("1f1b", num_ranks=2, num_microbatches=2), path)
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="spoilt.json") as raised:
        load_schedule(path)
    assert reason in str(raised.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"3"])
def test_what_is_no_schedule_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"s.json: no "):
        load_schedule(tmp_path / "s.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_schedule(tmp_path / "s.json")
