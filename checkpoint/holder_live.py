"""What ranks do with the epoch in use: fill, protect, commit. Torch-free."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from phalanx.checkpoint.holder_own import OVERWRITE_S, OwnEpoch
from phalanx.checkpoint.holder_slots import COMMITTED, FILLING, Generation
from phalanx.checkpoint.holder_spec import HolderError, Spec
from phalanx.checkpoint.transport import ALIVE_S


class LiveEpoch(OwnEpoch):
    """The epoch that this node's ranks fill."""

    def __init__(self, spec: Spec, *, own: int) -> None:
        super().__init__(spec, own=own)
        self._attached: dict[int, set[object]] = {}
        """By rank, those who speak for it."""

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
