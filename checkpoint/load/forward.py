"""Messages between the ranks that load together: all-to-all, few at a time, buffers kept.

Between two ranks the small pieces of a round travel in one message and each large one alone, so
that a large one needs no copy where it is contiguous in both memories.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.checkpoint.boxes import Box
from phalanx.checkpoint.load.reads import Read
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.torch_types import TORCH_TYPES, typed

ALONE_BYTES = 1 << 20
"""A piece of at least so many bytes travels alone."""

WINDOW = 4
"""Exchanges with other ranks that are under way at once; bounds the buffers of what arrives."""

ALIGN = 16
"""Pieces in a message begin at multiples of this, so that they can be viewed as their type."""


class Buffers:
    """Flat uint8 tensors that are used again and again: fresh memory is slow to touch."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}

    def take(self, nbytes: int) -> Tensor:
        """A buffer of at least so many bytes."""
        step = 1 << max(nbytes.bit_length() - 3, 6)  # few sizes, so that most are met again
        size = -(-nbytes // step) * step
        free = self._free.get(size)
        if free:
            return free.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: Tensor) -> None:
        """Return a buffer that is no longer read or written."""
        self._free.setdefault(buffer.numel(), []).append(buffer)


@dataclass(frozen=True)
class Piece:
    """What one rank needs of one stored box."""

    read: Read
    box: Box

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.read.located.entry.name

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return TORCH_TYPES[self.read.located.entry.info.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes, as stored."""
        return self.box.numel * self.dtype.itemsize

    def cut(self, values: Tensor) -> Tensor:
        """The piece, out of the values of the stored box."""
        return values[self.box.slices_in(self.read.located.entry.box)]


def piece_for(read: Read, rank: int, boxes: Sequence[Mapping[str, Box]]) -> Piece | None:
    """What a rank needs of a box; None where that is nothing.

    Args:
        boxes: what each rank wants of each tensor, by rank.
    """
    if rank not in read.users:
        return None
    entry = read.located.entry
    overlap = entry.box.overlap(boxes[rank][entry.name])
    assert overlap is not None, "users need something of it"
    return Piece(read, overlap)


def pieces_for(reads: Iterable[Read], rank: int, boxes: Sequence[Mapping[str, Box]]) -> list[Piece]:
    """What a rank needs of several boxes, in their order."""
    found = (piece_for(read, rank, boxes) for read in reads)
    return [piece for piece in found if piece is not None]


@dataclass(frozen=True)
class Message:
    """Pieces that travel together."""

    pieces: list[Piece]
    content: Tensor
    """Flat, of uint8."""
    buffer: Tensor | None
    """Whose beginning the content is; None where that is a tensor of others."""

    def views(self) -> Iterator[Tensor]:
        """The content by piece."""
        at = 0
        for piece in self.pieces:
            yield typed(self.content[at:], piece.dtype, piece.box.sizes)
            at += _aligned(piece.nbytes)


def as_messages(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by message; both sides of an exchange cut them alike."""
    small = [piece for piece in pieces if piece.nbytes < ALONE_BYTES]
    alone = [[piece] for piece in pieces if piece.nbytes >= ALONE_BYTES]
    return [small, *alone] if small else alone


def message_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes of a message."""
    return sum(_aligned(piece.nbytes) for piece in pieces[:-1]) + pieces[-1].nbytes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def exchange(
    peers: Peers,
    *,
    outgoing: Callable[[int], Sequence[Tensor]],
    incoming: Callable[[int], Sequence[Tensor]],
    done: Callable[[int, int], None],
) -> None:
    """Send to and receive from every other rank; all ranks call it.

    Args:
        outgoing: the messages to a rank, flat uint8 tensors; asked for shortly before they go.
        incoming: memory for the messages from a rank.
        done: called with the ranks of each finished exchange, sent to and received from.
    """
    pending: deque[tuple[int, int, list[dist.Work]]] = deque()

    def finish() -> None:
        sent_to, received_from, works = pending.popleft()
        for work in works:
            work.wait()
        done(sent_to, received_from)

    for distance in range(1, peers.size):
        to, source = (peers.rank + distance) % peers.size, (peers.rank - distance) % peers.size
        works = [dist.irecv(t, group=peers.group, group_src=source) for t in incoming(source)]
        works += [dist.isend(t, group=peers.group, group_dst=to) for t in outgoing(to)]
        pending.append((to, source, [work for work in works if work is not None]))
        if len(pending) == WINDOW:
            finish()
    while pending:
        finish()
