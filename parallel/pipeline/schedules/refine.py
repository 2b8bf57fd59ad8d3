"""The best of many reorderings of a plan.

The weight gradients start from where the plan has them, from as late as they fit, and from nowhere
(into gaps); each start is run under several rules, and the best orders are plans for another round.
"""

from collections.abc import Sequence

from phalanx.parallel.pipeline.graph import Kind, Op
from phalanx.parallel.pipeline.schedules.reorder import Plan, Rule, reorder
from phalanx.parallel.pipeline.simulate import Costs

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


def refine(
    plan: Plan, placement: Sequence[int], costs: Costs, most: int
) -> tuple[list[list[Op]], float]:
    """Orders of F, B and W, and the longest time from a rank's first operation to its last.

    `plan` has F, B and W and keeps to `most` activations, as in `reorder`, if each W comes right
    after its B.
    """
    left = max(_OPERATIONS // sum(len(order) for order in plan), _FEWEST_RUNS)
    least = max(sum(costs.of(op) for op in order) for order in plan)
    best: tuple[float, list[list[Op]]] | None = None
    plans = [plan]
    for _ in range(_ROUNDS):
        if best is not None and best[0] <= least * (1 + 1e-9):
            break
        starts = [start for plan in plans for start in _starts(plan, most)]
        found = []
        aim = float("inf") if best is None else best[0]
        for start, rule in [
            (start, rule)
            for rules in (_FIRST_RULES, _MORE_RULES)
            for start in starts
            for rule in rules
        ][: max(left, 0)]:
            left -= 1
            patience, weight_patience, share = rule
            target = None if share is None else least + share * (aim - least)
            orders, span = reorder(
                start, placement, costs, most, Rule(patience, weight_patience, target)
            )
            found.append((span, orders))
            aim = min(aim, span)
        found.sort(key=lambda pair: pair[0])
        if best is not None and (not found or found[0][0] >= best[0] * (1 - 1e-9)):
            break
        best = found[0]
        plans = _distinct([orders for _, orders in found])
    assert best is not None
    return best[1], best[0]


def peak(order: Sequence[Op], frees: Kind = Kind.W) -> int:
    """Most stages' activations that a rank holds, each from F to B or to W."""
    held = most = 0
    for op in order:
        held += (op.kind is Kind.F) - (op.kind is frees)
        most = max(most, held)
    return most


def _starts(plan: Plan, most: int) -> list[Plan]:
    without = [[op for op in order if op.kind is not Kind.W] for order in plan]
    late = [_with_late_weights(order, most) for order in without]
    kept = [plan] if max(peak(order) for order in plan) <= most else []
    return [without, late, *kept]


def _with_late_weights(order: Sequence[Op], most: int) -> list[Op]:
    """Add the W to a rank's F and B, each when memory is full and what is left at the end."""
    result: list[Op] = []
    waiting: list[Op] = []
    held = 0
    for op in order:
        if op.kind is Kind.B:
            waiting.append(Op(op.stage, Kind.W, op.microbatch))
        elif held == most:
            result.append(waiting.pop(0))
        else:
            held += 1
        result.append(op)
    return result + waiting


def _distinct(plans: list[list[list[Op]]]) -> list[Plan]:
    kept: list[Plan] = []
    for plan in plans:
        if plan not in kept:
            kept.append(plan)
        if len(kept) == _SURVIVORS:
            break
    return kept
