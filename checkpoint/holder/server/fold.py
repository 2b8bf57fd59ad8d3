"""What other members push here, folded into this member's parity as it comes. Torch-free."""

import socket
import threading
import time

from phalanx.checkpoint.erasure.codec import Codec
from phalanx.checkpoint.holder.server.live import LiveEpoch
from phalanx.checkpoint.holder.server.slots import Generation
from phalanx.checkpoint.holder.transport import (
    CHUNK_BYTES,
    PEER_LIMIT,
    framed,
    hang_up,
    hung_up,
    receive,
    receive_into,
)

LOCKS = 64
"""Chunks of parity that are written at a time, at most."""


class Folder:
    """Writes the parity of an epoch's own member.

    Data of several members comes in any order, each chunk of parity in its own: what comes first
    overwrites what the slot held before, the rest is added. A source that is shorter than the
    longest counts as zeros behind its end.
    """

    def __init__(self, epoch: LiveEpoch) -> None:
        self._epoch, self._member = epoch, epoch.own
        self._codec = Codec(epoch.own.stripes.k, epoch.own.stripes.m)
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    def fold(
        self, generation: Generation, source: int, unit: int, at: int, *, data: memoryview
    ) -> None:
        """Add a chunk of a member's data to the parity.

        Raises:
            ConnectionError: the member's data has no place there.
        """
        member, start = self._member, time.perf_counter()
        stripes = member.stripes
        place = member.group.index(source)
        sources: tuple[int, ...] = ()
        if 0 <= unit < stripes.m and 0 <= at < stripes.unit_bytes and at % CHUNK_BYTES == 0:
            sources = stripes.data_members(stripes.stripe_of_parity(member.place, unit))
        target = member.parity_chunk(generation.slot, unit, at) if place in sources else data[:0]
        if len(data) > len(target):
            raise ConnectionError(
                f"member {source} pushed {len(data)} bytes to unit {unit}, byte {at}"
            )
        chunk = member.chunk_number(unit, at)
        with self._locks[chunk % LOCKS]:
            if not self._epoch.current(generation):
                return  # its slot may hold the next one's parity by now
            first = not generation.touched[chunk]
            generation.slot.zero[chunk] = 0
            self._codec.fold(sources.index(place), data, unit, target[: len(data)], first=first)
            if first:
                target[len(data) :] = bytes(len(target) - len(data))
                generation.touched[chunk] = 1
        with self._epoch.changed:
            generation.encode_s += time.perf_counter() - start

    def finish(self, generation: Generation) -> None:
        """Parity of which no member had any data is zeros."""
        for unit, at in self._member.all_chunks():
            chunk = self._member.chunk_number(unit, at)
            if generation.touched[chunk] or generation.slot.zero[chunk]:
                continue
            with self._locks[chunk % LOCKS]:
                if not self._epoch.current(generation):
                    return
                target = self._member.parity_chunk(generation.slot, unit, at)
                target[:] = bytes(len(target))
                generation.slot.zero[chunk] = 1


class Incoming:
    """The connection on which one member pushes; what failed here is said on the way back."""

    def __init__(
        self, sock: socket.socket, epoch: LiveEpoch, folder: Folder, *, source: int
    ) -> None:
        self._sock, self._epoch, self._folder = sock, epoch, folder
        self._source = source
        self._scratch = memoryview(bytearray(CHUNK_BYTES))
        self._told: tuple[int, int] | None = None

    def run(self) -> str:
        """Take what comes, until the connection ends; why it did."""
        try:
            while True:
                self._take()
        except OSError as error:
            return str(error)
        finally:
            self.hang_up()
            self._sock.close()

    def tell(self, number: int, step: int, why: str) -> None:
        """Say that a snapshot failed here; whoever cannot be told is hung up on."""
        data = framed({"failed": [number, step], "why": why[:1000]})
        try:
            if self._sock.send(data, socket.MSG_DONTWAIT) == len(data):
                return
        except OSError:
            pass
        self.hang_up()

    def hang_up(self) -> None:
        """End the connection."""
        hang_up(self._sock)

    def _take(self) -> None:
        message, _ = receive(self._sock, limit=PEER_LIMIT)
        try:
            kind = "push" if "push" in message else "done"
            number, step, *where = map(int, message[kind])
            count = int(message["bytes"]) if kind == "push" else 0
            unit, at = where if kind == "push" else (0, 0)
        except (KeyError, TypeError, ValueError):
            raise ConnectionError(f"member {self._source} sent {message!s:.100}") from None
        if not 0 <= count <= CHUNK_BYTES:
            raise ConnectionError(f"member {self._source} sent a chunk of {count} bytes")
        data = self._scratch[:count]
        receive_into(self._sock, data)
        generation = self._epoch.touch(number, step, alive=lambda: not hung_up(self._sock))
        if isinstance(generation, str):
            if self._told != (number, step):
                self._told = number, step
                self.tell(number, step, generation)
        elif self._source in generation.arrived:
            raise ConnectionError(f"member {self._source} pushed on after it was done")
        elif kind == "push":
            self._folder.fold(generation, self._source, unit, at, data=data)
        else:
            self._epoch.arrived(generation, self._source)
