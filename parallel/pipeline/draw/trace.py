"""A timeline as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

The format is Google's Trace Event Format: a process for each rank, a slice for each operation, an
arrow for each message between ranks, a counter for the memory held. Times are in microseconds.
"""

from collections.abc import Iterator
from typing import Any

from phalanx.parallel.pipeline.draw.layout import memory_curve
from phalanx.parallel.pipeline.draw.picture import KINDS
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.simulate import Memory, Timeline

Event = dict[str, Any]


def trace_events(
    timeline: Timeline,
    schedule: Schedule,
    memory: Memory | None = None,
    *,
    microseconds: float = 1.0,
) -> dict[str, Any]:
    """The trace, ready for json.dump.

    `microseconds` is the length of the timeline's unit of time; with `memory` each rank has a
    counter of it.
    """
    events: list[Event] = []
    for rank, order in enumerate(schedule.orders):
        start = [time * microseconds for time in timeline.start[rank]]
        end = [time * microseconds for time in timeline.end[rank]]
        events += _names(rank, schedule)
        events += [
            _slice(schedule, rank, op, begin, finish)
            for op, begin, finish in zip(order, start, end, strict=True)
        ]
        if memory is not None:
            events.append(_counter(rank, start[0] if start else 0.0, 0.0))
            curve = memory_curve(order, start, end, memory)
            events += [_counter(rank, time, held) for time, held in curve]
    events += _arrows(timeline, schedule, microseconds)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"schedule": schedule.name, "microbatches": schedule.num_microbatches},
    }


def _names(rank: int, schedule: Schedule) -> Iterator[Event]:
    stages = ", ".join(map(str, schedule.stages_of(rank)))
    for name, args in (
        ("process_name", {"name": f"rank {rank} (stage {stages})"}),
        ("process_sort_index", {"sort_index": rank}),
    ):
        yield {"ph": "M", "name": name, "pid": rank, "args": args}
    yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "compute"}}


def _slice(schedule: Schedule, rank: int, op: Op, start: float, end: float) -> Event:
    chunk = schedule.chunk(op.stage)
    return {
        "ph": "X",
        "name": f"{op.kind.value} {op.microbatch}",
        "cat": KINDS[op.kind],
        "pid": rank,
        "tid": 0,
        "ts": start,
        "dur": end - start,
        "args": {"op": str(op), "stage": op.stage, "chunk": chunk, "microbatch": op.microbatch},
    }


def _counter(rank: int, time: float, held: float) -> Event:
    return {"ph": "C", "name": "memory", "pid": rank, "ts": time, "args": {"held": held}}


def _arrows(timeline: Timeline, schedule: Schedule, microseconds: float) -> Iterator[Event]:
    """From each operation to the one on another rank that waits for its result."""
    when = {
        (op.stage, Kind.F if op.kind is Kind.F else Kind.B, op.microbatch): (begin, end, op.kind)
        for order, starts, ends in zip(schedule.orders, timeline.start, timeline.end, strict=True)
        for op, begin, end in zip(order, starts, ends, strict=True)
        if op.kind is not Kind.W
    }
    number = 0
    for (stage, kind, microbatch), (begin, end, _) in when.items():
        target = stage + (1 if kind is Kind.F else -1)
        if not 0 <= target < schedule.num_stages:
            continue
        source_rank, target_rank = schedule.placement[stage], schedule.placement[target]
        if source_rank == target_rank:
            continue
        arrival = when[target, kind, microbatch][0]
        # An arrow hangs on the slice around its time: so it leaves just before the slice's end.
        leaves = (begin + 0.999 * (end - begin)) * microseconds
        common = {"name": "activation" if kind is Kind.F else "gradient", "cat": "send"}
        common |= {"id": number, "tid": 0}  # type: ignore[dict-item]
        yield common | {"ph": "s", "pid": source_rank, "ts": leaves}
        yield common | {"ph": "f", "bp": "e", "pid": target_rank, "ts": arrival * microseconds}
        number += 1
