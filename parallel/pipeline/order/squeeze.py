"""Running a plan in time: gaps are filled by what comes later in the plan.

The plan is run eagerly: where a rank would wait for its planned operation, a later one that has
arrived goes first if the rest of the plan still keeps within the limit. A plan without W has them
fill gaps and make room.
So what is left of a plan is always a plan, and no rank gets stuck, however little memory there is.
This is squeezing and reordering (Pipeline Parallelism with Controllable Memory, 2405.15362, section
3) in one pass, with the rules on gaps of Zero Bubble Pipeline Parallelism, section 3.1.
"""

from dataclasses import dataclass
from heapq import heappop, heappush

from phalanx.parallel.pipeline.order.plan import Plan
from phalanx.parallel.pipeline.order.problem import Problem, Word

_NEVER = float("inf")


@dataclass(frozen=True)
class Rule:
    """When a rank that waits for its planned operation takes another, though it ends too late."""

    patience: float = 0.0
    """For F and B: by what share of its own time it may delay the planned one."""
    weight_patience: float = 0.0
    """For W."""
    strict: bool = False
    """Only W fill gaps, F and B keep the plan's order."""
    target: float = _NEVER
    """Longest stage aimed at: a rank whose idle time leaves no hope of it waits no more."""


def squeeze(problem: Problem, plan: Plan, rule: Rule) -> list[Word]:
    """Words of F, B and W, within the limit."""
    return _Run(problem, plan, rule).run()


def squeeze_timed(problem: Problem, plan: Plan, rule: Rule) -> tuple[list[Word], float]:
    """As `squeeze`, and the longest stage as it was run; replayed, the words may take less.

    A run holds a W back that would delay a planned F, though memory asks for it when that F is due.
    """
    run = _Run(problem, plan, rule)
    words = run.run()
    return words, max(end - begin for end, begin in zip(run.free, problem.begin, strict=True))


class _Run:
    def __init__(self, problem: Problem, plan: Plan, rule: Rule) -> None:
        self.problem, self.plan, self.rule = problem, plan, rule
        S, m, p = problem.num_stages, problem.num_microbatches, problem.num_ranks
        self.planned = any(x >= 2 * S for x in plan[0])
        """Whether the plan has W."""
        self.count = [0] * (3 * S)
        """Operations started, by letter."""
        # One place more than microbatches: what comes after the last never arrives.
        self.arrival = [[_NEVER] * (m + 1) for _ in range(3 * S)]
        self.arrival[0][:m] = [0.0] * m
        self.places: list[list[int]] = [[] for _ in range(3 * S)]
        """Where a letter's operations stand in the plan of its rank, by letter."""
        for order in plan:
            for place, x in enumerate(order):
                self.places[x].append(place)
        kinds = (0, S, 2 * S) if self.planned else (0, S)
        self.letters = [[x + s for s in stages for x in kinds] for stages in problem.stages]
        self.past = [[False] * len(order) for order in plan]
        self.head = [0] * p
        """First place of the plan that has not started, by rank."""
        self.held, self.loose = [0.0] * p, [0.0] * p
        """Memory held, and what unplanned W that could run now would add to it (less than 0)."""
        self.weights: list[list[int]] = [[] for _ in range(p)]
        """Unplanned W that could run now."""
        self.words: list[Word] = [[] for _ in range(p)]
        self.free = [0.0] * p
        """When the rank's last operation ends."""
        self.worked = [0.0] * p
        delta = problem.delta
        self.net = list(delta)
        if not self.planned:
            for x in range(S, 2 * S):
                self.net[x] += delta[x + S]
        self.idle = [rule.target - work for work in problem.work]

    def run(self) -> list[Word]:
        problem, words = self.problem, self.words
        time, place, lag, following = problem.time, problem.placement, problem.lag, problem.next
        S, arrival, free = problem.num_stages, self.arrival, self.free
        events = [(0.0, r) for r in range(problem.num_ranks)]
        while events:
            now, r = heappop(events)
            if now < free[r]:
                continue
            x, later = self._choose(r, now)
            if x < 0:
                if later < _NEVER:
                    heappush(events, (later, r))
                continue
            end = now + time[x]
            free[r] = end
            heappush(events, (end, r))
            n = self._start(r, x)
            if S <= x < 2 * S and self.planned:
                arrival[x + S][n] = end
            if x < 2 * S and following[x] >= 0:
                y = following[x]
                arrives = end + lag[x]
                arrival[y][n] = arrives
                other = place[y % S]
                if other != r and free[other] <= arrives:
                    heappush(events, (arrives, other))
        assert sum(map(len, words)) == 3 * S * problem.num_microbatches
        return words

    def _start(self, r: int, x: int) -> int:
        """Note that x runs now; its microbatch, or -1 for a W that is not planned."""
        S, delta = self.problem.num_stages, self.problem.delta
        self.words[r].append(x)
        self.held[r] += delta[x]
        self.worked[r] += self.problem.time[x]
        if x >= 2 * S and not self.planned:
            self.weights[r].pop(0)
            self.loose[r] -= delta[x]
            return -1
        n = self.count[x]
        self.count[x] = n + 1
        if x >= S and not self.planned:
            self.weights[r].append(x + S)
            self.loose[r] += delta[x + S]
        past, head = self.past[r], self.head[r]
        past[self.places[x][n]] = True
        while head < len(past) and past[head]:
            head += 1
        self.head[r] = head
        return n

    def _choose(self, r: int, now: float) -> tuple[int, float]:
        """The letter to start now, or -1 and when to look again."""
        order, head, weights = self.plan[r], self.head[r], self.weights[r]
        if head == len(order):
            return (weights[0] if weights else -1), _NEVER
        planned = order[head]
        due = self.arrival[planned][self.count[planned]]
        if due > now:
            return self._fill(r, now, planned, due)
        delta = self.problem.delta[planned]
        if delta > 0 and weights and self.held[r] + delta > self.problem.limit:
            return weights[0], now
        return planned, now

    def _fill(self, r: int, now: float, planned: int, due: float) -> tuple[int, float]:
        """As `_choose`, while the planned operation is due later, or nobody knows when."""
        problem, rule, count, arrival = self.problem, self.rule, self.count, self.arrival
        latest = later = due
        weights = 2 * problem.num_stages
        if due - problem.begin[r] - self.worked[r] > self.idle[r]:
            latest = _NEVER
        found = []
        for x in self.letters[r]:
            if x == planned or (rule.strict and x < weights):
                continue
            arrives = arrival[x][count[x]]
            if arrives <= now:
                found.append((x >= weights, self.places[x][count[x]], x))
            elif arrives < later:
                later = arrives
        found.sort()
        for is_weight, _, x in found:
            patience = rule.weight_patience if is_weight else rule.patience
            if now + (1 - patience) * problem.time[x] <= latest and self._fits(r, x):
                return x, now
        if self.weights[r]:
            x = self.weights[r][0]
            if now + (1 - rule.weight_patience) * problem.time[x] <= latest:
                return x, now
        return -1, later

    def _fits(self, r: int, x: int) -> bool:
        """Whether the rest of the plan keeps within the limit if x comes first."""
        delta, limit = self.problem.delta, self.problem.limit
        if delta[x] <= 0:
            return True
        if self.held[r] + delta[x] > limit:
            return False
        held = self.held[r] + self.loose[r] + delta[x]
        order, past = self.plan[r], self.past[r]
        for place in range(self.head[r], self.places[x][self.count[x]]):
            if not past[place]:
                y = order[place]
                if held + delta[y] > limit:
                    return False
                held += self.net[y]
        return True
