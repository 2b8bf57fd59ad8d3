"""What a holder has of one epoch, to be read: whole snapshots of members, by slot. Torch-free."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from phalanx.checkpoint.holder.inventory import COMMITTED, DAMAGED, EpochInventory
from phalanx.checkpoint.holder.server.slots import (
    Generation,
    Member,
    combined,
    describe,
    part_digests_of,
)
from phalanx.checkpoint.holder.spec import HolderError, Spec

logger = logging.getLogger(__name__)


class HolderEpoch:
    """An epoch of which members' snapshots are held; one lock guards all of it, and who waits for
    a change waits there.

    As it stands, nothing is done in it any more: all that is held was rebuilt, or is left of a time
    when it was a `LiveEpoch`.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.name = spec.epoch
        self.changed = threading.Condition()
        self.members: dict[int, Member] = {}
        self.closed = False
        self.frozen = True
        """Whether a later epoch has taken its place: what is whole stays, nothing is begun."""

    @contextmanager
    def reading(self, number: int, member: int, step: int | None = None) -> Iterator[Generation]:
        """A whole snapshot that is not overwritten meanwhile.

        Raises:
            HolderError: there is none.
        """
        with self.changed:
            slot = self.members[member].slots.get(number) if member in self.members else None
            generation = slot.generation if slot else None
            if generation is None or not generation.whole or step not in (None, generation.step):
                wanted = "a snapshot" if step is None else f"step {step}"
                raise HolderError(
                    f"{wanted} of member {member} is not in slot {number} of epoch {self.name}"
                )
            generation.pins += 1
        try:
            yield generation
        finally:
            with self.changed:
                generation.pins -= 1
                self.changed.notify_all()

    def reader(self, member: int, rank: int, number: int) -> tuple[int, list[int]]:
        """A rank's part of a whole snapshot: its length, and a descriptor where that is not 0.

        Raises:
            HolderError: there is none.
        """
        with self.reading(number, member) as generation:
            if rank not in generation.slot.data:
                raise HolderError(f"rank {rank} is not of member {member}")
            part = generation.slot.data[rank]
            return part.nbytes, [os.dup(part.fd)] if part.nbytes else []

    def verify(self, member: int, number: int) -> bool:
        """Whether the data still has its digest.

        Raises:
            HolderError: no whole snapshot is there.
        """
        with self.reading(number, member) as generation:
            if combined(part_digests_of(generation.slot).values()) == generation.digest:
                return True
            self.damage(member, generation)
        return False

    def damage(self, member: int, generation: Generation) -> None:
        """The snapshot's memory has changed: from now on, the member has lost it."""
        with self.changed:
            generation.state = DAMAGED
            self.changed.notify_all()
        logger.warning(
            "epoch %s: member %d of step %d is damaged", self.name, member, generation.step
        )

    def slot_of(self, member: int, step: int) -> int:
        """The slot in which a member has a whole snapshot of the step.

        Raises:
            HolderError: it has none.
        """
        with self.changed:
            held = self.members.get(member)
            for number, slot in held.slots.items() if held else ():
                if slot.generation and slot.generation.whole and slot.generation.step == step:
                    return number
        raise HolderError(f"step {step} of member {member} is not here")

    def holders_of(self, number: int, step: int) -> list[int]:
        """The members whose whole snapshot of the step is in this slot."""
        with self.changed:
            return [
                member
                for member, held in sorted(self.members.items())
                if number in held.slots
                and (generation := held.slots[number].generation) is not None
                and generation.whole
                and generation.step == step
            ]

    def adopt(self, rebuilt: Member) -> None:
        """Hold a member that was rebuilt; a damaged one in its place goes."""
        with self.changed:
            held = self.members.setdefault(rebuilt.number, rebuilt)
            if held is not rebuilt:
                for number, slot in rebuilt.slots.items():
                    held.free(number)
                    held.slots[number] = slot
            self.changed.notify_all()

    def freeze(self) -> None:
        """A later epoch takes its place, and needs memory: of what is here, only that is kept which
        a new start may have to go on from.

        That is the newest committed snapshot (once it is committed anywhere, it is complete
        everywhere), and what is complete and newer; and what is being read.
        """
        with self.changed:
            self.frozen = True
            for member in self.members.values():
                committed = [g.step for g in member.generations() if g.state == COMMITTED]
                for number, slot in list(member.slots.items()):
                    generation = slot.generation
                    if generation is None or not (
                        generation.pins
                        or (generation.whole and generation.step >= max(committed, default=0))
                    ):
                        member.free(number)
            self.changed.notify_all()

    def close(self) -> None:
        """Let go of all memory."""
        with self.changed:
            self.closed = True
            for member in self.members.values():
                for number in list(member.slots):
                    member.free(number)
            self.members.clear()
            self.changed.notify_all()

    def attached(self) -> list[int]:
        """Ranks that are connected to fill it."""
        return []

    def inventory(self) -> EpochInventory:
        """What it holds."""
        with self.changed:
            members = {
                number: tuple(describe(slot) for _, slot in sorted(member.slots.items()))
                for number, member in self.members.items()
            }
            memories = [
                memory
                for member in self.members.values()
                for slot in member.slots.values()
                for memory in slot.memories
            ]
            nbytes, taken = sum(m.nbytes for m in memories), sum(m.taken for m in memories)
        return EpochInventory(
            spec=self.spec,
            frozen=self.frozen,
            bytes=nbytes,
            taken=taken,
            attached=tuple(self.attached()),
            members=members,
        )
