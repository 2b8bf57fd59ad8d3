"""The work of a restore in units: ranges of source files, and where their boxes go in others.

A unit is a run of bytes of a source file made of slabs, boxes without gaps. Each slab goes to
whatever boxes of the target files hold some of it: one whole where the layout stays, pieces of rows
where tensors are cut anew.
"""

import errno
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from phalanx.checkpoint.boxes import ITEM_BYTES, Box, TensorInfo, whole
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.format.table import Entry, PartTable
from phalanx.checkpoint.tool.reading import as_box


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A file as a table of boxes behind some header."""

    file: str
    header: bytes
    table: PartTable
    digests: tuple[str, ...] = ()
    """XXH3-64 of each box, where they are known."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.table.nbytes

    @staticmethod
    def of_part(part: StoredPart) -> "Stream":
        """A file of tensors."""
        return Stream(
            file=part.file, header=part.table.header(), table=part.table, digests=part.digests
        )

    @staticmethod
    def of_parity(file: StoredParity) -> "Stream":
        """A file of parity: one box of bytes."""
        info = TensorInfo(dtype="U8", shape=(file.size,))
        entry = Entry(name=f"parity/{file.file}", info=info, box=whole(info.shape), begin=0)
        table = PartTable((entry,))
        return Stream(file=file.file, header=b"", table=table, digests=(file.xxh3_64,))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A range of a source file's boxes."""

    number: int
    source: int
    """Place of the file among the sources."""
    begin: int
    """First byte, counted from the end of the header."""
    end: int
    slabs: tuple[tuple[int, Box], ...]
    """Entry's place in the table, and box; back to back."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.end - self.begin


def units_of(sources: Sequence[Stream], unit_bytes: int) -> Iterator[Unit]:
    """All bytes of all sources, in order, in units of up to about `unit_bytes`."""
    number = 0
    for place, source in enumerate(sources):
        begin = end = 0
        slabs: list[tuple[int, Box]] = []
        for index, entry in enumerate(source.table.entries):
            for slab in slabs_of(entry, unit_bytes):
                size = slab.numel * ITEM_BYTES[entry.info.dtype]
                if slabs and end + size - begin > unit_bytes:
                    yield Unit(
                        number=number, source=place, begin=begin, end=end, slabs=tuple(slabs)
                    )
                    number, begin, slabs = number + 1, end, []
                slabs.append((index, slab))
                end += size
        if slabs:
            yield Unit(number=number, source=place, begin=begin, end=end, slabs=tuple(slabs))
            number += 1


def slabs_of(entry: Entry, most: int) -> Iterator[Box]:
    """A box in boxes of at most `most` bytes (or one element) that follow each other in memory."""
    yield from _cut(entry.box, most // ITEM_BYTES[entry.info.dtype])


def _cut(box: Box, most: int) -> Iterator[Box]:
    if not box.numel:
        return
    dim = next((d for d, size in enumerate(box.sizes) if size > 1), None)
    if dim is None or box.numel <= most:
        yield box
        return
    rows = max(1, most // (box.numel // box.sizes[dim]))
    for begin in range(0, box.sizes[dim], rows):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += begin
        sizes[dim] = min(rows, box.sizes[dim] - begin)
        yield from _cut(Box(tuple(offsets), tuple(sizes)), most)


class TargetFiles:
    """The target's files, open for scattered reading and writing.

    Raises:
        OSError: a file cannot be made, or there is no room for all of them.
    """

    def __init__(self, folder: Path, sources: Sequence[Stream], targets: Sequence[Stream]) -> None:
        self._sources, self._targets = sources, targets
        self._files: list[int] = []
        self._places: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
        for number, target in enumerate(targets):
            path = folder / target.file
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self._files.append(file)
                os.ftruncate(file, target.size)
                _reserve(file, target.size)
                _write_all(file, target.header, 0)
            except OSError as error:
                self.close()
                raise OSError(error.errno, error.strerror, str(path)) from error
            for entry in target.table.entries:
                self._places[entry.name].append((number, entry))

    def scatter(self, unit: Unit, data: memoryview) -> None:
        """Write a unit's bytes to where they belong."""
        for entry, slab, piece in self._slabs(unit, data):
            values = as_box(piece, entry, slab.sizes)
            for number, place, common in self._overlaps(entry, slab):
                rows = np.ascontiguousarray(values[common.slices_in(slab)])
                offsets, run = _runs(common, place, len(self._targets[number].header))
                content = rows.reshape(-1).view("u1").data
                for row, offset in enumerate(offsets):
                    _write_all(self._files[number], content[row * run : (row + 1) * run], offset)

    def gather(self, unit: Unit) -> memoryview:
        """Read a unit's bytes back from where they belong."""
        data = memoryview(bytearray(unit.nbytes))
        for entry, slab, piece in self._slabs(unit, data):
            values = as_box(piece, entry, slab.sizes)
            for number, place, common in self._overlaps(entry, slab):
                offsets, run = _runs(common, place, len(self._targets[number].header))
                content = memoryview(bytearray(run * len(offsets)))
                for row, offset in enumerate(offsets):
                    _read_all(self._files[number], content[row * run : (row + 1) * run], offset)
                values[common.slices_in(slab)] = as_box(content, entry, common.sizes)
        return data

    def sync(self) -> None:
        """Make everything durable."""
        for file in self._files:
            os.fsync(file)

    def close(self) -> None:
        """Let go of the files."""
        while self._files:
            os.close(self._files.pop())

    def _slabs(self, unit: Unit, data: memoryview) -> Iterator[tuple[Entry, Box, memoryview]]:
        """A unit's slabs, and the bytes of each."""
        entries, at = self._sources[unit.source].table.entries, 0
        for index, slab in unit.slabs:
            size = slab.numel * ITEM_BYTES[entries[index].info.dtype]
            yield entries[index], slab, data[at : at + size]
            at += size

    def _overlaps(self, entry: Entry, slab: Box) -> Iterator[tuple[int, Entry, Box]]:
        for number, place in self._places[entry.name]:
            common = place.box.overlap(slab)
            if common is not None:
                yield number, place, common


def _runs(common: Box, place: Entry, header: int) -> tuple[list[int], int]:
    """Where the bytes of a box lie in a file that holds `place`: offsets, and bytes of each run."""
    outer, width = place.box, ITEM_BYTES[place.info.dtype]
    last = len(common.sizes)
    while last > 0 and common.sizes[last - 1] == outer.sizes[last - 1]:
        last -= 1
    inside = max(0, last - 1)  # the dim of which a run has a part, or all where nothing is cut
    run = prod(common.sizes[inside:]) * width
    offsets = np.zeros(1, np.int64)
    for dim, size in enumerate(common.sizes):
        stride = prod(outer.sizes[dim + 1 :])
        first = common.offsets[dim] - outer.offsets[dim]
        steps = np.arange(first, first + size) if dim < inside else np.array([first])
        offsets = (offsets[:, None] + steps * stride).reshape(-1)
    return (header + place.begin + offsets * width).tolist(), run


def _reserve(file: int, size: int) -> None:
    """Take the room now, where the file system can: a full disk is told before anything moves."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _read_all(file: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.preadv(file, [view], offset)
        if not count:
            raise OSError(None, f"a target file ends at byte {offset}")
        view, offset = view[count:], offset + count
