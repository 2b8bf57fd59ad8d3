"""Writing one rank's boxes as a safetensors file, with checksums on the way."""

from collections.abc import Callable, Iterator

import xxhash

from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.storage.base import Bytes, Storage

PIECE_BYTES = 1 << 20
"""Bytes hashed for the box, hashed for the file and written while they are in the cache."""


def write_part(
    storage: Storage,
    path: str,
    table: PartTable,
    read: Callable[[int], memoryview],
    *,
    member: int = 0,
    check: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> StoredPart:
    """Write the file of a part.

    Args:
        read: all bytes of the entry with this index, as a view that stays as it is until the next
            entry is asked for; entries are asked for once, in order.
        member: the node that the part belongs to, in the parity groups.
        check: told the XXH3-64 of all entries' bytes as one run, before the file counts. What it
            raises ends the write.
        on_bytes: told the number of bytes each time some were handed to the storage.

    Returns:
        What the manifest is to say of the file.

    Raises:
        OSError: it cannot be written.
    """
    header = table.header()
    whole, run = xxhash.xxh3_64(header), xxhash.xxh3_64()
    digests: list[str] = []

    def pieces() -> Iterator[Bytes]:
        yield header
        for index, entry in enumerate(table.entries):
            view = read(index).cast("B")
            assert len(view) == entry.nbytes, (entry.key, len(view), entry.nbytes)
            digest = xxhash.xxh3_64()
            for at in range(0, len(view), PIECE_BYTES):
                piece = view[at : at + PIECE_BYTES]
                digest.update(piece)
                whole.update(piece)
                run.update(piece)  # last: what changes before is refused, what changes now differs
                yield piece  # from the checksums
            digests.append(digest.hexdigest())
        if check is not None:
            check(run.intdigest())

    size = storage.write(path, pieces(), on_bytes=on_bytes)
    return StoredPart(
        file=path.rpartition("/")[2],
        size=size,
        xxh3_64=whole.hexdigest(),
        table=table,
        digests=tuple(digests),
        member=member,
    )
