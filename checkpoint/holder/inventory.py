"""What a holder says that it has: epochs, their members, and what is in each slot. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from phalanx.checkpoint.holder.spec import VERSION, HolderError, Spec
from phalanx.checkpoint.holder.transport import Address, address_of

EMPTY = "empty"
FILLING = "filling"
COMPLETE = "complete"
COMMITTED = "committed"
DAMAGED = "damaged"
"""Its memory no longer had its digests."""
WHOLE = frozenset({COMPLETE, COMMITTED})
"""States of a slot whose data and parity are there."""


@dataclass(frozen=True, kw_only=True)
class SlotInventory:
    """One member's part of the snapshot in one slot."""

    slot: int
    step: int | None
    """None = the slot is empty."""
    state: str
    meta: Any = None
    """What the trainer gave when it was committed."""
    digest: int | None = None
    """Of this member's data, once it is there."""
    digests: tuple[int, ...] = ()
    """Of all members' data, once it is committed."""

    @property
    def whole(self) -> bool:
        """Whether the member's data and parity are there."""
        return self.state in WHOLE

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "slot": self.slot,
            "step": self.step,
            "state": self.state,
            "meta": self.meta,
            "digest": self.digest,
            "digests": list(self.digests) or None,
            "data_ok": self.whole,
            "parity_ok": self.whole,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "SlotInventory":
        """What `to_json` gave."""
        return SlotInventory(
            slot=body["slot"],
            step=body["step"],
            state=body["state"],
            meta=body["meta"],
            digest=body["digest"],
            digests=tuple(body["digests"] or ()),
        )


@dataclass(frozen=True, kw_only=True)
class EpochInventory:
    """What a holder has of one epoch."""

    spec: Spec
    frozen: bool
    """Whether a later one was opened."""
    bytes: int
    """Of all its memory."""
    taken: int
    """Of these, so far."""
    attached: tuple[int, ...]
    """Ranks that are connected to fill it."""
    members: Mapping[int, tuple[SlotInventory, ...]]
    """By number, those of which it has something."""

    @property
    def epoch(self) -> str:
        """Its name."""
        return self.spec.epoch

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "epoch": self.epoch,
            "spec": self.spec.to_json(),
            "frozen": self.frozen,
            "bytes": self.bytes,
            "taken": self.taken,
            "attached": list(self.attached),
            "members": {
                str(member): {"slots": [slot.to_json() for slot in slots]}
                for member, slots in self.members.items()
            },
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "EpochInventory":
        """What `to_json` gave."""
        return EpochInventory(
            spec=Spec.from_json(body["spec"]),
            frozen=body["frozen"],
            bytes=body["bytes"],
            taken=body["taken"],
            attached=tuple(body["attached"]),
            members={
                int(member): tuple(map(SlotInventory.from_json, held["slots"]))
                for member, held in body["members"].items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All that one holder has."""

    pid: int
    """The holder's process."""
    address: Address | None
    """Where other nodes' holders reach it; None = nowhere."""
    epochs: tuple[EpochInventory, ...]
    """Oldest first."""

    @property
    def taken(self) -> int:
        """Bytes of memory that snapshots have taken so far."""
        return sum(epoch.taken for epoch in self.epochs)

    def without_tables(self) -> "Inventory":
        """The same without the parts' tables: of n nodes, each has those of all n."""
        return replace(
            self,
            epochs=tuple(
                replace(epoch, spec=replace(epoch.spec, parts=())) for epoch in self.epochs
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "version": VERSION,
            "pid": self.pid,
            "address": self.address,
            "epochs": [epoch.to_json() for epoch in self.epochs],
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Inventory":
        """What `to_json` gave.

        Raises:
            HolderError: another version of this program gave it.
        """
        if body.get("version") != VERSION:
            raise HolderError(
                f"the holder (process {body.get('pid')}) was started by another version of this "
                "program; end that run, or the process"
            )
        return Inventory(
            pid=body["pid"],
            address=address_of(body["address"]),
            epochs=tuple(map(EpochInventory.from_json, body["epochs"])),
        )
