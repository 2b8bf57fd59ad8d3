"""Proof: the shortest longest stage of all orders, by constraint programming, for small cases.

The program of Zero Bubble Pipeline Parallelism, section 3.2 and appendix, with intervals in the
place of order bits: ranks run one operation at a time, the chains of F and of B cross ranks, memory
is a reservoir that each operation's start fills or drains. As everywhere in this package a stage
takes its microbatches in order, and a rank starts when its first input has arrived.

Needs OR-tools.
"""

from fractions import Fraction
from math import floor, lcm
from typing import Any

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.order.problem import KINDS, Problem
from phalanx.parallel.pipeline.simulate import Costs, Memory
from phalanx.parallel.pipeline.validate import validate

_FINEST = 1000
"""Largest common denominator of costs, and of memory, that is scaled to integers."""


def proven_best(
    placement: tuple[int, ...],
    *,
    num_microbatches: int,
    costs: Costs,
    memory: Memory,
    limit: float | None = None,
    time_limit_s: float = 60.0,
) -> Schedule:
    """A schedule with the shortest longest stage that any order on this placement has.

    Seconds for two dozen microbatch-stages, hours for a hundred. Which of equally short ones it is
    may differ from run to run.

    Raises:
        ModuleNotFoundError: OR-tools is missing.
        TimeoutError: no proof within the time limit.
        ValueError: costs or memory are no multiples of a common unit, or no order fits the limit.
    """
    solver, starts = _solve(
        Problem(placement, num_microbatches, costs, memory, limit), limit, time_limit_s
    )
    orders = []
    for rank in range(max(placement) + 1):
        ops = [op for op in starts if placement[op.stage] == rank]
        orders.append(sorted(ops, key=lambda op: solver.value(starts[op])))
    schedule = Schedule.of("exact", placement, num_microbatches, orders)
    validate(schedule, memory=memory, limit=limit)
    return schedule


def _solve(problem: Problem, limit: float | None, time_limit_s: float) -> tuple[Any, dict[Op, Any]]:
    try:
        from ortools.sat.python import cp_model
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the exact search needs OR-tools; pip install ortools") from None

    model = cp_model.CpModel()
    starts = _intervals(model, problem)
    if limit is not None:
        _hold_limit(model, problem, starts, limit)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        raise ValueError(f"memory limit {limit:g}: no order fits it")
    if status != cp_model.OPTIMAL:
        raise TimeoutError(
            f"no proof within {time_limit_s:g} s; the exact search is for small cases, "
            "a few ranks and microbatches"
        )
    return solver, starts


def _intervals(model: Any, problem: Problem) -> dict[Op, Any]:
    """Operations in time, what waits for what, and the longest stage to be made short."""
    scale, (*time, hop) = _integers("costs", [*problem.time, problem.hop])
    S, m = problem.num_stages, problem.num_microbatches
    horizon = m * (sum(time) + 2 * S * hop)
    starts = {
        Op(s, kind, n): model.new_int_var(0, horizon, f"{s}{kind.value}{n}")
        for kind in KINDS
        for s in range(S)
        for n in range(m)
    }

    def length(op: Op) -> int:
        return time[KINDS.index(op.kind) * S + op.stage]

    for op, start in starts.items():
        s, kind, n = op
        if n > 0:
            before = Op(s, kind, n - 1)
            model.add(start >= starts[before] + length(before))
        needs = []
        if kind is Kind.F and s > 0:
            needs.append(Op(s - 1, Kind.F, n))
        if kind is Kind.B:
            needs.append(Op(s, Kind.F, n))
            if s < S - 1:
                needs.append(Op(s + 1, Kind.B, n))
        if kind is Kind.W:
            needs.append(Op(s, Kind.B, n))
        for needed in needs:
            lag = hop if problem.placement[needed.stage] != problem.placement[s] else 0
            model.add(start >= starts[needed] + length(needed) + lag)

    longest = model.new_int_var(0, horizon, "longest stage")
    for rank, stages in enumerate(problem.stages):
        own = [op for op in starts if op.stage in stages]
        model.add_no_overlap(
            [model.new_fixed_size_interval_var(starts[op], length(op), str(op)) for op in own]
        )
        begin = round(problem.begin[rank] * scale)
        model.add(starts[Op(stages[0], Kind.F, 0)] == begin)
        for s in stages:
            last = Op(s, Kind.W, m - 1)
            model.add(longest >= starts[last] + length(last) - begin)
    model.minimize(longest)
    return starts


def _hold_limit(model: Any, problem: Problem, starts: dict[Op, Any], limit: float) -> None:
    scale, delta = _integers("memory", problem.delta)
    S = problem.num_stages
    for stages in problem.stages:
        own = [op for op in starts if op.stage in stages]
        changes = [delta[KINDS.index(op.kind) * S + op.stage] for op in own]
        model.add_reservoir_constraint(
            [starts[op] for op in own],
            changes,
            sum(min(x, 0) for x in changes),
            floor(limit * scale * (1 + 1e-9)),
        )


def _integers(what: str, values: list[float]) -> tuple[int, list[int]]:
    """Values in their largest common unit, and how many units are one.

    Raises:
        ValueError: they have none.
    """
    exact = [Fraction(x).limit_denominator(_FINEST) for x in values]
    scale = lcm(*(x.denominator for x in exact))
    close = all(abs(x - y) <= 1e-9 * abs(y) for x, y in zip(exact, values, strict=True))
    if scale > _FINEST or not close:
        raise ValueError(
            f"{what} {values}: no multiples of a common unit, which the exact search needs; "
            "round them"
        )
    return scale, [int(x * scale) for x in exact]
