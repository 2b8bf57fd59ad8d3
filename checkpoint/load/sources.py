"""Where stored boxes are read from: durable storage, or the nodes' memory. Torch-free."""

from collections.abc import Sequence
from typing import Protocol

import xxhash

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.storage.base import ShortFileError, Storage

LOCAL_PIECE = 2 << 20
"""Bytes read at a time from a local file: they are still in the cache when they are hashed."""

REMOTE_PIECE = 32 << 20
"""Bytes of one request to an object store."""


class Source(Protocol):
    """Stored boxes, in parts. All ranks that load together see the same parts."""

    def parts(self) -> Sequence[PartTable]:
        """What is stored."""
        ...

    def near(self, part: int) -> Sequence[int]:
        """The ranks that can read a part; empty = any."""
        ...

    def read(self, part: int, index: int, out: memoryview) -> None:
        """Fill `out` with all bytes of a part's entry; called from several threads at once.

        Raises:
            BrokenCheckpointError: the bytes are not what was saved; names the file and the entry.
            OSError: they cannot be read.
        """
        ...


class StorageSource:
    """The parts of a durable checkpoint, every box checked against the digest in its manifest."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest

    def parts(self) -> list[PartTable]:
        """The tables in the manifest."""
        return [part.table for part in self._manifest.parts]

    def near(self, part: int) -> Sequence[int]:
        """Any rank sees the storage."""
        return ()

    def read(self, part: int, index: int, out: memoryview) -> None:
        """Read an entry of a part file, hashing it on the way."""
        stored = self._manifest.parts[part]
        entry = stored.table.entries[index]
        path = f"{self._folder}/{stored.file}"
        assert out.nbytes == entry.nbytes
        begin = stored.data_begin + entry.begin
        piece = REMOTE_PIECE if self._storage.local is None else LOCAL_PIECE
        digest = xxhash.xxh3_64()
        try:
            for at in range(0, len(out), piece):
                view = out[at : at + piece]
                self._storage.read_into(path, begin + at, view)
                digest.update(view)
        except FileNotFoundError:
            raise BrokenCheckpointError(f"{path} is missing; it holds {entry.key}") from None
        except ShortFileError as error:
            raise BrokenCheckpointError(
                f"{path} is cut off: {entry.key} is lost ({error.strerror})"
            ) from None
        if digest.hexdigest() != stored.digests[index]:
            raise BrokenCheckpointError(
                f"{path} is damaged: {entry.key} has checksum {digest.hexdigest()} instead of "
                f"{stored.digests[index]}"
            )
