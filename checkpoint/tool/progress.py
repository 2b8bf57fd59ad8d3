"""A bar of bytes on a terminal; where output is kept, nothing."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


class Bytes:
    """Counts bytes done, from any thread."""

    def __init__(self, bar: tqdm | None) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self.done = 0

    def __call__(self, count: int) -> None:
        """`count` more are done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(count)


@contextmanager
def byte_bar(what: str, total: int, *, stream: TextIO | None = None) -> Iterator[Bytes]:
    """A bar over `total` bytes on `stream` (standard error), where that is a terminal."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield Bytes(None)
        return
    bar = tqdm(
        total=total,
        desc=what,
        file=stream,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        leave=False,
    )
    with bar:
        yield Bytes(bar)
