"""Plans: orders of F and B that repeat one microbatch's way through the stages.

The building block of Pipeline Parallelism with Controllable Memory (2405.15362, section 3), with
real numbers in the place of slots: what matters is how much slower than it could a microbatch moves
along each leg of its way (down and up the chunks, and back), for slow microbatches fill memory and
absorb hops and uneven times, quick ones spare it.
"""

from dataclasses import dataclass

from phalanx.parallel.pipeline.order.problem import Problem

Plan = list[list[int]]
"""Order of F and B on each rank, in letters, as if every W came right after its B; or of all."""


@dataclass(frozen=True)
class Block:
    """One microbatch's way; times in mean operation times."""

    slack: tuple[float, ...]
    """What a hop takes longer than it must, by leg: forward by chunk, then backward."""
    turn: float = 0.0
    """What the turn from F to B takes longer than it must."""
    pace: float = 1.0
    """Time between microbatches, in the time that a rank needs for one."""
    even: bool = True
    """Whether all operations count as equally long."""


def repeat(problem: Problem, block: Block) -> Plan | None:
    """The block for every microbatch; None if some rank would hold too much."""
    S, m = problem.num_stages, problem.num_microbatches
    starts = _starts(problem, block)
    period = block.pace * max(problem.work) / m
    plan = []
    for rank, stages in enumerate(problem.stages):
        ops = [(starts[x] + n * period, x) for s in stages for x in (s, S + s) for n in range(m)]
        ops.sort()
        plan.append([x for _, x in ops])
        if not _fits(problem, plan[rank]):
            return None
    return plan


def one_by_one(problem: Problem) -> Plan:
    """Each microbatch after the one before: the plan that holds least."""
    plan = repeat(problem, Block((0.0,) * (2 * problem.chunks), pace=2.0 * problem.num_ranks + 2))
    assert plan is not None
    return plan


def without_weights(problem: Problem, words: list[list[int]]) -> Plan | None:
    """A schedule's F and B as a plan; None if it would hold too much."""
    plan = [[x for x in word if x < 2 * problem.num_stages] for word in words]
    return plan if all(_fits(problem, order) for order in plan) else None


def with_late_weights(problem: Problem, plan: Plan) -> Plan:
    """A plan of F and B with each W where memory asks for it, what is left at the end."""
    late = []
    for order in plan:
        word: list[int] = []
        waiting: list[int] = []
        held = 0.0
        for x in order:
            while waiting and held + problem.delta[x] > problem.limit:
                held += problem.delta[waiting[0]]
                word.append(waiting.pop(0))
            word.append(x)
            held += problem.delta[x]
            if x >= problem.num_stages:
                waiting.append(x + problem.num_stages)
        late.append(word + waiting)
    return late


def _starts(problem: Problem, block: Block) -> list[float]:
    """Start of the first microbatch's operations, by letter."""
    S, chunks = problem.num_stages, problem.chunks
    unit = sum(problem.work) / (3 * S * problem.num_microbatches)
    starts = [0.0] * (2 * S)
    now, x = 0.0, 0
    while x >= 0:
        starts[x] = now
        now += unit if block.even else problem.time[x]
        if x == S - 1:
            now += block.turn * unit
        elif problem.lag[x] > 0 or problem.needs[problem.next[x]] >= 0:
            leg = x * chunks // S if x < S else chunks + (2 * S - 1 - x) * chunks // S
            now += block.slack[leg] * unit
            if not block.even:
                now += problem.hop
        x = problem.next[x]
    return starts


def _fits(problem: Problem, order: list[int]) -> bool:
    held, S = 0.0, problem.num_stages
    for x in order:
        held += problem.delta[x]
        if held > problem.limit:
            return False
        if x >= S:
            held += problem.delta[x + S]
    return True
