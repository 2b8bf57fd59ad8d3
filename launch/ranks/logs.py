"""Where a rank's output goes: its log file, and for rank 0 the terminal too."""

import io
import os
import sys
from pathlib import Path
from typing import TextIO


class Tee(io.TextIOBase):
    """Writes to the terminal and to a log; looks like the terminal to who asks.

    A progress bar rewrites its line after a carriage return: the log gets each line's last form.
    """

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal = terminal
        self._log = log
        self._line = ""

    def write(self, text: str) -> int:
        self._terminal.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.write(line.rstrip("\r").rpartition("\r")[2] + "\n")
        self._line = self._line.rpartition("\r")[2] if len(self._line) > 4096 else self._line
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()
        self._log.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding


def redirect(*, rank: int, log_dir: Path | None) -> TextIO | None:
    """Point this process's output at its log; returns the log.

    Without `log_dir` output stays as it is. Rank 0 keeps the terminal and copies what Python
    writes; of the others everything goes to the log, C++ libraries' messages too.
    """
    if log_dir is None:
        return None
    log_dir.mkdir(parents=True, exist_ok=True)
    log = (log_dir / f"rank{rank}.log").open("a", buffering=1, errors="replace")
    if rank == 0:
        sys.stdout = Tee(sys.stdout, log)  # type: ignore[assignment]
        sys.stderr = Tee(sys.stderr, log)  # type: ignore[assignment]
    else:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return log
