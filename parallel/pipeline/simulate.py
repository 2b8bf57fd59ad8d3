"""Exact in-order replay of a schedule: when each operation runs, and what memory each rank holds.

Every rank runs its operations in order, each as soon as what it depends on has arrived. Bubbles are
the share of time in which ranks do not compute:

- *span*: of the longest time from a rank's first operation to its last (Zero Bubble, section 4);
- *makespan*: of the time from the first operation anywhere to the last;
- *steady*: of the time that one more step adds when steps follow each other without a barrier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule


@dataclass(frozen=True)
class _PerStage:
    """A number for each kind of operation of each stage."""

    f: tuple[float, ...]
    """By stage."""
    b: tuple[float, ...]
    w: tuple[float, ...]

    def of(self, op: Op) -> float:
        """An operation's number; that of a BW is B's and W's together."""
        if op.kind is Kind.F:
            return self.f[op.stage]
        if op.kind is Kind.B:
            return self.b[op.stage]
        if op.kind is Kind.W:
            return self.w[op.stage]
        return self.b[op.stage] + self.w[op.stage]


@dataclass(frozen=True)
class Costs(_PerStage):
    """Time of each stage's operations, in any unit, and of sending between two ranks."""

    hop: float = 0.0
    """From the end of an operation to the arrival of its result at another rank."""

    @classmethod
    def uniform(
        cls, f: float, b: float, w: float, hop: float = 0.0, *, num_stages: int, chunks: int = 1
    ) -> "Costs":
        """Equal stages; f, b and w of a whole rank, of which a stage has 1 / chunks."""
        f_, b_, w_ = ((x / chunks,) * num_stages for x in (f, b, w))
        return cls(f_, b_, w_, hop)

    def work(self, schedule: Schedule, rank: int) -> float:
        """Computing time of a rank in one step."""
        stages = schedule.stages_of(rank)
        return schedule.num_microbatches * sum(self.f[s] + self.b[s] + self.w[s] for s in stages)


@dataclass(frozen=True)
class Memory(_PerStage):
    """What one microbatch's operation adds to its rank's memory, by stage, in any unit."""

    @classmethod
    def uniform(cls, f: float, b: float, w: float, *, num_stages: int, chunks: int = 1) -> "Memory":
        """Equal stages; f, b and w of a whole rank, of which a stage has 1 / chunks."""
        f_, b_, w_ = ((x / chunks,) * num_stages for x in (f, b, w))
        return cls(f_, b_, w_)

    @classmethod
    def microbatches(cls, schedule: Schedule) -> "Memory":
        """Counts microbatches held from F to W; a stage of a rank with n counts 1 / n."""
        held = [1 / len(schedule.stages_of(rank)) for rank in schedule.placement]
        return cls(tuple(held), (0.0,) * len(held), tuple(-x for x in held))

    def after(self, order: Sequence[Op]) -> list[float]:
        """Memory held after each operation of a rank."""
        return list(accumulate(self.of(op) for op in order))

    def peak(self, schedule: Schedule) -> float:
        """Most memory that any rank holds after any operation."""
        return max(max(self.after(order), default=0.0) for order in schedule.orders)


@dataclass(frozen=True)
class Timeline:
    """When each operation runs, by rank and place in its order."""

    start: list[list[float]]
    end: list[list[float]]

    @property
    def longest_stage(self) -> float:
        """Longest time from a rank's first operation to its last."""
        return max(end[-1] - start[0] for start, end in zip(self.start, self.end, strict=True))

    @property
    def makespan(self) -> float:
        """Time from the first operation to the last."""
        return max(end[-1] for end in self.end) - min(start[0] for start in self.start)


def simulate(schedule: Schedule, costs: Costs, *, steps: int = 1) -> Timeline:
    """Replay a schedule, `steps` times in a row without a barrier.

    Raises:
        ValueError: the orders wait for each other in a circle, or for something that no rank does.
    """
    replay = _Replay(schedule, costs, steps)
    replay.run()
    return Timeline(replay.start, replay.end)


def steady_time(schedule: Schedule, costs: Costs, *, steps: int = 6) -> float:
    """Time that one more step adds to a long chain of steps without a barrier between them."""
    timeline = simulate(schedule, costs, steps=steps)
    ends = [
        max(end[len(end) // steps * step - 1] for end in timeline.end)
        for step in range(1, steps + 1)
    ]
    return (ends[-1] - ends[steps // 2 - 1]) / (steps - steps // 2)


@dataclass(frozen=True, kw_only=True)
class ScheduleReport:
    """What a schedule costs; times and memory in the units of its costs and deltas."""

    span_bubble: float
    makespan_bubble: float
    steady_bubble: float
    longest_stage: float
    makespan: float
    steady_time: float
    peak_memory: float
    peak_microbatches: float
    """Most microbatches whose activations any rank holds, from F to W."""


def report(schedule: Schedule, costs: Costs, memory: Memory) -> ScheduleReport:
    """Replay a schedule and measure it.

    Raises:
        ValueError: as `simulate`.
    """
    timeline = simulate(schedule, costs)
    steady = steady_time(schedule, costs)
    ranks = range(schedule.num_ranks)
    work = sum(costs.work(schedule, rank) for rank in ranks) / schedule.num_ranks

    def bubble(time: float) -> float:
        return (time - work) / time if time else 0.0

    return ScheduleReport(
        span_bubble=bubble(timeline.longest_stage),
        makespan_bubble=bubble(timeline.makespan),
        steady_bubble=bubble(steady),
        longest_stage=timeline.longest_stage,
        makespan=timeline.makespan,
        steady_time=steady,
        peak_memory=memory.peak(schedule),
        peak_microbatches=Memory.microbatches(schedule).peak(schedule),
    )


class _Replay:
    """Ranks advance until each waits or is done; an operation that ends wakes who waits for it.

    Operations are numbered (step, F or B or W, stage, microbatch) so that times lie in one list.
    """

    def __init__(self, schedule: Schedule, costs: Costs, steps: int) -> None:
        self.schedule = schedule
        self.costs = costs
        self.num = schedule.num_stages * schedule.num_microbatches
        self.done: list[float | None] = [None] * (3 * self.num * steps)
        self.steps = steps
        self.start: list[list[float]] = [[] for _ in schedule.orders]
        self.end: list[list[float]] = [[] for _ in schedule.orders]
        self.waiting: dict[int, int] = {}

    def run(self) -> None:
        ready = list(range(self.schedule.num_ranks))
        free = [0.0] * len(ready)
        while ready:
            rank = ready.pop()
            order, start, end = self.schedule.orders[rank], self.start[rank], self.end[rank]
            while len(end) < len(order) * self.steps:
                step, place = divmod(len(end), len(order))
                op = order[place]
                begin = self._arrival(op, rank, 3 * self.num * step, free[rank])
                if begin is None:
                    break
                finish = begin + self.costs.of(op)
                start.append(begin)
                end.append(finish)
                free[rank] = finish
                for number in self._results(op, 3 * self.num * step):
                    self.done[number] = finish
                    if number in self.waiting:
                        ready.append(self.waiting.pop(number))
        stuck = [
            order[len(end) % len(order)]
            for order, end in zip(self.schedule.orders, self.end, strict=True)
            if len(end) < len(order) * self.steps
        ]
        if stuck:
            names = ", ".join(f"{op} (rank {self.schedule.placement[op.stage]})" for op in stuck)
            raise ValueError(
                f"schedule {self.schedule.name}: the orders wait for each other in a circle; "
                f"these operations never run: {names}"
            )

    def _number(self, kind: Kind, stage: int, microbatch: int) -> int:
        offset = 0 if kind is Kind.F else self.num if kind is Kind.B else 2 * self.num
        return offset + stage * self.schedule.num_microbatches + microbatch

    def _results(self, op: Op, base: int) -> tuple[int, ...]:
        if op.kind is Kind.BW:
            return (
                base + self._number(Kind.B, op.stage, op.microbatch),
                base + self._number(Kind.W, op.stage, op.microbatch),
            )
        return (base + self._number(op.kind, op.stage, op.microbatch),)

    def _arrival(self, op: Op, rank: int, base: int, free: float) -> float | None:
        """When an operation can begin; None, and noted as waiting, while that is not known."""
        stage, kind, microbatch = op
        placement = self.schedule.placement
        begin = free
        if kind is Kind.F:
            needs = [(Kind.F, stage - 1)] if stage > 0 else []
        elif kind is Kind.W:
            needs = [(Kind.B, stage)]
        else:
            needs = [(Kind.F, stage)]
            if stage < self.schedule.num_stages - 1:
                needs.append((Kind.B, stage + 1))
        for needed, owner in needs:
            number = base + self._number(needed, owner, microbatch)
            done = self.done[number]
            if done is None:
                self.waiting[number] = rank
                return None
            begin = max(begin, done + (self.costs.hop if placement[owner] != rank else 0.0))
        return begin
