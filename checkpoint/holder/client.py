"""How ranks and tools speak to the holder of their node.

A rank attaches to its part's memory and fills it, then the holders protect it; see `server.live`
for the rules. Torch-free.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from phalanx.checkpoint.holder.inventory import Inventory
from phalanx.checkpoint.holder.line import HolderGone, HolderSilent, Line, mapped
from phalanx.checkpoint.holder.spec import HolderError, Spec
from phalanx.checkpoint.holder.transport import Address

__all__ = ["HolderClient", "HolderError", "HolderGone", "HolderSilent"]


class HolderClient(Line):
    """One connection to a holder, for one thread at a time.

    Every method raises HolderGone when the holder is dead (HolderSilent when it only looks so), and
    HolderError when it cannot do what it is asked.
    """

    def __init__(self, sock: socket.socket, *, still_s: float) -> None:
        super().__init__(sock, still_s=still_s)
        self._begun: dict[tuple[str, int], int] = {}

    # --- of any process ---------------------------------------------------------------------------

    def hello(self) -> int:
        """The holder's process."""
        return int(self._call("hello"))

    def directory(self) -> str:
        """Where the holder's run saves, see `job.directory_of`; "" = unknown."""
        return str(self._call("directory"))

    def in_use(self, quiet_s: float) -> str | None:
        """Why the holder's run needs it, or has within so many seconds; None = it only lingers."""
        why: str | None = self._call("in_use", quiet_s=quiet_s)
        return why

    def retire(self, quiet_s: float) -> None:
        """End a holder that only lingers, and with it all that it holds; returns when it is gone.

        Raises:
            HolderError: it is in use, see `in_use`; nothing has happened then.
        """
        with _until_gone():
            self._call("retire", quiet_s=quiet_s)
            self.finish()

    def inventory(self) -> Inventory:
        """What the holder has."""
        return Inventory.from_json(self._call("inventory"))

    def verify(self, epoch: str, member: int, slot: int) -> bool:
        """Whether a member's data still has its digest; where not, it counts as damaged."""
        return bool(self._call("verify", epoch=epoch, member=member, slot=slot))

    def attach_member(self, epoch: str, member: int, rank: int, slot: int) -> memoryview:
        """A rank's part in a whole snapshot, to be read."""
        nbytes, fds = self._call_for_fds("read", epoch=epoch, member=member, rank=rank, slot=slot)
        return mapped([nbytes], fds, write=False, populate=[False])[0]

    # --- of one rank a node -----------------------------------------------------------------------

    def listen(self, host: str) -> Address:
        """Let other nodes' holders connect, at this address of the machine."""
        host, port = self._call("listen", host=host)
        return str(host), int(port)

    def open(self, spec: Spec, *, member: int, populate: int) -> None:
        """Begin an epoch; those before it keep what is whole, and nothing more is done in them.

        Args:
            member: which of the nodes this is.
            populate: generations whose memory is taken now; the others' is when it is written.
        """
        self._call("open", spec=spec.to_json(), member=member, populate=populate)

    def protect(self, epoch: str, slot: int, step: int) -> dict[str, Any]:
        """Wait until all the node's ranks have filled their parts, and their parity is where it
        belongs: {"digest": of the node's data, "encode_s", "sent_s", "sent_bytes"}."""
        return dict(self._call("protect", epoch=epoch, slot=slot, step=step))

    def commit(
        self, epoch: str, slot: int, step: int, *, digests: Sequence[int], meta: Mapping[str, Any]
    ) -> None:
        """Say that `protect` has returned on every node.

        Args:
            digests: what it gave, by member.
            meta: what the trainer wants to know when it comes back.
        """
        self._call(
            "commit", epoch=epoch, slot=slot, step=step, digests=list(digests), meta=dict(meta)
        )

    def rebuild(
        self,
        spec: Spec,
        *,
        member: int,
        step: int,
        meta: Mapping[str, Any],
        digests: Sequence[int],
        sources: Mapping[int, Address],
    ) -> None:
        """Make a lost member's data and parity of a committed step; this holder has it then.

        Args:
            spec: the epoch's.
            meta, digests: those of the commit, as another member's slot has them.
            sources: address, as `listen` gave it, of the holder of each member that is left.
        """
        self._call(
            "rebuild",
            spec=spec.to_json(),
            member=member,
            step=step,
            meta=dict(meta),
            digests=list(digests),
            sources={str(other): address for other, address in sources.items()},
        )

    def drain(
        self,
        epoch: str,
        slot: int,
        step: int,
        *,
        url: str,
        folder: str,
        storage: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write the files of all members that this holder has to storage; asked again after a
        failure, it writes those that are not there yet.

        Args:
            folder: below `url`.
            storage: StorageConfig's fields.

        Returns:
            {"parts": [StoredPart as JSON], "parity": [StoredParity as JSON], "seconds", "bytes"}
        """
        return dict(
            self._call(
                "drain",
                epoch=epoch,
                slot=slot,
                step=step,
                url=url,
                folder=folder,
                storage=dict(storage),
            )
        )

    def forget(self, epoch: str) -> None:
        """Let go of all that is held of an epoch; nothing happens where there is none."""
        self._call("forget", epoch=epoch)

    def finish(self) -> None:
        """End the holder, and with it all that it holds; returns when it is gone."""
        with _until_gone():
            while True:
                self._call("finish")

    # --- of every rank ----------------------------------------------------------------------------

    def attach(self, epoch: str, rank: int) -> list[memoryview]:
        """The memory of a rank's part, by slot. While this client is connected, the rank lives."""
        value, fds = self._call_for_fds("attach", epoch=epoch, rank=rank)
        return mapped(value["lengths"], fds, write=True, populate=value["populated"])

    def begin(self, epoch: str, slot: int, step: int) -> None:
        """Before the slot's memory is written: it belongs to this step's snapshot from now on.

        All ranks of a node say so; steps only grow in an epoch. The newest committed snapshot is
        never overwritten: this waits for the one after it to be committed here, then gives up.
        """
        self._call("begin", epoch=epoch, slot=slot, step=step)
        self._begun[epoch, slot] = step

    def filled(self, epoch: str, rank: int, slot: int, nbytes: int) -> None:
        """So many bytes of the rank's part are there; also said once of a part of no bytes."""
        if (epoch, slot) not in self._begun:
            raise HolderError(f"slot {slot} was filled, but not begun by this client")
        step = self._begun[epoch, slot]
        self._call("filled", epoch=epoch, rank=rank, slot=slot, step=step, bytes=nbytes)


@contextmanager
def _until_gone() -> Iterator[None]:
    """That the holder is gone is what is wanted; one that only stands still is not gone."""
    try:
        yield
    except HolderSilent:
        raise
    except HolderGone:
        pass
