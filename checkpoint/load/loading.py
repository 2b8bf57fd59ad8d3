"""Carrying out a plan of reads on one rank: reading ahead in threads, forwarding in rounds.

Every rank reads its boxes of a round; then all tell each other whether someone failed, so that
nothing broken is forwarded and nobody waits for a rank that gave up; then pieces are exchanged. A
box that its reader needs whole, where it is contiguous, is read straight into the tensor.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.checkpoint.boxes import ITEM_BYTES, Box
from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.load.forward import (
    Buffers,
    Message,
    Piece,
    as_messages,
    exchange,
    message_bytes,
    piece_for,
    pieces_for,
)
from phalanx.checkpoint.load.reads import Located, Read, volume
from phalanx.checkpoint.load.sources import Source
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.torch_types import TORCH_TYPES, as_bytes, byte_view, typed

READERS = 4
"""Threads of a rank that read boxes."""


@dataclass(frozen=True)
class Moved:
    """Bytes that one rank moved to load."""

    read: int
    """Read from the source; over all ranks each box counts once."""
    needed: int
    """Of those, the ones that some rank needs: fewer where only a part of a box is needed."""
    forwarded: int
    """Sent to other ranks."""


@dataclass(frozen=True)
class ReadBox:
    """A box that this rank reads in the current round."""

    read: Read
    values: Tensor
    """All of it, in the stored type, in host memory and contiguous."""
    buffer: Tensor | None
    """Where the values stand; None where that is the tensor that is loaded."""


class Loading:
    """One loading, as one rank does it.

    Args:
        boxes: what each rank wants of each tensor, by rank.
    """

    def __init__(
        self,
        source: Source,
        chunks: Mapping[str, Chunk],
        *,
        peers: Peers,
        boxes: Sequence[Mapping[str, Box]],
    ) -> None:
        self._source = source
        self._chunks = chunks
        self._peers = peers
        self._boxes = boxes
        self._buffers = Buffers(pinned=any(chunk.local.is_cuda for chunk in chunks.values()))
        self._error: Exception | None = None
        self._forwarded = 0

    def run(self, rounds: Sequence[Sequence[Read]], on_bytes: Callable[[int], None]) -> Moved:
        """Read and forward all rounds; ends early, on all ranks alike, once one has failed."""
        moved: list[Read] = []
        with ThreadPoolExecutor(READERS, thread_name_prefix="load") as pool:
            following = self._start(pool, rounds[0]) if rounds else []
            for number, some in enumerate(rounds):
                reading = following
                following = self._start(pool, rounds[number + 1]) if rounds[number + 1 :] else []
                for held, future in reading:
                    self._try(future.result)
                    on_bytes(held.read.located.entry.nbytes)
                    moved.append(held.read)
                if all(read.users == {read.reader} for read in some):
                    self._return(held for held, _ in reading)
                    continue  # nothing is forwarded, so nobody waits for anybody
                if self._anyone_failed():
                    pool.shutdown(cancel_futures=True)
                    break
                self._forward(some, [held for held, _ in reading])
        return Moved(
            read=sum(read.located.entry.nbytes for read in moved),
            needed=sum(self._needed_bytes(read) for read in moved),
            forwarded=self._forwarded,
        )

    def raise_error(self) -> None:
        """Raise what failed on this rank, if anything did."""
        if self._error is not None:
            raise self._error

    # --- reading -------------------------------------------------------------------------------

    def _start(
        self, pool: ThreadPoolExecutor, some: Sequence[Read]
    ) -> list[tuple[ReadBox, Future[None]]]:
        started: list[tuple[ReadBox, Future[None]]] = []

        def start() -> None:
            for read in some:
                if read.reader == self._peers.rank:
                    held = self._held(read)
                    started.append((held, pool.submit(self._read, held)))

        self._try(start)  # there may be no memory
        return started

    def _held(self, read: Read) -> ReadBox:
        """Where a box is read to: into the tensor itself, or a buffer."""
        entry = read.located.entry
        piece = piece_for(read, self._peers.rank, self._boxes)
        if piece is not None and piece.box == entry.box:
            target = self._target(piece)
            if _takes_bytes(target, piece.dtype):
                return ReadBox(read, target, None)
        buffer = self._buffers.take(entry.nbytes)
        return ReadBox(read, typed(buffer, TORCH_TYPES[entry.info.dtype], entry.box.sizes), buffer)

    def _read(self, held: ReadBox) -> None:
        """Read a box, and put what of it this rank needs in place; runs in a thread."""
        read = held.read
        self._source.read(read.located.part, read.located.index, byte_view(held.values))
        piece = piece_for(read, self._peers.rank, self._boxes)
        if piece is not None and held.buffer is not None:
            self._target(piece).copy_(piece.cut(held.values))

    # --- forwarding ----------------------------------------------------------------------------

    def _forward(self, some: Sequence[Read], helds: Sequence[ReadBox]) -> None:
        """Exchange the pieces of a round."""
        values = {held.read.located: held.values for held in helds}
        coming: dict[int, list[Read]] = defaultdict(list)
        for read in some:
            if self._peers.rank in read.users:
                coming[read.reader].append(read)
        leaving: dict[int, list[Message]] = {}
        arriving: dict[int, list[Message]] = {}

        def outgoing(to: int) -> list[Tensor]:
            pieces = pieces_for((held.read for held in helds), to, self._boxes)
            self._forwarded += sum(piece.nbytes for piece in pieces)
            leaving[to] = [self._packed(group, values) for group in as_messages(pieces)]
            return [message.content for message in leaving[to]]

        def incoming(source: int) -> list[Tensor]:
            pieces = pieces_for(coming[source], self._peers.rank, self._boxes)
            arriving[source] = [self._room(group) for group in as_messages(pieces)]
            return [message.content for message in arriving[source]]

        def done(sent_to: int, received_from: int) -> None:
            for message in arriving[received_from]:
                self._unpack(message)
            for message in leaving.pop(sent_to) + arriving.pop(received_from):
                self._give(message.buffer)

        exchange(self._peers, outgoing=outgoing, incoming=incoming, done=done)
        self._return(helds)

    def _packed(self, pieces: list[Piece], values: Mapping[Located, Tensor]) -> Message:
        """A message to another rank: the values themselves where they are one run of bytes."""
        cuts = [piece.cut(values[piece.read.located]) for piece in pieces]
        if len(cuts) == 1 and cuts[0].is_contiguous():
            return Message(pieces, as_bytes(cuts[0]), None)
        message = self._buffered(pieces)
        for view, cut in zip(message.views(), cuts, strict=True):
            view.copy_(cut)
        return message

    def _room(self, pieces: list[Piece]) -> Message:
        """Memory for a message from another rank: the tensor itself where that is possible."""
        if len(pieces) == 1:
            target = self._target(pieces[0])
            if _takes_bytes(target, pieces[0].dtype):
                return Message(pieces, as_bytes(target), None)
        return self._buffered(pieces)

    def _buffered(self, pieces: list[Piece]) -> Message:
        nbytes = message_bytes(pieces)
        buffer = self._buffers.take(nbytes)
        return Message(pieces, buffer[:nbytes], buffer)

    def _unpack(self, message: Message) -> None:
        if message.buffer is not None:
            for view, piece in zip(message.views(), message.pieces, strict=True):
                self._try(partial(self._target(piece).copy_, view))

    def _return(self, helds: Iterable[ReadBox]) -> None:
        for held in helds:
            self._give(held.buffer)

    def _give(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._buffers.give(buffer)

    # --- pieces --------------------------------------------------------------------------------

    def _target(self, piece: Piece) -> Tensor:
        """The part of this rank's tensor that a piece is for."""
        mine = self._boxes[self._peers.rank][piece.name]
        return self._chunks[piece.name].local[piece.box.slices_in(mine)]

    def _needed_bytes(self, read: Read) -> int:
        entry = read.located.entry
        wanted = (entry.box.overlap(self._boxes[rank][entry.name]) for rank in read.users)
        return volume(box for box in wanted if box) * ITEM_BYTES[entry.info.dtype]

    # --- failures ------------------------------------------------------------------------------

    def _try(self, action: Callable[[], object]) -> None:
        """Run an action; what it raises is told once all ranks are ready to hear it."""
        try:
            action()
        except Exception as error:
            self._error = self._error or error

    def _anyone_failed(self) -> bool:
        if self._peers.group is None:
            return self._error is not None
        failed = torch.tensor(int(self._error is not None), dtype=torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._peers.group)
        return bool(failed)


def _takes_bytes(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of a stored type can be put straight into a tensor."""
    return target.is_cpu and target.dtype == dtype and target.is_contiguous()
