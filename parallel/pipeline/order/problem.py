"""A scheduling problem in small integers, and the replay that a search runs thousands of times.

A *letter* is an operation without its microbatch: kind x num_stages + stage. As every stage takes
its microbatches in order, a rank's order is a word of letters: the n-th time that a letter comes it
means microbatch n. Operation `letter * num_microbatches + n` is a place in a list of times.
"""

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.simulate import Costs, Memory

Word = list[int]
"""A rank's order, in letters."""

KINDS = (Kind.F, Kind.B, Kind.W)

_SLACK = 5e-10
"""Relative; two sums of equal parts differ by rounding. Below the validator's."""


class Problem:
    """Stages on ranks, what their operations cost, and the memory that a rank may hold."""

    # A rank's first operation must start at the same time whatever the order is: then the longest
    # stage is a makespan with a deadline a rank.
    def __init__(
        self,
        placement: tuple[int, ...],
        num_microbatches: int,
        costs: Costs,
        memory: Memory,
        limit: float | None = None,
    ) -> None:
        if len(set(placement[: max(placement) + 1])) != max(placement) + 1:
            raise ValueError(
                f"placement {placement}: the first stages do not lie on different ranks; the "
                "search knows loops and the V, (0, 1, 0, 1) or (0, 1, 1, 0)"
            )
        self._given = placement, costs, memory, limit
        self.placement = placement
        self.num_microbatches = num_microbatches
        self.num_stages = S = len(placement)
        self.num_ranks = max(placement) + 1
        self.stages = [
            [s for s in range(S) if placement[s] == rank] for rank in range(self.num_ranks)
        ]
        self.chunks = max(map(len, self.stages))
        self.hop = costs.hop
        self.limit = float("inf") if limit is None else limit * (1 + _SLACK)
        times = [*costs.f, *costs.b, *costs.w]
        # Operations that take no time at all would leave the order of events open.
        shortest = _SLACK * max(times) or 1.0
        self.time = [max(time, shortest) for time in times]
        """By letter."""
        self.delta = [*memory.f, *memory.b, *memory.w]
        """What an operation adds to its rank's memory, by letter."""
        self.next = [-1] * (2 * S)
        """The letter that waits for a letter's result, on its own rank or another; or -1."""
        self.lag = [0.0] * (2 * S)
        """How long that result travels."""
        self.needs = [-1] * (3 * S)
        """The letter on another rank that a letter waits for, or -1."""
        for s in range(S):
            self.next[s] = s + 1 if s + 1 < S else S + s
            self.next[S + s] = S + s - 1 if s > 0 else -1
        for s in range(S - 1):
            if placement[s] != placement[s + 1]:
                self.lag[s] = self.lag[S + s + 1] = costs.hop
                self.needs[s + 1], self.needs[S + s] = s, S + s + 1
        self.begin = [self._first_start(rank) for rank in range(self.num_ranks)]
        """When a rank's first operation starts, whatever the order: its first stage's first F."""
        self.work = [
            num_microbatches * sum(self.time[x] for s in stages for x in (s, S + s, 2 * S + s))
            for stages in self.stages
        ]
        """Computing time by rank."""

    def _first_start(self, rank: int) -> float:
        start = 0.0
        for s in range(self.stages[rank][0]):
            start += self.time[s]
            if self.placement[s] != self.placement[s + 1]:
                start += self.hop
        return start

    def shortened(self, num_microbatches: int) -> "Problem":
        """The same with so many microbatches."""
        placement, costs, memory, limit = self._given
        return Problem(placement, num_microbatches, costs, memory, limit)

    def schedule(self, name: str, words: list[Word]) -> Schedule:
        """Words as a schedule."""
        orders = []
        for word in words:
            seen = [0] * len(self.time)
            order = []
            for letter in word:
                kind, stage = divmod(letter, self.num_stages)
                order.append(Op(stage, KINDS[kind], seen[letter]))
                seen[letter] += 1
            orders.append(order)
        return Schedule.of(name, self.placement, self.num_microbatches, orders)
