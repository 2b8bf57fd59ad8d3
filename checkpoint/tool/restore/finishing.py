"""The last look of a restore: checksums of the files as they lie in the target."""

import xxhash

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.checksums import digest_range
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.restore.plan import RestorePlan
from phalanx.checkpoint.tool.restore.units import Stream

READ_BYTES = 8 << 20


def check_targets(plan: RestorePlan, targets: list[Stream]) -> list[StoredPart]:
    """Checksums of the files as they lie in the target.

    Raises:
        BrokenCheckpointError: a file that should be the source's is not.
        OSError: one cannot be read.
    """
    parts: list[StoredPart] = []
    known = plan.manifest.files
    with byte_bar(f"checking {plan.name}", sum(target.size for target in targets)) as done:
        for rank, target in enumerate(targets):
            path = f"{plan.name}/{target.file}"
            if plan.cutting.tables is None:
                found = digest_range(plan.target, path, 0, target.size)
                if found != known[target.file].xxh3_64:
                    raise BrokenCheckpointError(
                        f"{plan.target.url}/{path}: has checksum {found} instead of "
                        f"{known[target.file].xxh3_64}; its disk is failing, or another program "
                        "writes here"
                    )
            else:
                parts.append(_stored(plan, rank, target, path))
            done(target.size)
    return parts


def _stored(plan: RestorePlan, rank: int, target: Stream, path: str) -> StoredPart:
    """A new file's line in the manifest, by one reading."""
    header = bytearray(len(target.header))
    plan.target.read_into(path, 0, memoryview(header))
    if header != target.header:
        raise BrokenCheckpointError(
            f"{plan.target.url}/{path}: its header was written and reads back otherwise: its disk "
            "or memory is failing"
        )
    whole, digests = xxhash.xxh3_64(header), []
    buffer = memoryview(bytearray(READ_BYTES))
    for entry in target.table.entries:
        digest, begin = xxhash.xxh3_64(), len(target.header) + entry.begin
        for at in range(0, entry.nbytes, len(buffer)):
            view = buffer[: min(len(buffer), entry.nbytes - at)]
            plan.target.read_into(path, begin + at, view)
            digest.update(view)
            whole.update(view)
        digests.append(digest.hexdigest())
    return StoredPart(
        file=target.file,
        size=target.size,
        xxh3_64=whole.hexdigest(),
        table=target.table,
        digests=tuple(digests),
        member=rank,
    )
