"""Rebuilding files of a checkpoint: out of its own parity, or out of another copy.

What is lost is counted by units (see placement.Stripes): a broken file is lost whole, and can be
had from parity when no stripe that it touches has lost more than parity makes up for. A file is
replaced only by one whose checksum is the manifest's.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from phalanx.checkpoint.erasure.codec import Codec
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.checksums import held_to
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.storage.base import Bytes, Storage
from phalanx.checkpoint.tool.reading import Reader
from phalanx.checkpoint.tool.repair.groups import File, Group, Unit

PARITY, OTHER = "parity", "the other copy"
"""Out of what a file can be had."""
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
        self._tried: set[tuple[str, str]] = set()
        """Files, and ways that did not bring them."""

    def mendable(self) -> dict[str, str]:
        """Broken files that can be had, and out of what, in an order in which that is so."""
        left = set(self.broken)
        found: dict[str, str] = {}
        while True:  # each file that is had again may help to have another
            ways = {name: self._way(name, left) for name in sorted(left)}
            new = {name: way for name, way in ways.items() if way}
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
        hoped = self.mendable()
        while plan := self.mendable():
            for name, way in plan.items():
                if self._way(name, self.broken) != way:  # what it needs could not be had
                    break
                try:
                    self._write(name, way, on_bytes)
                except (BrokenCheckpointError, OSError) as error:
                    self._tried.add((name, way))
                    failed[name] = str(error)
                else:
                    self.broken.remove(name)
                    mended[name] = way
        failed = {name: why for name, why in failed.items() if name not in mended}
        needs = f"it needs {', '.join(failed)}"
        return mended, {name: failed.get(name, needs) for name in hoped if name not in mended}

    def _write(self, name: str, way: str, on_bytes: Callable[[int], None] | None) -> None:
        file = self._manifest.files[name]
        pieces = self._from_parity(file) if way == PARITY else self._from_other(file)
        content = held_to(file.xxh3_64, pieces, what=f"{name}, as rebuilt,")
        self._storage.write(f"{self._folder}/{name}", content, on_bytes=on_bytes)

    def _way(self, name: str, left: set[str]) -> str:
        """Out of what a file can be had while those of `left` are lost; "" where it cannot."""
        file = self._manifest.files[name]
        ways = []
        if self._in_parity(file, left):
            ways.append(PARITY)
        if self._other is not None and isinstance(file, StoredPart):
            ways.append(OTHER)
        return next((way for way in ways if (name, way) not in self._tried), "")

    def _in_parity(self, file: File, left: set[str]) -> bool:
        """Whether no stripe of the file has lost more than parity makes up for."""
        if isinstance(file, StoredPart) and not file.table.nbytes:
            return True  # a header, which the manifest knows
        group = self._group_of(file)
        if group is None:
            return False
        counts = Counter(stripe for stripe, _ in self._lost(group, left))
        return all(counts[stripe] <= group.num_parity for stripe, _ in group.units_of(file))

    def _lost(self, group: Group, left: set[str]) -> set[Unit]:
        """Units of a group that are in no file, or in one of `left`."""
        files = (self._manifest.files[name] for name in left)
        return group.missing_parity().union(
            *(group.units_of(file) for file in files if file.member in group.members)
        )

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
        lost = self._lost(group, self.broken)
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
