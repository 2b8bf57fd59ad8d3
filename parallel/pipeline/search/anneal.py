"""Local search: small changes on the critical path, kept when they help or hurt little.

The longest stage ends a chain of operations each of which starts the moment that the one before it
allows: the critical path. It runs in blocks along ranks, with hops between them. A shorter schedule
must take an operation out of some block: move it before the block's first or behind its last (as in
the job shop: Dell'Amico and Trubian, 1993). Changes that hurt are kept with a probability that
sinks (simulated annealing), by a seeded generator: the same input gives the same schedule anywhere.
"""

import math
import random

from phalanx.parallel.pipeline.order.problem import Problem, Word
from phalanx.parallel.pipeline.order.replay import Replay
from phalanx.parallel.pipeline.search.mend import mend

_MEAN_WEIGHT = 0.05
"""How much the mean of the stages' spans counts beside the longest: shows the way on a plateau."""


class Anneal:
    """A search from one start; `words` and `span` are the best so far."""

    def __init__(self, replay: Replay, words: list[Word], seed: int) -> None:
        self.problem: Problem = replay.problem
        self.replay = replay
        self.random = random.Random(seed)
        self.unit = sum(self.problem.work) / sum(map(len, words)) or 1.0
        self.current = words
        self.orders = [replay.operations(word) for word in words]
        ends = replay.run(self.orders)
        assert ends is not None
        self._accept(ends, *self._score(ends, self.orders))
        self.words, self.span, self.score = words, self.current_span, self.current_score

    def run(self, changes: int, hot: float, cold: float, target: float) -> None:
        """Try so many changes, while the temperature sinks from `hot` to `cold` operation times.

        Ends early at a longest stage of `target`.
        """
        for step in range(changes):
            if self.span <= target * (1 + 1e-12):
                return
            change = self._change()
            if change is None:
                continue
            rank, word = change
            orders = self.orders.copy()
            orders[rank] = self.replay.operations(word)
            ends = self.replay.run(orders)
            if ends is None:
                continue
            score, span = self._score(ends, orders)
            temperature = self.unit * hot * (cold / hot) ** (step / changes)
            worse = score - self.current_score
            if worse <= 0 or self.random.random() < math.exp(-worse / temperature):
                self.current = self.current.copy()
                self.current[rank] = word
                self.orders = orders
                self._accept(ends, score, span)
                if score < self.score * (1 - 1e-12):
                    self.words, self.span, self.score = self.current, span, score

    def _score(self, ends: list[float], orders: list[list[int]]) -> tuple[float, float]:
        spans = self.replay.spans(orders, ends)
        longest = max(spans)
        return longest + _MEAN_WEIGHT * sum(spans) / len(spans), longest

    def _accept(self, ends: list[float], score: float, span: float) -> None:
        self.ends, self.current_score, self.current_span = ends, score, span
        self.blocks = self._critical()

    def _critical(self) -> list[tuple[int, int, int]]:
        """Blocks of the critical path: rank, first and last place."""
        ends, orders, time, needs = self.ends, self.orders, self.replay.time, self.replay.needs
        S, m = self.problem.num_stages, self.problem.num_microbatches
        spans = self.replay.spans(orders, ends)
        rank = spans.index(max(spans))
        place = last = len(orders[rank]) - 1
        blocks = []
        while True:
            order = orders[rank]
            while place > 0:
                operation = order[place]
                start = ends[operation] - time[operation]
                if ends[order[place - 1]] < start * (1 - 1e-9):
                    break
                place -= 1
            blocks.append((rank, place, last))
            needed = needs[order[place]]
            if needed < 0:
                return blocks
            rank = self.problem.placement[needed // m % S]
            place = last = orders[rank].index(needed)

    def _change(self) -> tuple[int, Word] | None:
        """A rank's new word; None if the change tried is impossible."""
        draw = self.random.random
        rank, first, last = self.blocks[int(draw() * len(self.blocks))]
        if draw() < 0.1:
            rank = int(draw() * len(self.current))
            first = int(draw() * (len(self.current[rank]) - 1))
            last = min(first + 1 + int(draw() * 6), len(self.current[rank]) - 1)
        if first == last:
            if first == 0:
                return None
            first -= 1
        word = self.current[rank]
        # In a long block operations rarely come all the way.
        if last - first > 12 and draw() < 0.5:
            first = first + int(draw() * (last - first))
        to_front = draw() < 0.5
        edge = word[first] if to_front else word[last]
        others = sorted({x for x in word[first : last + 1] if x != edge})
        if not others:
            return None
        x = others[int(draw() * len(others))]
        if to_front:
            place = word.index(x, first)
            new = [*word[:first], x, *word[first:place], *word[place + 1 :]]
        else:
            place = last
            while word[place] != x:
                place -= 1
            new = [*word[:place], *word[place + 1 : last + 1], x, *word[last + 1 :]]
        return (rank, new) if mend(self.problem, new) else None
