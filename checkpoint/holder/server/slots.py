"""The memory of one member's generations, and how far the snapshot in each has come. Torch-free."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import xxhash

from phalanx.checkpoint.holder.inventory import EMPTY, FILLING, WHOLE, SlotInventory
from phalanx.checkpoint.holder.memory import Memory
from phalanx.checkpoint.holder.spec import Spec
from phalanx.checkpoint.holder.transport import CHUNK_BYTES

NOTHING = -1
"""Bytes filled by a rank that has not said anything: of a part without bytes, it says 0."""


class Generation:
    """One snapshot in one slot, from the moment that the slot's content before it is gone."""

    def __init__(self, slot: "Slot", step: int, *, ranks: Sequence[int]) -> None:
        self.slot = slot
        self.step = step
        self.state = FILLING
        self.filled = dict.fromkeys(ranks, NOTHING)
        """Bytes of each rank's part that are there."""
        self.hashed = dict.fromkeys(ranks, 0)
        self.hashers = {rank: xxhash.xxh3_64() for rank in ranks}
        self.part_digests: dict[int, int] | None = None
        """Of each rank's part, once all are there."""
        self.parity_digest: int | None = None
        """Of this member's parity, once all of it is there; None where there is none."""
        self.sent: set[int] = set()
        """Members that all was sent to."""
        self.arrived: set[int] = set()
        """Members whose data this member's parity has."""
        self.touched = bytearray(len(slot.zero))
        """By chunk of parity: 1 = holds something of this snapshot."""
        self.failed: str | None = None
        """Why it will never be complete."""
        self.pins = 0
        """Readers that it must stay for."""
        self.digests: list[int] = []
        """By member, once committed."""
        self.meta: Any = None
        """What the trainer gave when it was committed."""
        self.encode_s = 0.0
        self.sent_s = 0.0
        self.sent_bytes = 0

    @property
    def digest(self) -> int | None:
        """Of all parts, once they are there."""
        return None if self.part_digests is None else combined(self.part_digests.values())

    @property
    def whole(self) -> bool:
        """Whether the snapshot can be used: its data and its parity are there."""
        return self.state in WHOLE


class Slot:
    """The memory of one generation."""

    def __init__(self, number: int, data: dict[int, Memory], parity: Memory, *, chunks: int):
        self.number = number
        self.data = data
        """By rank."""
        self.parity = parity
        self.zero = bytearray(b"\1" * chunks)
        """By chunk of parity: 1 = all zeros. Memory begins as zeros."""
        self.generation: Generation | None = None

    @property
    def memories(self) -> list[Memory]:
        """All of it."""
        return [*self.data.values(), self.parity]


class Member:
    """A member's data and parity."""

    def __init__(self, spec: Spec, number: int) -> None:
        self.spec = spec
        self.number = number
        self.ranks = spec.ranks[number]
        self.group = spec.group_of(number)
        self.place = self.group.index(number)
        self.stripes = spec.stripes(number)
        self.peers = tuple(other for other in self.group if other != number) * bool(spec.parity)
        """Members to send to and to hear from."""
        self.slots: dict[int, Slot] = {}
        """By number, those that have memory."""
        self.length = spec.length(number)
        self.chunks_per_unit = -(-self.stripes.unit_bytes // CHUNK_BYTES)

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot."""
        return self.length + self.stripes.parity_bytes

    def allocate(self, number: int, *, populate: bool) -> Slot:
        """Give a slot its memory.

        Raises:
            MemoryError: there is not so much.
        """
        made: list[Memory] = []
        try:
            for rank in self.ranks:
                nbytes = self.spec.table(rank).nbytes
                name = f"phalanx-{self.spec.epoch}-rank{rank}-slot{number}"
                made.append(Memory(nbytes, name=name, populate=populate))
            name = f"phalanx-{self.spec.epoch}-parity{self.number}-slot{number}"
            made.append(Memory(self.stripes.parity_bytes, name=name, populate=populate))
        except BaseException:
            for memory in made:
                memory.close()
            raise
        *data, parity = made
        chunks = self.spec.parity * self.chunks_per_unit
        slot = Slot(number, dict(zip(self.ranks, data, strict=True)), parity, chunks=chunks)
        self.slots[number] = slot
        return slot

    def free(self, number: int) -> None:
        """Let go of a slot's memory, if it has any."""
        slot = self.slots.pop(number, None)
        if slot is not None:
            slot.generation = None  # a circle would keep the memory
            for memory in slot.memories:
                memory.close()

    def generations(self) -> Iterator[Generation]:
        """What the slots hold."""
        return (slot.generation for slot in self.slots.values() if slot.generation)

    def pieces(self, slot: Slot, begin: int, end: int) -> Iterator[tuple[int, int, memoryview]]:
        """Bytes [begin, end) of the data: (rank, where they end in its part, the bytes)."""
        first = 0
        for rank in self.ranks:
            view = slot.data[rank].view
            low, high = max(begin - first, 0), min(end - first, len(view))
            if low < high:
                yield rank, high, view[low:high]
            first += len(view)

    def views(self, slot: Slot, begin: int, end: int) -> list[memoryview]:
        """Bytes [begin, end) of the data, where they are."""
        return [view for _, _, view in self.pieces(slot, begin, end)]

    def parity_chunk(self, slot: Slot, unit: int, at: int) -> memoryview:
        """The chunk that begins at byte `at` of a unit of parity."""
        first, size = unit * self.stripes.unit_bytes, self.stripes.unit_bytes
        return slot.parity.view[first + at : first + min(at + CHUNK_BYTES, size)]

    def chunk_number(self, unit: int, at: int) -> int:
        """Where a chunk of parity stands in `Slot.zero`."""
        return unit * self.chunks_per_unit + at // CHUNK_BYTES

    def all_chunks(self) -> Iterator[tuple[int, int]]:
        """(unit, first byte in it) of every chunk of parity, in order."""
        for unit in range(self.spec.parity):
            for at in range(0, self.stripes.unit_bytes, CHUNK_BYTES):
                yield unit, at


def combined(digests: Iterable[int]) -> int:
    """One digest of several parts': XXH3-64 of theirs, little-endian, in rank order."""
    return xxhash.xxh3_64_intdigest(b"".join(digest.to_bytes(8, "little") for digest in digests))


def part_digests_of(slot: Slot) -> dict[int, int]:
    """By rank, the digest of what the slot holds of its part now."""
    return {rank: digest_of(memory.view) for rank, memory in slot.data.items()}


def digest_of(view: memoryview) -> int:
    """XXH3-64 of these bytes."""
    hasher = xxhash.xxh3_64()
    for begin in range(0, len(view), CHUNK_BYTES):  # other threads run in between
        hasher.update(view[begin : begin + CHUNK_BYTES])
    return hasher.intdigest()


def describe(slot: Slot) -> SlotInventory:
    """What the slot holds."""
    generation = slot.generation
    if generation is None:
        return SlotInventory(slot=slot.number, step=None, state=EMPTY)
    return SlotInventory(
        slot=slot.number,
        step=generation.step,
        state=generation.state,
        meta=generation.meta,
        digest=generation.digest,
        digests=tuple(generation.digests),
    )
