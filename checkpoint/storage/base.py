"""Where checkpoints stand: a folder, or any storage that fsspec has a URL for.

The seam is narrow: whole files are written in one go and exist whole or not at all, and any range
of them can be read. No call needs another's state, so threads may share a storage. Torch-free.
"""

import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

Bytes = bytes | bytearray | memoryview
"""What is written; views are of bytes and without gaps."""

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of files whose write did not end; no one is shown them, and they go with their folder."""
REMOVE = "remove it"
"""How an error ends whose cause no repair takes away."""


class ShortFileError(OSError):
    """A file ends before the bytes that were asked of it."""


class NotAFileError(FileNotFoundError):
    """Something has the file's name, but is no file; `strerror` says what, and what to do."""


class Storage(Protocol):
    """Files by path: names joined with "/", relative to the storage's root.

    Errors are OSErrors whose text names the file and the reason.
    """

    @property
    def url(self) -> str:
        """The root, for messages."""
        ...

    @property
    def local(self) -> Path | None:
        """The root's folder, where it is on a mounted file system."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Files and folders right below `folder`, sorted; none where it does not exist."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder."""
        ...

    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def read(self, path: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `offset` on.

        Raises:
            FileNotFoundError: there is none.
            ShortFileError: it ends before `view` is full.
            OSError: it cannot be read.
        """
        ...

    def write(
        self, path: str, pieces: Iterable[Bytes], *, on_bytes: Callable[[int], None] | None = None
    ) -> int:
        """Write a file, replacing what has its name; folders above it are made.

        The file is there whole and durable once this returned, and not at all (or as it was) after
        an error or a crash.

        Args:
            pieces: its content in order; each stays as it is until the next one is asked for.
            on_bytes: told the number of bytes each time some were handed to the storage. What it
                raises ends the write.

        Returns:
            Bytes of the file.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete a file, or a folder with all in it; nothing happens where there is none."""
        ...


def unfinished_name(path: str) -> str:
    """A new name beside `path` for a file that is being written."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{secrets.token_hex(4)}.tmp"
