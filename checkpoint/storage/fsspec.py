"""Storage at any URL that fsspec knows.

Files are written in pieces through the driver's file objects, under a temporary name, and then
moved. Every other request is tried again by `retry`; within a file's pieces the driver does that
as it can. S3, which tells of each piece, has its own class in s3.py.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import fsspec

from phalanx.checkpoint.storage.base import UNFINISHED, Bytes, ShortFileError, unfinished_name
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.rate_limit import RateLimit
from phalanx.checkpoint.storage.retry import retry

T = TypeVar("T")

PARALLEL = 4
"""Pieces on their way, and so in memory, at a time."""


class FsspecStorage:
    """The files below a path of an fsspec file system."""

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        root: str,
        *,
        url: str,
        config: StorageConfig,
        limit: RateLimit,
    ) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")
        self._retries = config.retries
        self._piece_bytes = config.piece_mb << 20
        self._limit = limit

    @property
    def url(self) -> str:
        """The URL that was opened."""
        return self._url

    @property
    def local(self) -> None:
        """None: there is no folder."""
        return None

    def names(self, folder: str = "") -> list[str]:
        """See Storage."""
        path = self._path(folder)
        try:
            found = self._try(folder, lambda: self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        inside = [item.rstrip("/") for item in found if item.rstrip("/") != path]
        names = {item.rpartition("/")[2] for item in inside}
        return sorted(name for name in names if not UNFINISHED.fullmatch(name))

    def exists(self, path: str) -> bool:
        """See Storage."""
        try:
            self._info(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """See Storage."""
        return int(self._info(path)["size"])

    def read(self, path: str) -> bytes:
        """See Storage."""
        content: bytes = self._try(path, lambda: self._fs.cat_file(self._path(path)))
        return content

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """See Storage; several pieces come at a time."""
        view = view.cast("B")

        def fetch(at: int) -> None:
            begin, end = offset + at, offset + min(at + self._piece_bytes, len(view))
            found = self._range(path, begin, end)
            if len(found) != end - begin:
                said = f"ends at byte {self.size(path)}, before {end}"
                raise ShortFileError(errno.EIO, said, self._where(path))
            view[at : at + len(found)] = found

        starts = range(0, len(view), self._piece_bytes)
        if len(starts) <= 1:
            for at in starts:
                fetch(at)
            return
        with ThreadPoolExecutor(min(PARALLEL, len(starts))) as pool:
            for _ in pool.map(fetch, starts):
                pass

    def _range(self, path: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file, or fewer where it ends before."""
        try:
            found: bytes = self._try(
                path, lambda: self._fs.cat_file(self._path(path), start=begin, end=end)
            )
        except OSError as error:  # S3 refuses a range that begins behind the end
            if error.errno == errno.EINVAL and self.size(path) <= begin:
                return b""
            raise
        return found

    def write(
        self, path: str, pieces: Iterable[Bytes], *, on_bytes: Callable[[int], None] | None = None
    ) -> int:
        """See Storage."""
        target, temporary = self._path(path), self._path(unfinished_name(path))
        parent = target.rpartition("/")[0]
        self._try(path, lambda: self._fs.makedirs(parent, exist_ok=True))
        size = 0
        try:
            file = self._once(path, lambda: self._fs.open(temporary, "wb", self._piece_bytes))
            with file:
                for block in self._blocks(pieces):
                    self._limit.take(len(block))
                    self._once(path, partial(file.write, block))
                    size += len(block)
                    if on_bytes is not None:
                        on_bytes(len(block))
                self._once(path, file.close)
            self._try(path, lambda: self._fs.mv(temporary, target))
        except BaseException:
            self._discard(temporary)
            raise
        return size

    def delete(self, path: str) -> None:
        """See Storage."""
        try:
            self._try(path, lambda: self._fs.rm(self._path(path), recursive=True))
        except FileNotFoundError:
            return

    def _blocks(self, pieces: Iterable[Bytes]) -> Iterator[bytearray]:
        """The same bytes in blocks of the size of a request, the last one shorter."""
        block = bytearray()
        for piece in pieces:
            rest = memoryview(piece).cast("B")
            while len(rest):
                count = min(len(rest), self._piece_bytes - len(block))
                block += rest[:count]
                rest = rest[count:]
                if len(block) == self._piece_bytes:
                    yield block
                    block = bytearray()
        if block:
            yield block

    def _info(self, path: str) -> dict[str, Any]:
        info: dict[str, Any] = self._try(path, lambda: self._fs.info(self._path(path)))
        return info

    def _discard(self, path: str) -> None:
        try:
            self._fs.rm(path)
        except Exception:  # the error that brought us here is the one to tell
            return

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _where(self, path: str) -> str:
        return f"{self._url}/{path}" if path else self._url

    def _try(self, path: str, action: Callable[[], T]) -> T:
        return retry(action, where=self._where(path), retries=self._retries)

    def _once(self, path: str, action: Callable[[], T]) -> T:
        """For what must not be done twice."""
        return retry(action, where=self._where(path), retries=0)


def wrong_options(url: str, config: StorageConfig, error: Exception) -> ValueError:
    """What to raise where a driver does not take its options; values may be secrets."""
    keys = ", ".join(sorted(config.options)) or "none"
    return ValueError(
        f"checkpoint.storage.options: the driver of {url} refuses them (given: {keys}): {error}"
    )
