"""The epoch that a job fills: what its ranks, its peers and the holder's threads do with it, and
what may overwrite which.

The rule that makes snapshots safe (`_kept`): the newest committed snapshot of a node is never
overwritten, neither by the node's own ranks nor by parity of members that are ahead. So whichever
members are lost, either one that is left has committed a step, and then every member had completed
it; or none has, and all that are left still hold the step before, whole. Torch-free.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phalanx.checkpoint.holder.inventory import COMMITTED, COMPLETE, FILLING
from phalanx.checkpoint.holder.server.epoch import HolderEpoch
from phalanx.checkpoint.holder.server.slots import Generation, Member, Slot
from phalanx.checkpoint.holder.spec import HolderError, Spec
from phalanx.checkpoint.holder.transport import ALIVE_S

OVERWRITE_S = 30.0
"""Seconds that a new snapshot waits for the slot that it is to overwrite to be free for it."""

logger = logging.getLogger(__name__)
Failed = Callable[[Generation], None]


class LiveEpoch(HolderEpoch):
    """The epoch in use, as one of its members."""

    def __init__(self, spec: Spec, *, own: int) -> None:
        super().__init__(spec)
        self.frozen = False
        self.own = Member(spec, own)
        """The member that this holder's ranks fill."""
        self.members[own] = self.own
        self.on_failed: Failed = lambda generation: None
        """Told, without the lock, of each generation that will never be complete."""
        self._attached: dict[int, set[object]] = {}
        """By rank, those who speak for it."""

    # --- by the node's ranks ----------------------------------------------------------------------

    def attach(self, rank: int, who: object) -> tuple[dict[str, Any], list[int]]:
        """The rank's memory by slot: lengths, which are populated, and descriptors (of those that
        are not empty), to be closed by the caller.

        Raises:
            HolderError: it is none of the node's ranks.
        """
        with self.changed:
            own = self._open()
            if rank not in own.ranks:
                raise HolderError(f"rank {rank} is not of member {own.number}, has {own.ranks}")
            self._attached.setdefault(rank, set()).add(who)
            parts = [own.slots[number].data[rank] for number in sorted(own.slots)]
            value = {
                "lengths": [part.nbytes for part in parts],
                "populated": [part.populated for part in parts],
            }
            return value, [os.dup(part.fd) for part in parts if part.nbytes]

    def attached(self) -> list[int]:
        """Ranks that are connected to fill it."""
        with self.changed:
            return sorted(rank for rank, who in self._attached.items() if who)

    def detach(self, rank: int, who: object) -> None:
        """Who spoke for the rank is gone; with the last one, what it had not filled has failed."""
        with self.changed:
            left = self._attached.get(rank, set())
            left.discard(who)
            lost = [] if left or self.closed else list(self._filling())
            if left:
                return
            need = self.spec.table(rank).nbytes
        for generation in lost:
            if generation.filled[rank] < need:
                self.fail(generation, f"rank {rank} of member {self.own.number} is gone")

    def begin(self, number: int, step: int) -> None:
        """From now on the slot belongs to this step's snapshot.

        Raises:
            HolderError: the slot cannot be overwritten.
        """
        deadline = time.monotonic() + OVERWRITE_S
        with self.changed:
            while True:
                slot = self._slot(number)
                generation = slot.generation
                if generation and generation.step == step and generation.state == FILLING:
                    return
                newest = max((g.step for g in self.own.generations() if g.whole), default=-1)
                newest = max(newest, generation.step if generation else -1)
                if step <= newest:
                    raise HolderError(
                        f"step {step} cannot be begun in slot {number} after step {newest}: steps "
                        "of an epoch only grow; open another epoch"
                    )
                if not self._kept(slot):
                    self._new_generation(slot, step)
                    return
                if not self.changed.wait(deadline - time.monotonic()):
                    assert generation is not None
                    raise HolderError(
                        f"slot {number} cannot be taken for step {step}: "
                        f"{self._why_kept(generation)}"
                    )

    def filled(self, rank: int, number: int, step: int, nbytes: int) -> None:
        """So many bytes of the rank's part are there.

        Raises:
            HolderError: the slot no longer belongs to the step, or the number makes no sense.
        """
        with self.changed:
            generation = self._generation(number, step)
            most = self.spec.table(rank).nbytes
            if not generation.filled.get(rank, most + 1) <= nbytes <= most:
                raise HolderError(
                    f"rank {rank} filled {nbytes} of {most} bytes, after "
                    f"{generation.filled.get(rank)}"
                )
            generation.filled[rank] = nbytes
            self.changed.notify_all()

    def protect(self, number: int, step: int, *, alive: Callable[[], bool]) -> Generation:
        """Wait until the snapshot is complete.

        Args:
            alive: whether the answer is still wanted.

        Raises:
            HolderError: it will never be; says why.
            ConnectionError: not `alive`.
        """
        with self.changed:
            while True:
                generation = self._generation(number, step)
                if generation.whole:
                    return generation
                if generation.failed is not None:
                    raise HolderError(f"snapshot of step {step}: {generation.failed}")
                if not self.changed.wait(ALIVE_S) and not alive():
                    raise ConnectionAbortedError("nobody waits for the answer")

    def commit(self, number: int, step: int, *, digests: Sequence[int], meta: Any) -> None:
        """Every member of the job has the snapshot complete.

        Raises:
            HolderError: it is not so here, or with other data.
        """
        with self.changed:
            if number not in self.own.slots:
                raise HolderError(f"no slot {number} in epoch {self.name}")
            generation = self.own.slots[number].generation
            if generation is None or generation.step != step or not generation.whole:
                raise HolderError(
                    f"step {step} in slot {number} is not complete here, it cannot be committed"
                )
            if len(digests) != len(self.spec.ranks):
                raise HolderError(f"{len(digests)} digests of {len(self.spec.ranks)} members")
            if digests[self.own.number] != generation.digest:
                raise HolderError(
                    f"step {step} in slot {number} has digest {generation.digest:016x} here, not "
                    f"{digests[self.own.number]:016x}"
                )
            generation.digests, generation.meta = list(digests), meta
            generation.state = COMMITTED
            self.changed.notify_all()

    # --- by peers and the holder's threads --------------------------------------------------------

    def touch(self, number: int, step: int, *, alive: Callable[[], bool]) -> Generation | str:
        """The generation that a member pushes to, begun where it is new; or why there is none."""
        deadline = time.monotonic() + OVERWRITE_S
        with self.changed:
            while True:
                if self.closed or self.frozen:
                    return f"epoch {self.name} is no longer in use"
                slot = self.own.slots.get(number)
                if slot is None:
                    return f"no slot {number}"
                generation = slot.generation
                if generation and step <= generation.step:
                    if step < generation.step or generation.whole:
                        return f"slot {number} holds step {generation.step}"
                    return generation if generation.failed is None else generation.failed
                if not self._kept(slot):
                    return self._new_generation(slot, step)
                assert generation is not None
                if time.monotonic() > deadline or not alive():
                    return f"member {self.own.number}: {self._why_kept(generation)}"
                self.changed.wait(ALIVE_S)

    def fail(self, generation: Generation, why: str) -> None:
        """The snapshot will never be complete."""
        with self.changed:
            if generation.failed is not None or generation.whole or self.closed:
                return
            generation.failed = why
            self.changed.notify_all()
        logger.warning("epoch %s, step %d: %s", self.name, generation.step, why)
        self.on_failed(generation)

    def fail_step(self, number: int, step: int, why: str) -> None:
        """The snapshot has failed at another member."""
        with self.changed:
            lost = [g for g in self._filling() if (g.slot.number, g.step) == (number, step)]
        for generation in lost:
            self.fail(generation, why)

    def member_gone(self, member: int, why: str) -> None:
        """What has not arrived from the member never will."""
        with self.changed:
            lost = [g for g in self._filling() if member not in g.arrived]
        for generation in lost:
            self.fail(generation, f"member {member} is gone ({why})")

    def current(self, generation: Generation) -> bool:
        """Whether work for the generation still has a use."""
        return (
            not self.closed
            and generation.slot.generation is generation
            and generation.failed is None
            and generation.state == FILLING
        )

    def wait_for(self, find: Callable[[], Any]) -> Any:
        """What `find` (called with the lock) finds, as soon as it does; None once nothing is done
        in this epoch any more."""
        with self.changed:
            while not self.closed and not self.frozen:
                found = find()
                if found is not None:
                    return found
                self.changed.wait()
            return None

    def filling(self) -> Iterator[Generation]:
        """Own generations on their way, oldest first; with the lock."""
        return (g for g in self._filling() if g.failed is None)

    def arrived(self, generation: Generation, source: int) -> None:
        """All of a member's data is in the parity."""
        with self.changed:
            generation.arrived.add(source)
            self.changed.notify_all()

    def sent(self, generation: Generation, peer: int, *, seconds: float, nbytes: int) -> None:
        """A member was sent all that it needs, in so many seconds of sending."""
        with self.changed:
            generation.sent.add(peer)
            generation.sent_s = max(generation.sent_s, seconds)
            generation.sent_bytes += nbytes
            self.changed.notify_all()

    def complete(self, generation: Generation) -> None:
        """Data and parity are there, in all of the group as far as it is this member's."""
        with self.changed:
            if self.current(generation):
                generation.state = COMPLETE
                self.changed.notify_all()

    def freeze(self) -> None:
        """A later epoch takes its place: what is on its way fails, its memory is let go of."""
        with self.changed:
            lost = list(self._filling())
        for generation in lost:
            self.fail(generation, "a later epoch was opened")
        super().freeze()

    # --- with the lock ----------------------------------------------------------------------------

    def _open(self) -> Member:
        if self.closed or self.frozen:
            raise HolderError(f"epoch {self.name} is over: a later one was opened")
        return self.own

    def _slot(self, number: int) -> Slot:
        slots = self._open().slots
        if number not in slots:
            raise HolderError(f"no slot {number}, there are {len(slots)}")
        return slots[number]

    def _generation(self, number: int, step: int) -> Generation:
        generation = self._slot(number).generation
        if generation is None or generation.step != step:
            holds = "nothing" if generation is None else f"step {generation.step}"
            raise HolderError(f"slot {number} holds {holds}, not step {step}")
        return generation

    def _filling(self) -> Iterator[Generation]:
        found = (g for g in self.own.generations() if g.state == FILLING)
        return iter(sorted(found, key=lambda generation: generation.step))

    def _kept(self, slot: Slot) -> bool:
        """Whether the slot must stay as it is, for the time being."""
        generation = slot.generation
        if generation is None:
            return False
        committed = [g.step for g in self.own.generations() if g.state == COMMITTED]
        newest = generation.state == COMMITTED and generation.step == max(committed)
        return newest or generation.pins > 0

    def _why_kept(self, generation: Generation) -> str:
        if generation.pins:
            return f"step {generation.step} in it is being read"
        return f"it holds the newest committed snapshot, of step {generation.step}"

    def _new_generation(self, slot: Slot, step: int) -> Generation:
        generation = slot.generation = Generation(slot, step, ranks=self.own.ranks)
        self.changed.notify_all()
        return generation
