"""events.jsonl: one valid line an event, through kills."""

import json
import math
import time
from pathlib import Path

import pytest

from phalanx.fault.events import EventLog, json_line, read_lines


def test_events_are_lines_with_time_and_name(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    begin = time.time()
    with EventLog(path) as log:
        log.record("started", world_size=4)
        # On file before close: what a kill would leave.
        assert [line["event"] for line in read_lines(path)] == ["started"]
        log.on_event("checkpoint_skipped", {"step": 7, "reason": "no manifest"})
    first, second = read_lines(path)
    assert first["world_size"] == 4
    assert second == {
        "time": second["time"],
        "event": "checkpoint_skipped",
        "step": 7,
        "reason": "no manifest",
    }
    assert begin <= first["time"] <= second["time"] <= time.time()


def test_appends_after_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1.0, "event": "a"}\n{"time": 2.0, "ev')
    with EventLog(path) as log:
        log.record("b", durable=True)
    assert [line["event"] for line in read_lines(path)] == ["a", "b"]
    assert path.read_text().count("\n") == 3


def test_null_log_writes_nothing(tmp_path: Path) -> None:
    with EventLog(None) as log:
        log.record("started")
    assert list(tmp_path.iterdir()) == []


def test_reserved_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="'time'"):
        EventLog(None).record("started", time=3)


def test_floats_are_exact_and_lines_valid() -> None:
    values = [0.1, 1 / 3, 1e-310, math.inf, -math.inf, math.nan]
    line = json_line({"values": values, "path": Path("a/b")})
    assert line.endswith("\n")
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert parsed["values"][:3] == values[:3]
    assert parsed["values"][3:] == ["inf", "-inf", "nan"]
    assert [float(value) for value in parsed["values"][3:5]] == values[3:5]
    assert parsed["path"] == "a/b"
