"""Schedules from building blocks.

Qi et al., Pipeline Parallelism with Controllable Memory (2405.15362), section 3: a block says when
one microbatch's F and B run on each stage. Repeated at an even pace it makes a schedule whose peak
memory is the activations' lifespan over that pace. `from_block` repeats a block, squeezes out the
idle slots, moves operations earlier while the peak holds, and places the W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.parallel.pipeline.graph import Kind, Schedule
from phalanx.parallel.pipeline.order.problem import KINDS, Problem, Word
from phalanx.parallel.pipeline.schedules.refine import refine
from phalanx.parallel.pipeline.simulate import Costs, Memory


@dataclass(frozen=True)
class Block:
    """One microbatch's operations, each a slot long."""

    placement: Sequence[int]
    """Rank of each stage; every rank has equally many."""
    forward: Sequence[int]
    """Slot of each stage's F."""
    backward: Sequence[int]
    """Slot of each stage's B."""

    @property
    def period(self) -> int:
        """Slots from one microbatch to the next: F, B and W of each of a rank's stages."""
        return 3 * self.placement.count(0)

    def repeat(self, num_microbatches: int) -> list[Word]:
        """Words of F, B and W, one a rank.

        Raises:
            ValueError: operations of a rank share a slot when the block is repeated.
        """
        words = []
        for rank in range(max(self.placement) + 1):
            ops = [
                (slot + self.period * i, KINDS.index(kind) * len(self.placement) + stage)
                for stage, kind, slot in self._slots(rank)
                for i in range(num_microbatches)
            ]
            words.append([letter for _, letter in sorted(ops)])
        return words

    def _slots(self, rank: int) -> list[tuple[int, Kind, int]]:
        """Stage, kind and slot of a rank's operations; a W has the first free slot after its B."""
        stages = [stage for stage, owner in enumerate(self.placement) if owner == rank]
        slots = [(stage, Kind.F, self.forward[stage]) for stage in stages]
        slots += [(stage, Kind.B, self.backward[stage]) for stage in stages]
        taken: dict[int, str] = {}
        for stage, kind, slot in slots:
            other = taken.setdefault(slot % self.period, f"{stage}{kind}")
            if other != f"{stage}{kind}":
                raise ValueError(
                    f"block: {other} and {stage}{kind} share a slot of rank {rank} when repeated "
                    f"every {self.period} slots; put them further apart"
                )
        for stage in sorted(stages, key=lambda stage: self.backward[stage]):
            slot = self.backward[stage] + 1
            while slot % self.period in taken:
                slot += 1
            taken[slot % self.period] = f"{stage}W"
            slots.append((stage, Kind.W, slot))
        return slots


def from_block(
    name: str, block: Block, num_microbatches: int, costs: Costs, *, peak_stages: int
) -> Schedule:
    """A schedule that repeats a block, ordered for `costs` by stage.

    `peak_stages` is the most stages' activations that a rank may hold, each from F to W.

    Raises:
        ValueError: the block cannot be repeated, or not within that peak.
    """
    plan = block.repeat(num_microbatches)
    num_stages = len(block.placement)
    least = max(_peak(word, num_stages) for word in plan)
    if least > peak_stages:
        raise ValueError(
            f"schedule {name}: its block holds {least} stages' activations; "
            f"a peak of {peak_stages} is too little"
        )
    held = Memory((1.0,) * num_stages, (0.0,) * num_stages, (-1.0,) * num_stages)
    problem = Problem(tuple(block.placement), num_microbatches, costs, held, float(peak_stages))
    return problem.schedule(name, refine(problem, plan))


def _peak(word: Word, num_stages: int) -> int:
    """Most stages' activations that a rank holds, each from F to B."""
    held = most = 0
    for letter in word:
        held += (letter < num_stages) - (num_stages <= letter < 2 * num_stages)
        most = max(most, held)
    return most
