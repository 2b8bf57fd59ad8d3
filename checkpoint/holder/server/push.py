"""What a member sends to the others of its group, while its ranks still fill their parts.

Torch-free.
"""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from phalanx.checkpoint.holder.server.live import LiveEpoch
from phalanx.checkpoint.holder.server.slots import Generation, Member
from phalanx.checkpoint.holder.transport import (
    CHUNK_BYTES,
    PEER_LIMIT,
    PUSH,
    dial,
    hang_up,
    hung_up,
    receive,
    send,
)

OPEN_S = 20.0
"""Seconds within which another holder must have opened the epoch."""


class Sender:
    """Pushes to one member, from one thread."""

    def __init__(self, epoch: LiveEpoch, peer: int) -> None:
        self._epoch, self._own, self._peer = epoch, epoch.own, peer
        self._sock: socket.socket | None = None
        self._pushing: Generation | None = None

    def run(self) -> None:
        """Push every snapshot, until the epoch ends."""
        while self._push_next():
            pass
        self.hang_up()

    def hang_up(self) -> None:
        """End the connection; a push that waits for it fails."""
        sock, self._sock = self._sock, None
        if sock is not None:
            hang_up(sock)

    def give_up(self) -> None:
        """The member is gone: a push to it that has failed, but waits in the kernel, ends."""
        pushing = self._pushing
        if pushing is not None and pushing.failed is not None:
            self.hang_up()

    def _push_next(self) -> bool:
        epoch, peer = self._epoch, self._peer
        generation: Generation | None = epoch.wait_for(
            lambda: next((g for g in epoch.filling() if peer not in g.sent), None)
        )
        if generation is None:
            return False
        self._pushing = generation
        try:
            self._push(generation)
        except OSError as error:
            self.hang_up()
            address = epoch.spec.addresses[peer]
            epoch.fail(generation, f"member {peer} (holder at {address}) is gone ({error})")
        finally:
            self._pushing = None
        return True

    def _push(self, generation: Generation) -> None:
        sock = self._connected()
        runs = list(_runs(self._own, self._peer))
        seconds, sent_bytes = 0.0, 0
        number, step = generation.slot.number, generation.step
        while True:
            run: _Run | None = self._epoch.wait_for(lambda: self._next(generation, runs))
            if run is None or run is _ABANDONED:
                return
            if run is _DONE:
                send(sock, {"done": [number, step]})
                self._epoch.sent(generation, self._peer, seconds=seconds, nbytes=sent_bytes)
                return
            start = time.perf_counter()
            begin = run.begin + run.at
            views = self._own.views(generation.slot, begin, begin + run.chunk)
            message = {"push": [number, step, run.parity, run.at], "bytes": run.chunk}
            send(sock, message, views)
            seconds += time.perf_counter() - start
            sent_bytes += run.chunk
            run.at += run.chunk

    def _next(self, generation: Generation, runs: "list[_Run]") -> "_Run | None":
        """What can be sent now; with the lock."""
        if not self._epoch.current(generation):
            return _ABANDONED
        left = [run for run in runs if run.chunk]
        if not left:
            return _DONE if generation.digest is not None else None
        for run in sorted(left, key=lambda run: run.at):
            begin = run.begin + run.at
            pieces = self._own.pieces(generation.slot, begin, begin + run.chunk)
            if all(generation.filled[rank] >= end for rank, end, _ in pieces):
                return run
        return None

    def _connected(self) -> socket.socket:
        if self._sock is not None and not hung_up(self._sock):
            return self._sock
        spec = self._epoch.spec
        address = spec.addresses[self._peer]
        if address is None:
            raise ConnectionError("it has no address")
        greeting = {
            "epoch": spec.epoch,
            "token": spec.token,
            "role": PUSH,
            "member": self._own.number,
        }
        self._sock = dial(address, greeting, patience_s=OPEN_S)
        name = f"listen-{self._peer}"
        threading.Thread(target=self._listen, args=(self._sock,), name=name, daemon=True).start()
        return self._sock

    def _listen(self, sock: socket.socket) -> None:
        """Hear what fails there; a connection that ends is the member's end."""
        try:
            while True:
                message, _ = receive(sock, limit=PEER_LIMIT)
                number, step = map(int, message["failed"])
                self._epoch.fail_step(number, step, str(message["why"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            hang_up(sock)
            sock.close()
            if self._sock is sock:  # not one that was given up, for which another may stand
                self._epoch.member_gone(self._peer, str(error))


@dataclass(eq=False)
class _Run:
    """A unit of data that is sent for a unit of another member's parity."""

    parity: int
    begin: int
    """In the member's data."""
    size: int
    """Bytes; less than a unit at the end of the data."""
    at: int = 0
    """Bytes that were sent."""

    @property
    def chunk(self) -> int:
        """Bytes of the next chunk."""
        return min(CHUNK_BYTES, self.size - self.at)


_DONE = _Run(0, 0, 0)
_ABANDONED = _Run(0, 0, 0)


def _runs(own: Member, peer: int) -> Iterator[_Run]:
    """All that goes to a peer."""
    stripes, place = own.stripes, own.group.index(peer)
    for unit in range(stripes.k):
        begin, end = stripes.data_range(unit, own.length)
        parities = stripes.parity_members(stripes.stripe_of_data(own.place, unit))
        if begin < end and place in parities:
            yield _Run(parities.index(place), begin, end - begin)
