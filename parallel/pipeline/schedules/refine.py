"""The best of many squeezings of a plan.

The weight gradients start from where the plan has them, from as late as they fit, and from nowhere
(into gaps); each start is squeezed under several rules, and the best words are plans for another
round. Rounds go by how long a squeezing took as it was run; what is returned is the shortest of all
when replayed, as ranks will follow it.
"""

from phalanx.parallel.pipeline.order.plan import Plan, with_late_weights
from phalanx.parallel.pipeline.order.problem import Problem, Word
from phalanx.parallel.pipeline.order.replay import Replay
from phalanx.parallel.pipeline.order.squeeze import Rule, squeeze_timed

_FIRST_RULES: tuple[tuple[float, float, float | None], ...] = (
    (0, 0, None),
    (0.15, 0.15, None),
    (0.25, 0.25, None),
    (0, 0, 0.999),
    (0.15, 0.15, 0.999),
    (0, 0, 0.75),
    (0.25, 0.25, 0.75),
    (0.5, 0.5, None),
)
_MORE_RULES: tuple[tuple[float, float, float | None], ...] = (
    (0, 0, 0.5),
    (0, 0, 0.25),
    (0, 0.75, None),
    (0.25, 0.25, 0.5),
    (0, 0, 0),
    (0.25, 0.25, 0.25),
    (0.5, 0.5, 0.25),
    (0.5, 0.5, 0.5),
    (0.5, 0.5, 0.75),
    (0, 0.5, None),
    (0, 0.75, 0.5),
    (1, 1, None),
    (0, 0.25, None),
    (0, 0.75, 0.75),
    (0.25, 0.75, None),
    (0, 1, None),
)
"""Patience, patience for W, and the share of the best bubble so far to aim at. Large
schedules get only the first ones, which were best on 16 to 32 ranks."""

_ROUNDS = 4
_SURVIVORS = 4
_OPERATIONS = 200_000
_FEWEST_RUNS = 12
"""How many operations all runs may place together, so that large schedules take about a second,
and how many runs there may be at least. (Counted, not timed: every rank must find the same.)"""


def refine(problem: Problem, plan: Plan) -> list[Word]:
    """Words of F, B and W whose longest stage is the shortest that was found.

    `plan` has F, B and W, and keeps to the problem's limit if each W comes right after its B.
    """
    replay = Replay(problem)
    left = max(_OPERATIONS // sum(map(len, plan)), _FEWEST_RUNS)
    least, aim, shortest = max(problem.work), float("inf"), float("inf")
    best: list[Word] = []
    plans = [plan]
    for _ in range(_ROUNDS):
        starts = [start for plan in plans for start in _starts(problem, plan)]
        runs = [
            (start, rule)
            for rules in (_FIRST_RULES, _MORE_RULES)
            for start in starts
            for rule in rules
        ]
        found, before = [], aim
        for start, (patience, weight_patience, share) in runs[: max(left, 0)]:
            target = float("inf") if share is None else least + share * (aim - least)
            rule = Rule(patience, weight_patience, target=target)
            words, span = squeeze_timed(problem, start, rule)
            found.append((span, words))
            aim = min(aim, span)
            replayed = _longest_stage(replay, words)
            if replayed < shortest:
                shortest, best = replayed, words
        left -= len(runs)
        if aim >= before * (1 - 1e-9) or shortest <= least * (1 + 1e-9):
            break
        found.sort(key=lambda pair: pair[0])
        plans = _distinct([words for _, words in found])
    assert best
    return best


def _longest_stage(replay: Replay, words: list[Word]) -> float:
    orders = [replay.operations(word) for word in words]
    ends = replay.run(orders)
    assert ends is not None, "squeezed words that wait for each other"
    return max(replay.spans(orders, ends))


def _starts(problem: Problem, plan: Plan) -> list[Plan]:
    without = [[x for x in word if x < 2 * problem.num_stages] for word in plan]
    kept = [plan] if all(_keeps_limit(problem, word) for word in plan) else []
    return [without, with_late_weights(problem, without), *kept]


def _keeps_limit(problem: Problem, word: Word) -> bool:
    held = 0.0
    for x in word:
        held += problem.delta[x]
        if held > problem.limit:
            return False
    return True


def _distinct(plans: list[list[Word]]) -> list[Plan]:
    kept: list[Plan] = []
    for plan in plans:
        if plan not in kept:
            kept.append(plan)
        if len(kept) == _SURVIVORS:
            break
    return kept
