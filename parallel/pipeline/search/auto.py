"""`auto`: the best schedule that the search finds for given costs within a memory limit.

Many plans are squeezed under many rules; the best are plans for another round; local search has the
last word. The objective is the longest time from a rank's first operation to its last, the papers'
figure; ties go to the shorter makespan, between placements also to the shorter steady time and
the lower peak.
"""

from phalanx.parallel.pipeline.graph import Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.order.problem import Problem
from phalanx.parallel.pipeline.search.rounds import Search
from phalanx.parallel.pipeline.simulate import Costs, Memory, report
from phalanx.parallel.pipeline.validate import validate

_EFFORT_S = 0.8
"""Of a search for equal stages, per stage of a rank."""


def best_order(
    placement: tuple[int, ...],
    *,
    num_microbatches: int,
    costs: Costs,
    memory: Memory,
    limit: float | None = None,
    effort_s: float = 2.0,
) -> Schedule:
    """Best schedule for stages that lie where they lie, equal or not.

    `costs` are in any unit, `memory` and `limit` (of each rank) in any other. `effort_s` is about
    the seconds that it may take; they are counted in steps, so that the same input gives the same
    schedule on every machine.

    Raises:
        ValueError: no schedule keeps within the limit (says the least one that would do), or the
            placement is neither a loop nor a V.
    """
    least = least_memory(placement, num_microbatches=num_microbatches, memory=memory)
    if limit is not None and limit < least * (1 - 1e-9):
        raise ValueError(
            f"memory limit {limit:g}: no schedule of this pipeline holds so little on every rank; "
            f"the least that would do is {least:g}"
        )
    problem = Problem(placement, num_microbatches, costs, memory, limit)
    schedule = problem.schedule("auto", Search(problem, effort_s).run())
    validate(schedule, memory=memory, limit=limit)
    return schedule


def best_schedule(
    *,
    num_ranks: int,
    num_microbatches: int,
    f: float,
    b: float,
    w: float,
    hop: float,
    memory: tuple[float, float, float] = (2.0, -1.0, -1.0),
    limit: float | None = None,
) -> Schedule:
    """Best schedule of equal stages: one a rank, or two in a V, of half the cost and memory each.

    Raises:
        ValueError: no schedule keeps within the limit.
    """
    if num_ranks < 1 or num_microbatches < 1:
        raise ValueError(
            f"{num_ranks} ranks and {num_microbatches} microbatches: a schedule needs one of each"
        )
    found = []
    for chunks, placement in ((1, loop_placement(num_ranks)), (2, v_placement(num_ranks))):
        size = {"num_stages": len(placement), "chunks": chunks}
        costs = Costs.uniform(f, b, w, hop, **size)
        deltas = Memory.uniform(*memory, **size)
        schedule = best_order(
            placement,
            num_microbatches=num_microbatches,
            costs=costs,
            memory=deltas,
            limit=limit,
            effort_s=_EFFORT_S * chunks,
        )
        result = report(schedule, costs, deltas)
        key = (result.longest_stage, result.makespan, result.steady_time, result.peak_memory)
        found.append((tuple(float(f"{x:.12g}") for x in key), chunks, schedule))
    return min(found, key=lambda x: x[:2])[2]


def least_memory(placement: tuple[int, ...], *, num_microbatches: int, memory: Memory) -> float:
    """Smallest limit that any schedule can meet, in the memory's unit.

    It is what one microbatch after another holds, each W right after its B.
    """
    least = 0.0
    for rank in set(placement):
        stages = [s for s in range(len(placement)) if placement[s] == rank]
        held = 0.0
        for _ in range(num_microbatches):
            for change in (
                *(memory.f[s] for s in stages),
                *(x for s in reversed(stages) for x in (memory.b[s], memory.w[s])),
            ):
                held += change
                least = max(least, held)
    return least
