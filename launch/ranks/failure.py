"""How a run's failure is told: the rank that failed first, not those that failed because it did."""

import re
import signal
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from phalanx.checkpoint.errors import CheckpointError
from phalanx.parallel.deliberate import is_deliberate

_FOLLOWS = re.compile(
    r"connection (was )?(closed|reset|aborted) by (the )?(remote )?peer|connection closed|"
    r"broken pipe|failed to (recv|send), got \d+ bytes|socket closed|recvvalue failed|"
    r"remote process exited|distnetworkerror|ncclremoteerror|store->get",
    re.IGNORECASE,
)
"""What a rank says when a peer has gone."""
_CRASH = "Fatal Python error: "
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
TAIL_LINES = 20
GRACE_S = 5.0
"""How long the others may take to end by themselves once a rank has failed."""


class Stopped(RuntimeError):
    """Ranks that could not stop at a step's end were ended by the signal that asked them to."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name} before the ranks could end a step"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's end, in order of notice."""

    rank: int
    host: str
    text: str
    """Traceback, or what killed it."""
    message: str = ""
    """Of an error whose message says all: see `message_of`."""
    log: str = ""
    """Path of the file that has the traceback, if one has."""

    @classmethod
    def caught(cls, error: BaseException, *, rank: int, log: TextIO | None) -> "Failure":
        """What this process, a rank, has just caught; its traceback goes to the log."""
        text = traceback.format_exc()
        if log is not None:
            log.write(text)
        return cls(
            rank=rank,
            host=socket.gethostname(),
            text=text,
            message=message_of(error),
            log="" if log is None else log.name,
        )

    @property
    def follows(self) -> bool:
        """Whether this looks like the effect of another rank's failure."""
        return _FOLLOWS.search(self.text) is not None

    @property
    def last_words(self) -> str:
        """What is shown: the traceback, unless the message says all and a log has the traceback."""
        name = f"phalanx: rank {self.rank} on {self.host} failed"
        if self.message and self.log:
            return f"phalanx: error: {self.message}\n{name}; its traceback is in {self.log}"
        return f"{self.text.rstrip()}\n{name}"


def message_of(error: BaseException) -> str:
    """The message of an error that is about what the user gave or the run's surroundings; "" where
    it is, or may be, a defect.

    That is a ValueError, or a CheckpointError that is called none, which a `raise` of this project
    made: one that torch raised keeps its traceback.
    """
    if not is_deliberate(error):
        return ""
    if isinstance(error, ValueError):
        return str(error)
    return str(error) if isinstance(error, CheckpointError) and not error.defect else ""


def first_failure(failures: list[Failure]) -> "RankFailed":
    """The failure to show: the earliest that no other rank's failure explains."""
    first = next((failure for failure in failures if not failure.follows), failures[0])
    return RankFailed(first)


class RankFailed(RuntimeError):
    """A rank raised, or died."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.rank = failure.rank
        self.traceback_text = failure.text
        self.last_words = failure.last_words

    def __str__(self) -> str:
        return self.last_words


def death(status: int, log: Path | None) -> str:
    """Words for a rank that ended without a traceback: `status` as subprocess returns it."""
    if status < 0:
        name = signal.Signals(-status).name
        text = f"killed by {name} (signal {-status})"
        if -status == signal.SIGKILL:
            text += "; when nobody sent it, the machine ran out of memory (see `dmesg`)"
    else:
        text = f"ended with exit code {status} and no result"
    said = log.read_text(errors="replace") if log is not None and log.exists() else ""
    if -status in _CRASHES and _CRASH in said:
        return f"{text}\n{_crash(said)}\nmore in {log}"
    tail = "\n".join(said.splitlines()[-TAIL_LINES:])
    return f"{text}\nlast lines of {log}:\n{tail}" if tail else text


def _crash(said: str) -> str:
    """What Python's fault handler said last: why, and what the thread did that crashed."""
    why, *threads = said.rpartition(_CRASH)[2].split("\n\n")
    current = [thread for thread in threads if thread.startswith("Current thread")]
    return "\n".join([_CRASH + why, *(current or ["in a thread that runs no Python"])])
