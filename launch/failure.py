"""How a run's failure is told: the rank that failed first, not those that failed because it did."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


class BadInput(ValueError):
    """Something that the user wrote, told in one line; not a defect of the program."""


@contextmanager
def user_input() -> Iterator[None]:
    """Inside, a ValueError is about what the user wrote."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


class RankFailed(RuntimeError):
    """A rank raised, or died."""

    def __init__(self, rank: int, host: str, traceback_text: str) -> None:
        super().__init__(rank, host, traceback_text)
        self.rank = rank
        self.host = host
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        return f"{self.traceback_text.rstrip()}\nrank {self.rank} on {self.host} failed"


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

    @property
    def follows(self) -> bool:
        """Whether this looks like the effect of another rank's failure."""
        return _FOLLOWS.search(self.text) is not None


def first_failure(failures: list[Failure]) -> RankFailed:
    """The failure to show: the earliest that no other rank's failure explains."""
    first = next((failure for failure in failures if not failure.follows), failures[0])
    return RankFailed(first.rank, first.host, first.text)


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
