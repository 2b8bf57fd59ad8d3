"""Rebuilding files of a checkpoint: out of its own parity, or out of another copy.

What is lost is counted by units (see placement.Stripes): a broken file is lost whole, and can be
had from parity when no stripe that it touches has lost more than parity makes up for. A file is
replaced only by one whose checksum is the manifest's.
"""

from collections.abc import Callable, Iterator, Sequence

import xxhash

from phalanx.checkpoint.erasure import Codec
from phalanx.checkpoint.manifest import (
    BrokenCheckpointError,
    Manifest,
    StoredParity,
    StoredPart,
)
from phalanx.checkpoint.storage import Bytes, Storage
from phalanx.checkpoint.tool.groups import File, Group
from phalanx.checkpoint.tool.reading import Reader

PIECE_BYTES = 4 << 20
"""Bytes of a unit that are rebuilt at a time."""


class Mender:
    """Mends the files of one checkpoint.

    Args:
        broken: files that must not be read.
        other: another copy of the same tensors, in any layout.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        manifest: Manifest,
        *,
        broken: Sequence[str],
        other: Reader | None = None,
    ) -> None:
        self._storage, self._folder, self._manifest = storage, folder, manifest
        self.broken = set(broken)
        self._other = other
        self._groups = Group.all_of(manifest)

    def mendable(self) -> dict[str, str]:
        """Broken files that can be had, and out of what; not all of those at once, perhaps."""
        left = set(self.broken)
        found: dict[str, str] = {}
        while True:  # each file that is had again may help to have another
            ways = {file: self._way(self._manifest.files[file], left) for file in sorted(left)}
            new = {file: way for file, way in ways.items() if way}
            if not new:
                return found
            found |= new
            left -= new.keys()

    def mend(
        self, *, on_bytes: Callable[[int], None] | None = None
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Write every file that can be had.

        Returns:
            Mended files, and out of what; files that should have been, and what went wrong.
        """
        mended: dict[str, str] = {}
        failed: dict[str, str] = {}
        for name, way in self.mendable().items():
            file = self._manifest.files[name]
            if failed and self._way(file, self.broken) != way:
                failed[name] = f"it needs {', '.join(failed)}"
                continue
            pieces = self._from_parity(file) if way == "parity" else self._from_other(file)
            checked = _checked(name, file, pieces)
            try:
                self._storage.write(f"{self._folder}/{name}", checked, on_bytes=on_bytes)
            except (BrokenCheckpointError, OSError) as error:
                failed[name] = str(error)
                continue
            self.broken.remove(name)
            mended[name] = way
        return mended, failed

    def _way(self, file: File, left: set[str]) -> str:
        """Out of what a file can be had: parity, another copy, or "" nothing."""
        group = self._group_of(file)
        if group is not None:
            lost = group.missing_parity()
            for name in left:
                other = self._manifest.files[name]
                if other.member in group.members:
                    lost |= group.units_of(other)
            counts: dict[int, int] = {}
            for stripe, _ in lost:
                counts[stripe] = counts.get(stripe, 0) + 1
            if all(counts[stripe] <= group.num_parity for stripe, _ in group.units_of(file)):
                return "parity"
        if isinstance(file, StoredPart) and not file.table.nbytes:
            return "parity"  # a header, which the manifest knows
        if self._other is not None and isinstance(file, StoredPart):
            return "the other copy"
        return ""

    def _group_of(self, file: File) -> Group | None:
        return next((group for group in self._groups if file.member in group.members), None)

    def _from_other(self, file: File) -> Iterator[Bytes]:
        assert self._other is not None
        assert isinstance(file, StoredPart)
        yield file.table.header()
        for entry in file.table.entries:
            yield self._other.read(entry.name, entry.box).reshape(-1).view("u1").data

    def _from_parity(self, file: File) -> Iterator[Bytes]:
        group = self._group_of(file)
        if isinstance(file, StoredPart):
            yield file.table.header()
            if not file.table.nbytes:
                return
        assert group is not None
        stripes, place = group.stripes, group.members.index(file.member)
        if isinstance(file, StoredParity):
            for unit in range(stripes.m):
                stripe = stripes.stripe_of_parity(place, unit)
                yield from self._rebuild(group, stripe, stripes.k + unit, 0, stripes.unit_bytes)
            return
        at, end = group.range_of(file)
        while at < end:
            unit, begin = divmod(at, stripes.unit_bytes)
            stop = min(stripes.unit_bytes, begin + end - at)
            stripe = stripes.stripe_of_data(place, unit)
            yield from self._rebuild(group, stripe, unit, begin, stop)
            at += stop - begin

    def _rebuild(
        self, group: Group, stripe: int, index: int, begin: int, end: int
    ) -> Iterator[Bytes]:
        """Bytes [begin, end) of a lost unit."""
        stripes = group.stripes
        lost = group.missing_parity().union(
            *(
                group.units_of(self._manifest.files[name])
                for name in self.broken
                if self._manifest.files[name].member in group.members
            )
        )
        whole = [i for i in range(stripes.n) if (stripe, i) not in lost][: stripes.k]
        codec = Codec(stripes.k, stripes.m)
        for at in range(begin, end, PIECE_BYTES):
            size = min(PIECE_BYTES, end - at)
            present = {i: self._read_unit(group, stripe, i, at, size) for i in whole}
            found = bytearray(size)
            codec.rebuild(present, {index: found})
            yield found

    def _read_unit(self, group: Group, stripe: int, index: int, at: int, size: int) -> bytearray:
        """Bytes of a unit that is whole; zeros behind its member's data."""
        stripes, found = group.stripes, bytearray(size)
        view = memoryview(found)
        if index >= stripes.k:
            unit = index - stripes.k
            parity = group.parity[stripes.parity_members(stripe)[unit]]
            assert parity is not None
            path = f"{self._folder}/{parity.file}"
            self._storage.read_into(path, unit * stripes.unit_bytes + at, view)
            return found
        begin = index * stripes.unit_bytes + at
        place, first = stripes.data_members(stripe)[index], 0
        for part in group.parts[place]:
            last = first + part.table.nbytes
            low, high = max(begin, first), min(begin + size, last)
            if low < high:
                path = f"{self._folder}/{part.file}"
                there = view[low - begin : high - begin]
                self._storage.read_into(path, part.data_begin + low - first, there)
            first = last
        return found


def _checked(name: str, file: File, pieces: Iterator[Bytes]) -> Iterator[Bytes]:
    """The pieces; an error instead of an end where they are not the file that is wanted."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if digest.hexdigest() != file.xxh3_64:
        raise BrokenCheckpointError(
            f"{name}: what was rebuilt has checksum {digest.hexdigest()} instead of "
            f"{file.xxh3_64}; the file was left as it was"
        )
