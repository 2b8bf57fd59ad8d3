"""A run's diary: one JSON line for every fault, recovery and goodput entry, in events.jsonl.

Also the one way that a run's JSON lines are written (`json_line`), so that every file of a run
spells numbers alike: floats exactly (the shortest text that reads back to the same bits), and
the three values that JSON has no number for as the strings "nan", "inf" and "-inf", which
`float()` reads back.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

RESERVED = ("time", "event")
"""Keys that the log itself writes."""


def _spell(value: Any) -> Any:
    """`value` with every non-finite float as its string, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    return value


def json_line(fields: Mapping[str, Any]) -> str:
    """`fields` as one line of valid JSON with its line end; other objects become their text."""
    return json.dumps(_spell(fields), default=str, allow_nan=False) + "\n"


class EventLog:
    """Appends events to a file, each one handed to the operating system before `record` returns.

    A line cut short by a kill stays where it is, and the next event starts a line of its own.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: the file to append to; None writes nothing (ranks other than 0)."""
        self.path = path
        self._file: IO[bytes] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._end_cut_line()

    def _end_cut_line(self) -> None:
        assert self._file is not None
        if self._file.seek(0, os.SEEK_END) > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def record(self, event: str, /, *, durable: bool = False, **fields: Any) -> None:
        """Append `event`, with Unix seconds as `time` and whatever `fields` tell of it.

        Args:
            event: its name, such as "checkpoint_saved".
            durable: return only when the line is on disk; for faults, after which the machine
                may go.
            fields: what it was about.

        Raises:
            ValueError: a field is called as one of the log's own keys.
        """
        for key in RESERVED:
            if key in fields:
                raise ValueError(f"event {event}: field {key!r} is the log's own; rename it")
        if self._file is None:
            return
        line = json_line({"time": time.time(), "event": event, **fields})
        self._file.write(line.encode())
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def on_event(self, event: str, fields: Mapping[str, Any]) -> None:
        """`record` in the form that parts below call back with; always durable."""
        self.record(event, durable=True, **fields)

    def close(self) -> None:
        """Put the file on disk and close it; nothing is recorded from then on."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file, in order; cut or damaged ones are left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and text.endswith("\n"):
                yield line
