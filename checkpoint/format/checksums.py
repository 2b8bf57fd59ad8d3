"""Whether files are what their manifest says, and which box is not."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import xxhash

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.storage.base import Bytes, NotAFileError, Storage

READ_BYTES = 8 << 20
"""Bytes read at a time."""
NAMED = 3
"""Broken boxes that a message names; the others are counted."""


def digest_range(storage: Storage, path: str, begin: int, end: int) -> str:
    """XXH3-64 of the file's bytes [begin, end), as 16 hexadecimal digits.

    Raises:
        OSError: they cannot be read.
    """
    digest = xxhash.xxh3_64()
    for piece in read_range(storage, path, begin, end):
        digest.update(piece)
    return digest.hexdigest()


def read_range(storage: Storage, path: str, begin: int, end: int) -> Iterator[memoryview]:
    """The file's bytes [begin, end); each piece stays as it is until the next one is asked for.

    Raises:
        OSError: they cannot be read.
    """
    buffer = memoryview(bytearray(min(READ_BYTES, end - begin)))
    for at in range(begin, end, READ_BYTES):
        view = buffer[: min(READ_BYTES, end - at)]
        storage.read_into(path, at, view)
        yield view


def held_to(expected: str, pieces: Iterable[Bytes], *, what: str) -> Iterator[Bytes]:
    """The pieces on their way into a file; an error instead of an end where their checksum is
    another one, so that the file is never there.

    Raises:
        BrokenCheckpointError: it is; says so of `what`.
    """
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if digest.hexdigest() != expected:
        raise BrokenCheckpointError(
            f"{what} has checksum {digest.hexdigest()} instead of {expected}"
        )


def check_files(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    files: Iterable[str],
    *,
    threads: int = 4,
) -> dict[str, str]:
    """Why some of `files` are not what the manifest says, by name; empty when all are.

    Of a damaged part, the boxes whose bytes differ are named.
    """
    names = list(files)
    known = manifest.files
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(lambda name: check_file(storage, folder, known[name]), names)
        return {
            name: reason for name, reason in zip(names, reasons, strict=True) if reason is not None
        }


def check_file(storage: Storage, folder: str, expected: StoredPart | StoredParity) -> str | None:
    """Why a file is not what the manifest says; None when it is."""
    path = f"{folder}/{expected.file}"
    part = expected if isinstance(expected, StoredPart) else None
    try:
        size = storage.size(path)
        if size != expected.size:
            why = f"has {size} bytes instead of {expected.size}"
            broken = [] if part is None else _cut_boxes(part, size)
        else:
            found = digest_range(storage, path, 0, size)
            if found == expected.xxh3_64:
                return None
            why = f"is damaged: checksum {found} instead of {expected.xxh3_64}"
            broken = [] if part is None else broken_boxes(storage, path, part)
    except NotAFileError as error:
        return f"{expected.file} {error.strerror}"
    except FileNotFoundError:
        return f"{expected.file} is missing"
    except OSError as error:
        return f"{expected.file} cannot be read: {error}"
    named = ", ".join(broken[:NAMED])
    more = f" and {len(broken) - NAMED} more" if broken[NAMED:] else ""
    return f"{expected.file} {why}" + (f"; broken: {named}{more}" if broken else "")


def _cut_boxes(part: StoredPart, size: int) -> list[str]:
    """Keys of the boxes that a file of `size` bytes does not hold to their ends."""
    ends = {e.key: part.data_begin + e.begin + e.nbytes for e in part.table.entries if e.nbytes}
    return [key for key, end in ends.items() if end > size]


def broken_boxes(storage: Storage, path: str, part: StoredPart) -> list[str]:
    """Keys of the boxes whose bytes differ from their checksums; "header" before them.

    Raises:
        OSError: the file cannot be read.
    """
    header = bytearray(part.data_begin)
    storage.read_into(path, 0, memoryview(header))
    broken = [] if header == part.table.header() else ["header"]
    for entry, expected in zip(part.table.entries, part.digests, strict=True):
        begin = part.data_begin + entry.begin
        if digest_range(storage, path, begin, begin + entry.nbytes) != expected:
            broken.append(entry.key)
    return broken
