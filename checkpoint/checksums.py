"""Whether files are what their manifest says, and which box is not."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import xxhash

from phalanx.checkpoint.manifest import Manifest, StoredParity, StoredPart
from phalanx.checkpoint.storage import Storage

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
    buffer = memoryview(bytearray(min(READ_BYTES, end - begin)))
    for at in range(begin, end, READ_BYTES):
        view = buffer[: min(READ_BYTES, end - at)]
        storage.read_into(path, at, view)
        digest.update(view)
    return digest.hexdigest()


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
    try:
        size = storage.size(path)
        if size != expected.size:
            return f"{expected.file} has {size} bytes instead of {expected.size}"
        found = digest_range(storage, path, 0, size)
        if found == expected.xxh3_64:
            return None
        where = broken_boxes(storage, path, expected) if isinstance(expected, StoredPart) else []
    except FileNotFoundError:
        return f"{expected.file} is missing"
    except OSError as error:
        return f"{expected.file} cannot be read: {error}"
    named = ", ".join(where[:NAMED]) + (f" and {len(where) - NAMED} more" if where[NAMED:] else "")
    return f"{expected.file} is damaged: checksum {found} instead of {expected.xxh3_64}" + (
        f"; broken: {named}" if named else ""
    )


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
