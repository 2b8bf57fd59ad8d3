"""Connections from other nodes' holders: those that push, and those that rebuild a lost member of
what is here. Torch-free."""

import logging
import socket
import threading
from typing import Protocol

from phalanx.checkpoint.holder.server.epoch import HolderEpoch
from phalanx.checkpoint.holder.server.protect import Protection
from phalanx.checkpoint.holder.server.slots import Member, Slot, digest_of
from phalanx.checkpoint.holder.spec import HolderError
from phalanx.checkpoint.holder.transport import (
    FETCH,
    PEER_LIMIT,
    Address,
    hear_greeting,
    receive,
    send,
)

BACKLOG = 256

logger = logging.getLogger(__name__)


class HeldEpochs(Protocol):
    """What this holder has, as far as others may ask for it."""

    def tokens(self) -> dict[str, str]:
        """By epoch, what lets a neighbour in."""

    def epoch(self, name: str) -> HolderEpoch:
        """One epoch."""

    def protection(self, name: str) -> Protection | None:
        """Who protects an epoch's snapshots together with others; None where nobody does."""


class Neighbours:
    """Listens on TCP, where the job has several nodes; lets in who has an epoch's token."""

    def __init__(self, service: HeldEpochs) -> None:
        self._service = service
        self._listening: socket.socket | None = None
        self._host = ""
        self._lock = threading.Lock()

    @property
    def address(self) -> Address | None:
        """None before `listen`."""
        if self._listening is None:
            return None
        return self._host, int(self._listening.getsockname()[1])

    def listen(self, host: str) -> Address:
        """Listen on an address of this machine, from now on.

        Raises:
            OSError: it is none of this machine's.
        """
        with self._lock:
            if self._listening is None or self._host != host:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._listening = socket.create_server((host, 0), family=family, backlog=BACKLOG)
                self._host = host
                threading.Thread(
                    target=self._accept, args=(self._listening,), name="peers", daemon=True
                ).start()
            address = self.address
            assert address is not None
            return address

    def _accept(self, listening: socket.socket) -> None:
        while True:
            sock, address = listening.accept()
            name = f"peer-{address[0]}"
            threading.Thread(target=self._serve, args=(sock,), name=name, daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            greeting = hear_greeting(sock, self._service.tokens())
            epoch = self._service.epoch(str(greeting["epoch"]))
            if greeting.get("role") == FETCH:
                give(sock, epoch)
                return
            protection = self._service.protection(epoch.spec.epoch)
            if protection is None:
                return
            protection.serve(sock, int(greeting["member"]))
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            logger.info("a peer's connection ended: %s", error)
        finally:
            sock.close()


def give(sock: socket.socket, epoch: HolderEpoch) -> None:
    """Answer a holder that rebuilds, until it hangs up.

    Raises:
        OSError: it did.
    """
    while True:
        request, _ = receive(sock, limit=PEER_LIMIT)
        try:
            if "slot" in request:
                number, step = map(int, request["slot"])
                send(sock, {"slot": _checked(epoch, number, step)})
                continue
            number, step, kind, unit, most = request["unit"]
            with epoch.reading(epoch.slot_of(number, step), number, step) as generation:
                member = epoch.members[number]
                views = _unit(member, generation.slot, str(kind), int(unit), int(most))
                send(sock, {"bytes": sum(map(len, views))}, views)
        except (HolderError, KeyError, TypeError, ValueError) as error:
            send(sock, {"error": str(error)})


def _checked(epoch: HolderEpoch, number: int, step: int) -> int:
    """The slot in which a member has a snapshot of the step, with its parity as it was.

    Raises:
        HolderError: it has none, or the parity has changed: what is rebuilt of it would be wrong.
    """
    slot = epoch.slot_of(number, step)
    with epoch.reading(slot, number, step) as generation:
        if digest_of(generation.slot.parity.view) != generation.parity_digest:
            raise HolderError(f"its parity of step {step} has changed in memory")
    return slot


def _unit(member: Member, slot: Slot, kind: str, unit: int, most: int) -> list[memoryview]:
    """The first `most` bytes of a unit, as far as there are any, in pieces that one call sends."""
    stripes = member.stripes
    if not 0 <= unit < (stripes.k if kind == "data" else stripes.m) or most < 0:
        raise HolderError(f"no unit {unit} of {kind}")
    if kind == "data":
        begin, end = stripes.data_range(unit, member.length)
        return member.views(slot, begin, min(end, begin + most))
    first = unit * stripes.unit_bytes
    return [slot.parity.view[first : first + min(most, stripes.unit_bytes)]]
