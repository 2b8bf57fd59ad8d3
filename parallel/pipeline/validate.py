"""Whether a schedule can run: complete, in an order that ends, within memory."""

from collections import Counter

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.simulate import Costs, Memory, simulate

_SLACK = 1e-9
"""Relative; sums of equal fractions differ by rounding."""


def validate(
    schedule: Schedule, *, memory: Memory | None = None, limit: float | None = None
) -> None:
    """Check a schedule; with `memory` and `limit` also that no rank ever holds more.

    Raises:
        ValueError: names the first operation that is wrong.
    """
    _check_placement(schedule)
    _check_complete(schedule)
    for order in schedule.orders:
        _check_order(schedule, order)
    simulate(schedule, Costs.uniform(1, 1, 1, num_stages=schedule.num_stages))
    if memory is not None and limit is not None:
        _check_memory(schedule, memory, limit)


def _check_placement(schedule: Schedule) -> None:
    ranks = set(schedule.placement)
    if ranks != set(range(schedule.num_ranks)):
        raise ValueError(
            f"schedule {schedule.name}: stages are placed on ranks {sorted(ranks)}, but it orders "
            f"{schedule.num_ranks} ranks; place at least one stage on each"
        )


def _check_complete(schedule: Schedule) -> None:
    """Every stage does F, B and W of every microbatch once, on its own rank."""
    done: Counter[tuple[int, Kind, int]] = Counter()
    for rank, order in enumerate(schedule.orders):
        for op in order:
            if not (
                0 <= op.stage < schedule.num_stages
                and 0 <= op.microbatch < schedule.num_microbatches
            ):
                raise ValueError(
                    f"schedule {schedule.name}: rank {rank} has {op}, but there are "
                    f"{schedule.num_stages} stages and {schedule.num_microbatches} microbatches"
                )
            if schedule.placement[op.stage] != rank:
                raise ValueError(
                    f"schedule {schedule.name}: rank {rank} has {op}, but stage {op.stage} lies on "
                    f"rank {schedule.placement[op.stage]}"
                )
            for kind in (Kind.B, Kind.W) if op.kind is Kind.BW else (op.kind,):
                done[op.stage, kind, op.microbatch] += 1
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            for kind in (Kind.F, Kind.B, Kind.W):
                times = done[stage, kind, microbatch]
                if times != 1:
                    raise ValueError(
                        f"schedule {schedule.name}: {Op(stage, kind, microbatch)} is "
                        f"{'missing' if times == 0 else f'done {times} times'}"
                    )


def _check_order(schedule: Schedule, order: tuple[Op, ...]) -> None:
    """On a rank, F comes before B and B before W; each kind takes microbatches in order.

    The order of microbatches makes every schedule add up gradients alike, bit for bit.
    """
    seen: set[tuple[int, Kind, int]] = set()
    following: Counter[tuple[int, Kind]] = Counter()
    for op in order:
        stage, kind, microbatch = op
        needed = {Kind.B: Kind.F, Kind.BW: Kind.F, Kind.W: Kind.B}.get(kind)
        if needed is not None and (stage, needed, microbatch) not in seen:
            raise ValueError(
                f"schedule {schedule.name}: {op} comes before {Op(stage, needed, microbatch)}"
            )
        for part in (Kind.B, Kind.W) if kind is Kind.BW else (kind,):
            expected = following[stage, part]
            if microbatch != expected:
                raise ValueError(
                    f"schedule {schedule.name}: {op} comes before {Op(stage, part, expected)}; "
                    "a stage takes its microbatches in order"
                )
            following[stage, part] += 1
            seen.add((stage, part, microbatch))


def _check_memory(schedule: Schedule, memory: Memory, limit: float) -> None:
    for rank, order in enumerate(schedule.orders):
        for op, held in zip(order, memory.after(order), strict=True):
            if held > limit * (1 + _SLACK):
                raise ValueError(
                    f"schedule {schedule.name}: rank {rank} holds {held:g} after {op}, "
                    f"over the limit of {limit:g}"
                )
