"""A limit on bytes per second that any number of threads share."""

import time
from threading import Lock


class RateLimit:
    """A token bucket that holds a quarter of a second's bytes.

    Args:
        bytes_s: bytes per second; 0 = no limit.
    """

    def __init__(self, bytes_s: float) -> None:
        assert bytes_s >= 0
        self.bytes_s = bytes_s
        self._lock = Lock()
        self._tokens = self._capacity = bytes_s / 4
        self._filled_at = time.monotonic()

    def take(self, count: int) -> None:
        """Wait until `count` more bytes are allowed; those of any size are, one after the other."""
        if not self.bytes_s:
            return
        with self._lock:
            now = time.monotonic()
            gained = (now - self._filled_at) * self.bytes_s
            self._tokens = min(self._capacity, self._tokens + gained) - count
            self._filled_at = now
            debt = -self._tokens
        if debt > 0:  # whoever comes next finds the debt and waits for its own share behind it
            time.sleep(debt / self.bytes_s)
