"""The threads that protect an epoch's snapshots: one that hashes, one for each member to push to.

Torch-free.
"""

import socket
import threading
from functools import partial

from phalanx.checkpoint.holder.server.fold import Folder, Incoming
from phalanx.checkpoint.holder.server.live import LiveEpoch
from phalanx.checkpoint.holder.server.push import Sender
from phalanx.checkpoint.holder.server.slots import Generation, digest_of
from phalanx.checkpoint.holder.transport import CHUNK_BYTES

HASH_BYTES = 4 * CHUNK_BYTES
"""Bytes that are hashed between two looks whether the snapshot still counts."""


class Protection:
    """Keeps an epoch's own member protected until the epoch is over."""

    def __init__(self, epoch: LiveEpoch) -> None:
        self.epoch = epoch
        self._folder = Folder(epoch) if epoch.own.peers else None
        self._senders = {peer: Sender(epoch, peer) for peer in epoch.own.peers}
        self._incoming: dict[int, Incoming] = {}
        """By member, the newest."""
        self._lock = threading.Lock()
        epoch.on_failed = self._tell
        for sender in self._senders.values():
            threading.Thread(target=sender.run, name="push", daemon=True).start()
        threading.Thread(target=self._keep, name="keep", daemon=True).start()

    def serve(self, sock: socket.socket, source: int) -> None:
        """Take a member's pushes, until its connection ends."""
        if self._folder is None or source not in self.epoch.own.peers:
            sock.close()
            return
        incoming = Incoming(sock, self.epoch, self._folder, source=source)
        with self._lock:
            self._incoming[source] = incoming
        why = "its connection ended"
        try:
            why = incoming.run()
        finally:
            with self._lock:
                newest = self._incoming.get(source) is incoming
                if newest:
                    del self._incoming[source]
            if newest:  # else it has connected anew, after it gave up what it pushed here
                self.epoch.member_gone(source, why)
                self._senders[source].give_up()

    def hang_up(self) -> None:
        """End all connections; when the epoch is over, so that its threads end."""
        for sender in self._senders.values():
            sender.hang_up()
        with self._lock:
            for incoming in self._incoming.values():
                incoming.hang_up()

    def _tell(self, generation: Generation) -> None:
        assert generation.failed is not None
        with self._lock:
            incoming = list(self._incoming.values())
        for one in incoming:
            one.tell(generation.slot.number, generation.step, generation.failed)

    # --- the thread that hashes, and finishes what is whole ---------------------------------------

    def _keep(self) -> None:
        while self._keep_one():
            pass

    def _keep_one(self) -> bool:
        """Do one piece of work; False once the epoch is over. A function of its own, so that the
        thread keeps nothing of a snapshot while it waits."""
        work = self.epoch.wait_for(self._find)
        if work is None:
            return False
        work()
        return True

    def _find(self) -> "partial[None] | None":
        """Work that can be done now; with the lock."""
        own = self.epoch.own
        for generation in self.epoch.filling():
            for rank in own.ranks:
                begin, end = generation.hashed[rank], generation.filled[rank]
                if begin < end:
                    return partial(self._hash, generation, rank, min(end, begin + HASH_BYTES))
            if generation.digest is None:
                if all(generation.filled[r] == own.spec.table(r).nbytes for r in own.ranks):
                    return partial(self._digest, generation)
            elif generation.sent.issuperset(own.peers) and generation.arrived.issuperset(own.peers):
                return partial(self._finish, generation)
        return None

    def _hash(self, generation: Generation, rank: int, end: int) -> None:
        view, begin = generation.slot.data[rank].view, generation.hashed[rank]
        for at in range(begin, end, CHUNK_BYTES):
            generation.hashers[rank].update(view[at : min(at + CHUNK_BYTES, end)])
        generation.hashed[rank] = end

    def _digest(self, generation: Generation) -> None:
        own = self.epoch.own
        digests = {rank: generation.hashers[rank].intdigest() for rank in own.ranks}
        with self.epoch.changed:
            generation.part_digests = digests
            self.epoch.changed.notify_all()

    def _finish(self, generation: Generation) -> None:
        if self._folder is not None:
            self._folder.finish(generation)
            generation.parity_digest = digest_of(generation.slot.parity.view)
        self.epoch.complete(generation)
