"""How far every rank can run a step's forwards before somebody's first backward.

The place where optimizer post-validation checks the step before (Qi et al., Zero Bubble Pipeline
Parallelism, section 4) and may throw the forwards away. A rank's own first backward will not do: in
a V placement other ranks' forwards still wait for the forwards that the first rank runs after its
first backward, so that a rank which stops there for good, or starts over, would leave them waiting.
"""

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule


def forwards_before_backward(schedule: Schedule) -> tuple[int, ...]:
    """Number of operations, by rank, that come before the check.

    All are forwards, none of them needs what another rank computes after its own check, and every
    other operation does, or comes after such a one. So every rank gets to its check whatever the
    others do at theirs.
    """
    place = {op: i for order in schedule.orders for i, op in enumerate(order)}
    ends = [
        next((i for i, op in enumerate(order) if op.kind is not Kind.F), len(order))
        for order in schedule.orders
    ]
    settled = False
    while not settled:
        settled = True
        for rank, order in enumerate(schedule.orders):
            for i, op in enumerate(order[: ends[rank]]):
                if _is_late(op, schedule, place, ends):
                    ends[rank], settled = i, False
                    break
    return tuple(ends)


def _is_late(op: Op, schedule: Schedule, place: dict[Op, int], ends: list[int]) -> bool:
    """Whether a forward needs one that its rank runs after its check."""
    if op.stage == 0:
        return False
    before = Op(op.stage - 1, Kind.F, op.microbatch)
    return place[before] >= ends[schedule.placement[before.stage]]
