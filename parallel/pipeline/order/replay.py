"""Replay of words, as `pipeline/simulate.py` does of schedules, thousands of times a second."""

from phalanx.parallel.pipeline.order.problem import Problem, Word

_NEVER = float("inf")


class Replay:
    """Times of all operations for given words, by operation: letter x microbatches + microbatch."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        m = problem.num_microbatches
        letters = range(3 * problem.num_stages)
        self.time = [problem.time[x] for x in letters for _ in range(m)]
        self.needs = [
            problem.needs[x] * m + n if problem.needs[x] >= 0 else -1
            for x in letters
            for n in range(m)
        ]
        """The operation on another rank that an operation waits for, or -1."""

    def operations(self, word: Word) -> list[int]:
        """A word's operations."""
        m = self.problem.num_microbatches
        following = [x * m for x in range(3 * self.problem.num_stages)]
        operations = []
        for x in word:
            operations.append(following[x])
            following[x] += 1
        return operations

    def run(self, orders: list[list[int]]) -> list[float] | None:
        """Ends by operation; None if the orders wait for each other in a circle.

        Within a rank the orders must be possible.
        """
        needs, time, hop = self.needs, self.time, self.problem.hop
        # The last place stands for no operation at all: it has always ended.
        ends = [_NEVER] * len(time)
        ends.append(-_NEVER)
        at, free = [0] * len(orders), [0.0] * len(orders)
        left = list(range(len(orders)))
        while left:
            waiting, moved = [], False
            for r in left:
                order, i, now = orders[r], at[r], free[r]
                first, size = i, len(order)
                while i < size:
                    o = order[i]
                    arrival = ends[needs[o]] + hop
                    if arrival > now:
                        if arrival == _NEVER:
                            break
                        now = arrival
                    now += time[o]
                    ends[o] = now
                    i += 1
                if i > first:
                    moved = True
                    at[r], free[r] = i, now
                if i < size:
                    waiting.append(r)
            if not moved:
                return None
            # Forwards come from one side, backwards from the other.
            waiting.reverse()
            left = waiting
        return ends

    def spans(self, orders: list[list[int]], ends: list[float]) -> list[float]:
        """Time from a rank's first operation to its last, by rank."""
        begin = self.problem.begin
        return [ends[order[-1]] - begin[r] for r, order in enumerate(orders)]
