"""Moving a plan's operations earlier, into the gaps that real costs leave, within a peak memory.

A plan is a valid order of operations on each rank. `reorder` runs it eagerly, rank by rank in
time; where a rank would wait for its next operation, a later one that has arrived goes first, if
the rest of the plan still keeps the peak. So what is left of a plan is always valid, and no rank
ever gets stuck, however little memory there is.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.parallel.pipeline.graph import Kind, Op
from phalanx.parallel.pipeline.simulate import Costs

Plan = Sequence[Sequence[Op]]
"""Orders of F, B and W, one a rank; or of F and B only, W then go into gaps and make room."""


@dataclass(frozen=True)
class Rule:
    """When a rank that waits for its next operation takes another, though it ends too late."""

    patience: float = 0.0
    """For an F or B: by what share of its own time it may delay the next operation."""
    weight_patience: float = 0.0
    """For a W."""
    target: float | None = None
    """Longest time from a rank's first operation to its last that is aimed at: a rank whose idle
    time leaves no hope of it does not wait. (Zero Bubble, section 3.1, fills a small gap only on
    the rank with the largest bubble.)"""


def reorder(
    plan: Plan, placement: Sequence[int], costs: Costs, most: int, rule: Rule
) -> tuple[list[list[Op]], float]:
    """Orders of F, B and W, and the longest time from a rank's first operation to its last.

    `placement` gives each stage's rank. `most` is how many stages' activations a rank may hold,
    each from F to W; a plan must keep to it, one without W if each W came right after its B.
    """
    run = _Run(plan, placement, costs, most, rule)
    run.run()
    return run.orders, max(
        end - begin for end, begin in zip(run.free, run.begin, strict=True) if begin is not None
    )


class _Run:
    """Ranks in the order of the times at which they can do something next."""

    def __init__(
        self, plan: Plan, placement: Sequence[int], costs: Costs, most: int, rule: Rule
    ) -> None:
        self.plan = plan
        self.placement = placement
        self.costs = costs
        self.most = most
        self.rule = rule
        self.plans_weights = any(op.kind is Kind.W for op in plan[0])
        self.events: list[tuple[float, int]] = []
        self.wakes = [float("inf") for _ in plan]
        self.orders: list[list[Op]] = [[] for _ in plan]
        self.end: dict[Op, float] = {}
        self.free = [0.0 for _ in plan]
        self.begin: list[float | None] = [None for _ in plan]
        self.held = [0 for _ in plan]
        self.head = [0 for _ in plan]
        # W that are not in the plan and whose B is done.
        self.weights: list[list[Op]] = [[] for _ in plan]
        # What each stage and kind still has to do, the next one last, with its place in the plan.
        self.queues: list[dict[tuple[int, Kind], list[tuple[int, Op]]]] = []
        self.idle_allowed = []
        for order in plan:
            queues: dict[tuple[int, Kind], list[tuple[int, Op]]] = {}
            for place in reversed(range(len(order))):
                queues.setdefault(order[place][:2], []).append((place, order[place]))
            self.queues.append(queues)
            work = sum(costs.of(op) for op in order)
            if not self.plans_weights:
                work += sum(costs.w[op.stage] for op in order if op.kind is Kind.B)
            self.idle_allowed.append((rule.target or float("inf")) - work)
        self.worked = [0.0 for _ in plan]

    def run(self) -> None:
        for rank in range(len(self.plan)):
            self._wake(rank, 0.0)
        while self.events:
            time, rank = heapq.heappop(self.events)
            if time != self.wakes[rank]:
                continue
            self.wakes[rank] = float("inf")
            op, later = self._choose(rank, time)
            if op is not None:
                self._do(op, rank, time)
                self._wake(rank, self.free[rank])
                other = self._receiver(op)
                if other is not None and other != rank:
                    self._wake(other, max(self.free[rank] + self.costs.hop, self.free[other]))
            elif later is not None:
                self._wake(rank, later)
        assert all(
            head == len(order) and not weights
            for head, order, weights in zip(self.head, self.plan, self.weights, strict=True)
        ), "a plan that is no valid order"

    def _wake(self, rank: int, time: float) -> None:
        """Let a rank choose at `time`, unless it does so earlier and will find out by itself."""
        if time < self.wakes[rank]:
            self.wakes[rank] = time
            heapq.heappush(self.events, (time, rank))

    def _do(self, op: Op, rank: int, time: float) -> None:
        if self.begin[rank] is None:
            self.begin[rank] = time
        cost = self.costs.of(op)
        self.free[rank] = self.end[op] = time + cost
        self.worked[rank] += cost
        self.held[rank] += (op.kind is Kind.F) - (op.kind is Kind.W)
        assert self.held[rank] <= self.most
        self.orders[rank].append(op)
        if not self.plans_weights:
            if op.kind is Kind.W:
                self.weights[rank].remove(op)
                return
            if op.kind is Kind.B:
                self.weights[rank].append(Op(op.stage, Kind.W, op.microbatch))
        self.queues[rank][op.stage, op.kind].pop()
        plan, head = self.plan[rank], self.head[rank]
        while head < len(plan) and plan[head] in self.end:
            head += 1
        self.head[rank] = head

    def _choose(self, rank: int, time: float) -> tuple[Op | None, float | None]:
        """What to do now, else when something can next be done, as far as that is known."""
        weights = self.weights[rank]
        if self.head[rank] == len(self.plan[rank]):
            return (weights[0] if weights else None), None
        planned = self.plan[rank][self.head[rank]]
        due = self._arrival(planned, rank)
        if due is None or due > time:
            return self._fill(rank, time, planned, due)
        if planned.kind is Kind.F and self.held[rank] == self.most:
            return weights[0], None
        return planned, None

    def _fill(
        self, rank: int, time: float, planned: Op, due: float | None
    ) -> tuple[Op | None, float | None]:
        """As `_choose`, while the planned operation is due later, or nobody knows when."""
        begin = self.begin[rank]
        patient = (
            due is not None
            and begin is not None
            and due - begin - self.worked[rank] <= self.idle_allowed[rank]
        )
        latest = due if due is not None and patient else float("inf")
        later = due
        found = [(True, 0, op) for op in self.weights[rank][:1]]
        for queue in self.queues[rank].values():
            if not queue or queue[-1][1] is planned:
                continue
            place, op = queue[-1]
            arrival = self._arrival(op, rank)
            if arrival is None:
                continue
            if arrival > time:
                later = arrival if later is None else min(later, arrival)
            else:
                found.append((op.kind is Kind.W, place, op))
        for is_weight, place, op in sorted(found):
            patience = self.rule.weight_patience if is_weight else self.rule.patience
            if time + (1 - patience) * self.costs.of(op) > latest:
                continue
            if op.kind is not Kind.F or self._fits(rank, place):
                return op, None
        return None, later

    def _fits(self, rank: int, place: int) -> bool:
        """Whether the peak holds when the F at `place` of the plan is done now."""
        held = self.held[rank] + 1
        if held > self.most:
            return False
        frees = Kind.W
        if not self.plans_weights:
            held -= len(self.weights[rank])
            frees = Kind.B
        for op in self.plan[rank][self.head[rank] : place]:
            if op not in self.end:
                held += (op.kind is Kind.F) - (op.kind is frees)
                if held > self.most:
                    return False
        return True

    def _arrival(self, op: Op, rank: int) -> float | None:
        """When what an operation needs is there; None while that is not known."""
        stage, kind, microbatch = op
        if kind is Kind.W:
            return self.end.get(Op(stage, Kind.B, microbatch))
        if kind is Kind.B:
            forward = self.end.get(Op(stage, Kind.F, microbatch))
            if forward is None or stage == len(self.placement) - 1:
                return forward
        elif stage == 0:
            return 0.0
        sender = stage - 1 if kind is Kind.F else stage + 1
        end = self.end.get(Op(sender, kind, microbatch))
        if end is None or self.placement[sender] == rank:
            return end
        return end + self.costs.hop

    def _receiver(self, op: Op) -> int | None:
        """Rank of the operation that waits for one."""
        if op.kind is Kind.F and op.stage < len(self.placement) - 1:
            return self.placement[op.stage + 1]
        if op.kind is Kind.B and op.stage > 0:
            return self.placement[op.stage - 1]
        return None
