"""A storage whose reading is counted, and slowed where a link is to be spared."""

from collections.abc import Callable, Iterable
from pathlib import Path

from phalanx.checkpoint.storage.base import Bytes, Storage
from phalanx.checkpoint.storage.rate_limit import RateLimit


class Metered:
    """Passes everything on; `on_bytes` hears of what `read_into` has read, from any thread."""

    def __init__(
        self,
        storage: Storage,
        on_bytes: Callable[[int], None],
        *,
        limit: RateLimit | None = None,
    ) -> None:
        self._storage = storage
        self._on_bytes = on_bytes
        self._limit = limit or RateLimit(0)

    @property
    def url(self) -> str:
        """See Storage."""
        return self._storage.url

    @property
    def local(self) -> Path | None:
        """See Storage."""
        return self._storage.local

    def names(self, folder: str = "") -> list[str]:
        """See Storage."""
        return self._storage.names(folder)

    def exists(self, path: str) -> bool:
        """See Storage."""
        return self._storage.exists(path)

    def size(self, path: str) -> int:
        """See Storage."""
        return self._storage.size(path)

    def read(self, path: str) -> bytes:
        """See Storage."""
        return self._storage.read(path)

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """See Storage."""
        self._limit.take(len(view))
        self._storage.read_into(path, offset, view)
        self._on_bytes(len(view))

    def write(
        self, path: str, pieces: Iterable[Bytes], *, on_bytes: Callable[[int], None] | None = None
    ) -> int:
        """See Storage."""
        return self._storage.write(path, pieces, on_bytes=on_bytes)

    def delete(self, path: str) -> None:
        """See Storage."""
        self._storage.delete(path)
