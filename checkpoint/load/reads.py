"""Who reads which stored box and when: a plan that every rank makes alike, without asking.

A stored box that any rank needs is read once in the whole job, by one rank: one near it, and of
those one that needs it, the one with the fewest bytes so far. Ranks read in rounds of bounded size,
so that what they forward fits in memory. Torch-free.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phalanx.checkpoint.boxes import Box, TensorInfo
from phalanx.checkpoint.format.table import Entry, PartTable


@dataclass(frozen=True)
class Located:
    """A stored box, and where it is."""

    entry: Entry
    part: int
    index: int
    """Of the entry in its part."""


@dataclass(frozen=True)
class Read:
    """One reading of a stored box."""

    located: Located
    reader: int
    users: frozenset[int]
    """Ranks that need something of it."""


def locate(parts: Iterable[PartTable]) -> list[Located]:
    """All stored boxes; the position in this list is the box's number."""
    return [
        Located(entry, part, index)
        for part, table in enumerate(parts)
        for index, entry in enumerate(table.entries)
    ]


def stored_tensors(parts: Iterable[PartTable]) -> dict[str, TensorInfo]:
    """Type and shape of every stored tensor, by name."""
    return {entry.name: entry.info for table in parts for entry in table.entries}


def needed(boxes: Sequence[Located], wanted: Mapping[str, Box]) -> list[int]:
    """Numbers of the stored boxes that hold something of what one rank wants.

    Raises:
        ValueError: some of it is not stored, or more than once.
    """
    by_name: dict[str, list[int]] = {name: [] for name in wanted}
    for number, located in enumerate(boxes):
        if located.entry.name in by_name:
            by_name[located.entry.name].append(number)
    found: list[int] = []
    for name, want in wanted.items():
        overlaps = {
            number: piece
            for number in by_name[name]
            if (piece := boxes[number].entry.box.overlap(want)) is not None
        }
        total = sum(piece.numel for piece in overlaps.values())
        if not total == volume(overlaps.values()) == want.numel:
            raise ValueError(
                f"{name}: the {want.numel} elements of {list(want.sizes)} at {list(want.offsets)} "
                f"are not stored once each: {len(overlaps)} stored boxes hold {total} of them"
            )
        found += overlaps
    return sorted(found)


def volume(boxes: Iterable[Box]) -> int:
    """Elements in the union of boxes of one tensor."""
    distinct = {box for box in boxes if box.numel}
    if len(distinct) <= 1:
        return sum(box.numel for box in distinct)
    edges = [
        np.unique([(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for box in distinct])
        for dim in range(len(next(iter(distinct)).sizes))
    ]
    covered = np.zeros([len(edge) - 1 for edge in edges], dtype=bool)
    for box in distinct:
        cells = tuple(
            slice(*np.searchsorted(edge, (begin, begin + size)))
            for edge, begin, size in zip(edges, box.offsets, box.sizes, strict=True)
        )
        covered[cells] = True
    elements = covered.astype(np.int64)
    for edge in reversed(edges):
        elements = elements @ np.diff(edge)
    return int(elements)


def plan_reads(
    boxes: Sequence[Located],
    needs: Sequence[Sequence[int]],
    *,
    near: Callable[[int], Sequence[int]],
    round_bytes: int,
) -> list[list[Read]]:
    """Choose a reader and a round for every box that some rank needs.

    Args:
        needs: `needed` of every rank.
        near: ranks that can read a part; empty = any.
        round_bytes: most bytes that a rank reads in a round, unless one box is larger.

    Returns:
        The reads of each round, in the order of the boxes.
    """
    users: dict[int, list[int]] = {}
    for rank, numbers in enumerate(needs):
        for number in numbers:
            users.setdefault(number, []).append(rank)
    anyone = range(len(needs))
    loads = [0] * len(needs)
    readers: dict[int, int] = {}
    for number in sorted(users, key=lambda number: (-boxes[number].entry.nbytes, number)):
        able = near(boxes[number].part) or anyone
        willing = [rank for rank in users[number] if rank in able] or able
        reader = min(willing, key=lambda rank: (loads[rank], rank))
        loads[reader] += boxes[number].entry.nbytes
        readers[number] = reader
    current, filled = [0] * len(needs), [0] * len(needs)
    rounds: list[list[Read]] = []
    for number in sorted(users):
        reader, nbytes = readers[number], boxes[number].entry.nbytes
        if filled[reader] and filled[reader] + nbytes > round_bytes:
            current[reader] += 1
            filled[reader] = 0
        filled[reader] += nbytes
        if current[reader] == len(rounds):
            rounds.append([])
        rounds[current[reader]].append(Read(boxes[number], reader, frozenset(users[number])))
    return rounds
