"""A wish to stop, heard between steps: SIGTERM, SIGINT or a call sets a flag, and no more.

The loop asks `requested` at the end of a step, agrees with the other ranks (signals do not reach
all of them at the same step), saves and leaves by the front door.
"""

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that turns signals into a flag, and gives the old handlers back at exit.

    Only a process's main thread may install handlers. Entered in another thread (a worker that a
    framework runs in one), it leaves the handlers alone, `listening` is False, and `request` is
    the only way to stop.
    """

    def __init__(self, signals: Iterable[signal.Signals] = DEFAULT_SIGNALS) -> None:
        self._signals = tuple(signals)
        self._old: dict[signal.Signals, Any] = {}
        self._reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether someone asked to stop."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Who asked first: a signal's name such as "SIGTERM", or what `request` was told."""
        return self._reason

    @property
    def listening(self) -> bool:
        """Whether signals are heard."""
        return bool(self._old)

    def request(self, reason: str) -> None:
        """Ask to stop; the first reason is kept, later ones change nothing."""
        if self._reason is None:
            self._reason = reason

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._old[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()
