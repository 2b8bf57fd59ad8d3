"""What of a restore stands: a file of lines in its target, one a unit, each with its checksum.

A line may speak of data that a power cut has taken: whoever goes on reads the data again and
believes the checksum, not the line.
"""

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phalanx.checkpoint.errors import BrokenCheckpointError

NAME = "restore.journal"
VERSION = 1


class Journal:
    """The journal of one restore, held by one process at a time.

    Args:
        facts: what must be the same whenever the restore goes on, see `begun`; `unit_bytes` is
            kept as it was at the beginning.

    Raises:
        ValueError: another restore is at work here, or began here with other facts.
        BrokenCheckpointError: the journal is damaged.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(f"{path.parent}: another restore is at work here") from None
        self.facts = dict(facts)
        self.done: dict[int, str] = {}
        """Checksums of units that stand, by number."""
        try:
            lines = self._whole_lines()
            if not lines:
                self._append(self.facts)
                return
            self.facts = begun(lines[0], facts, folder=str(path.parent), own="unit_bytes", kind=int)
        except BaseException:
            self.close()
            raise
        for line in lines[1:]:
            if "forget" in line:
                self.done.pop(line["forget"], None)
            else:  # a line that is damaged names no unit, or one whose checksum fails
                self.done[line.get("unit", -1)] = str(line.get("xxh3_64"))

    def add(self, unit: int, digest: str) -> None:
        """A unit stands."""
        self._append({"unit": unit, "xxh3_64": digest})

    def forget(self, unit: int) -> None:
        """A unit does not stand after all."""
        self._append({"forget": unit})

    def sync(self) -> None:
        """Make the lines durable."""
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            os.write(self._file, json.dumps(line).encode() + b"\n")

    def _whole_lines(self) -> list[dict[str, Any]]:
        """What was written to its end; what was not is cut off."""
        text = self._path.read_bytes()
        lines, length = [], 0
        for line in text.splitlines(keepends=True):
            try:
                found = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(found, dict):
                break
            lines.append(found)
            length += len(line)
        os.ftruncate(self._file, length)
        return lines


def begun(
    before: object, facts: Mapping[str, Any], *, folder: str, own: str, kind: type
) -> dict[str, Any]:
    """What a journal says of the restore that began in `folder`, as it must be this one.

    Args:
        before: its first line, as JSON holds it.
        facts: of this restore.
        own: what else the line says and may differ, of type `kind`.

    Raises:
        ValueError: the restore there is another.
        BrokenCheckpointError: the journal is damaged.
    """
    if not isinstance(before, dict) or not isinstance(before.get(own), kind):
        raise BrokenCheckpointError(
            f"{folder}/{NAME}: is damaged; delete its folder, and start anew"
        )
    for key, value in facts.items():
        if key != own and before.get(key) != value:
            raise ValueError(
                f"{folder}: a restore with {key}={before.get(key)!r} goes on here, not one with "
                f"{key}={value!r}; give the same arguments, or delete the folder"
            )
    return before
