"""One problem's search: blocks, squeezed under many rules, squeezed again, then local search."""

from dataclasses import replace
from itertools import product

from phalanx.parallel.pipeline.order.plan import (
    Block,
    Plan,
    one_by_one,
    with_late_weights,
    without_weights,
)
from phalanx.parallel.pipeline.order.problem import Problem, Word
from phalanx.parallel.pipeline.order.replay import Replay
from phalanx.parallel.pipeline.order.squeeze import Rule, squeeze
from phalanx.parallel.pipeline.search.anneal import Anneal
from phalanx.parallel.pipeline.search.bound import lower_bound
from phalanx.parallel.pipeline.search.lengthen import lengthen
from phalanx.parallel.pipeline.search.scout import fitting, scout

_SQUEEZED_PER_S = 600_000
"""Operations that `squeeze` places in a second; effort is counted in them, not timed, so that every
rank finds the same schedule."""
_REPLAYED = 0.25
"""Effort of replaying an operation in the local search, in that of placing one."""

_RULES = (
    Rule(0.0, 0.0),
    Rule(0.5, 0.5),
    Rule(0.0, 0.75),
    Rule(0.25, 0.25),
    Rule(0.0, 0.5),
    Rule(1.0, 1.0),
    Rule(0.0, 0.0, strict=True),
    Rule(0.0, 0.5, strict=True),
)
_SHARES = (None, 0.9, 0.5, 0.8, 0.25, 0.95, 0.65, 0.0)
"""Targets, as shares of the best bubble so far; the most useful ones first, as above."""
_TEMPERATURES = ((0.15, 0.005), (0.5, 0.01), (1.5, 0.05))
_TINY_TEMPERATURES = ((0.15, 0.005), (1.5, 0.05), (3.0, 0.1))
_SHORT = 1200
"""Most operations of a short schedule that is searched for to be lengthened."""
_TINY = 100
"""Operations."""
_KEPT = 8


class Search:
    """The search for one problem, of about so many seconds; twice that where it lengthens."""

    def __init__(self, problem: Problem, effort_s: float) -> None:
        self.problem = problem
        self.effort_s = effort_s
        self.replay = Replay(problem)
        self.size = 3 * problem.num_stages * problem.num_microbatches
        # The smaller a problem the less it takes, but for a V so small that local search can come
        # to the optimum, and does so late; very large problems are worth more.
        self.tiny = problem.chunks > 1 and problem.num_ranks > 2 and self.size <= _TINY
        share = 2.5 if self.tiny else min(1.0, max(0.15, self.size / 600)) + self.size / 20_000
        self.budget = effort_s * share * _SQUEEZED_PER_S
        self.spent = 0.0
        self.bound = lower_bound(problem) * (1 + 1e-12)
        self.found: list[tuple[float, float, list[Word]]] = []
        """Longest stage, makespan and words, best first."""
        self.blocks: list[Block] = []
        """Those that suited best."""
        self.seen: set[tuple[tuple[tuple[int, ...], ...], Rule]] = set()

    def run(self) -> list[Word]:
        """The best words found."""
        # Local search comes to nothing where a change takes milliseconds.
        large = self.size > 4000
        self._round(self._first_plans(), 0.8 if large else 0.4)
        before = None
        while not self._done(0.95 if large else 0.5) and before != self.found[0][:2]:
            before = self.found[0][:2]
            self._round(self._found_plans(), 0.95 if large else 0.5)
        self._anneal()
        return self.found[0][2]

    def _first_plans(self) -> list[Plan]:
        few = 2 * self.problem.num_ranks + 4
        if few < self.problem.num_microbatches and 3 * self.problem.num_stages * few <= _SHORT:
            blocks = self._shorter(few)
        else:
            blocks, self.spent = scout(self.problem, 0.25 * self.budget)
        self.blocks = blocks
        fitted = [fitting(self.problem, block) for block in blocks]
        plans = [x[1] for x in fitted if x is not None] or [one_by_one(self.problem)]
        return [y for x in plans for y in (x, with_late_weights(self.problem, x))]

    def _shorter(self, few: int) -> list[Block]:
        """Find the best schedule of few microbatches and lengthen it; the blocks found for it."""
        short = Search(self.problem.shortened(few), self.effort_s)
        short.run()
        for _, _, words in short.found[:3]:
            for longer in lengthen(short.replay, words, self.problem):
                self.spent += _REPLAYED * self.size
                self._keep(longer)
        return short.blocks

    def _found_plans(self) -> list[Plan]:
        plans: list[Plan] = []
        for _, _, words in self.found:
            plan = without_weights(self.problem, words)
            if plan is not None and plan not in plans and len(plans) < 9:
                plans += [plan, words, with_late_weights(self.problem, plan)]
        return plans

    def _round(self, plans: list[Plan], share: float) -> None:
        """Squeeze plans under all rules, the most useful of all three first."""
        least = max(self.problem.work)
        combinations = product(enumerate(plans), enumerate(_RULES), enumerate(_SHARES))
        for (_, plan), (_, rule), (_, aim) in sorted(combinations, key=_rank):
            if self._done(share):
                return
            if aim is not None and self.found:
                rule = replace(rule, target=least + aim * (self.found[0][0] - least))
            key = (tuple(map(tuple, plan)), rule)
            if key not in self.seen:
                self.seen.add(key)
                self.spent += self.size
                self._keep(squeeze(self.problem, plan, rule))

    def _anneal(self) -> None:
        changes = int(max(0.0, self.budget - self.spent) / (_REPLAYED * self.size))
        restarts = max(1, min(8, changes // 1500))
        temperatures = _TINY_TEMPERATURES if self.tiny else _TEMPERATURES
        for restart in range(restarts):
            if self.found[0][0] <= self.bound:
                return
            start = self.found[restart // 2 % len(self.found)][2]
            search = Anneal(self.replay, start, restart)
            search.run(changes // restarts, *temperatures[restart % 3], self.bound)
            self._keep(search.words)

    def _done(self, share: float) -> bool:
        """Whether nothing can be better, or this share of the effort is spent."""
        if self.found and self.found[0][0] <= self.bound:
            return True
        return bool(self.found) and self.spent >= share * self.budget

    def _keep(self, words: list[Word]) -> None:
        orders = [self.replay.operations(word) for word in words]
        ends = self.replay.run(orders)
        if ends is None:
            # Pulling W forward can make lengthened orders wait in a circle.
            return
        span = max(self.replay.spans(orders, ends))
        makespan = max(ends[order[-1]] for order in orders)
        # Rounding must not decide between equal ones.
        self.found.append((float(f"{span:.12g}"), float(f"{makespan:.12g}"), words))
        self.found.sort(key=lambda x: x[:2])
        del self.found[_KEPT:]


def _rank(combination: tuple[tuple[int, object], ...]) -> tuple[int, ...]:
    """Sorts by the sum of places."""
    places = tuple(place for place, _ in combination)
    return (sum(places), *places)
