"""A folder of a mounted file system as storage.

A file is written under a temporary name, made durable, and renamed. Nothing is tried again: after a
failed write or fsync nobody knows what of it stands, so the whole file is the caller's to repeat.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path

from phalanx.checkpoint.storage.base import (
    REMOVE,
    UNFINISHED,
    Bytes,
    NotAFileError,
    ShortFileError,
    unfinished_name,
)
from phalanx.checkpoint.storage.rate_limit import RateLimit

FOLDER = f"is a folder, not a file; {REMOVE}"
WRITE_BYTES = 8 << 20
"""Most bytes handed to the system at once: between two such calls others see progress."""


class LocalStorage:
    """The files below a folder, which need not exist before the first write."""

    def __init__(self, root: Path, *, limit: RateLimit | None = None) -> None:
        self._root = root
        self._limit = limit or RateLimit(0)

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self._root)

    @property
    def local(self) -> Path:
        """The folder."""
        return self._root

    def names(self, folder: str = "") -> list[str]:
        """See Storage."""
        try:
            found = os.listdir(self._root / folder)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if not UNFINISHED.fullmatch(name))

    def exists(self, path: str) -> bool:
        """See Storage."""
        return (self._root / path).exists()

    def size(self, path: str) -> int:
        """See Storage."""
        file = self._root / path
        with reaching(file):
            status = file.stat()
        _refuse_other_kinds(status, file)
        return status.st_size

    def read(self, path: str) -> bytes:
        """See Storage."""
        file = self._root / path
        with open_file(file) as stream, named(file):
            return stream.read()

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """See Storage."""
        file = self._root / path
        with open_file(file) as stream, named(file):
            if _fill(view, stream.fileno(), offset):
                return
            size = os.fstat(stream.fileno()).st_size
        said = f"ends at byte {size}, before {offset + len(view)}"
        raise ShortFileError(errno.EIO, said, str(file))

    def write(
        self, path: str, pieces: Iterable[Bytes], *, on_bytes: Callable[[int], None] | None = None
    ) -> int:
        """See Storage."""
        target = self._root / path
        temporary = self._root / unfinished_name(path)
        make_folder(target.parent)
        try:
            with named(target):
                stream = temporary.open("xb", buffering=0)
            with stream:
                size = self._copy(pieces, stream.fileno(), target, on_bytes)
                with named(target):
                    os.fsync(stream.fileno())
            if target.is_dir():
                raise NotAFileError(errno.EISDIR, FOLDER, str(target))
            with named(target):
                temporary.rename(target)
                fsync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise
        return size

    def delete(self, path: str) -> None:
        """See Storage."""
        target = self._root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif os.path.lexists(target):
            target.unlink()
        else:
            return
        fsync_folder(target.parent)

    def _copy(
        self,
        pieces: Iterable[Bytes],
        descriptor: int,
        target: Path,
        on_bytes: Callable[[int], None] | None,
    ) -> int:
        size = 0
        for piece in pieces:  # an error in here is the caller's own, not the file's
            rest = memoryview(piece).cast("B")
            while len(rest):
                self._limit.take(min(len(rest), WRITE_BYTES))
                with named(target):
                    count = os.write(descriptor, rest[:WRITE_BYTES])
                _begin_writing(descriptor, size, count)
                rest = rest[count:]
                size += count
                if on_bytes is not None:
                    on_bytes(count)
        return size


def _fill(view: memoryview, descriptor: int, offset: int) -> bool:
    """Read until the view is full; False where the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _begin_writing(descriptor: int, begin: int, size: int) -> None:
    """Let the disk begin with what was written, so that the fsync at the end finds little left.

    Of pages that are dirty or on their way this advice drops none.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def named(file: Path) -> Iterator[None]:
    """Errors of the system within name `file`, whichever descriptor or other name they were on."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextlib.contextmanager
def reaching(file: Path) -> Iterator[None]:
    """Within, a path that cannot lead to a file is told as one that has none."""
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "in no folder", str(file)) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        said = f"is a link that leads to itself; {REMOVE}"
        raise NotAFileError(errno.ELOOP, said, str(file)) from error


def open_file(file: Path) -> FileIO:
    """Open a regular file for reading; of other kinds (a pipe, say) nothing is waited for.

    Raises:
        FileNotFoundError: there is none.
    """
    with reaching(file):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _refuse_other_kinds(os.fstat(descriptor), file)
    except BaseException:
        os.close(descriptor)
        raise
    return FileIO(descriptor, "rb")


def _refuse_other_kinds(status: os.stat_result, file: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise NotAFileError(errno.EISDIR, FOLDER, str(file))
    if not stat.S_ISREG(status.st_mode):
        said = f"is a pipe, a socket or a device, not a file; {REMOVE}"
        raise NotAFileError(errno.EINVAL, said, str(file))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durable in the one that holds it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
