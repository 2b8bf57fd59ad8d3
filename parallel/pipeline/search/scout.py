"""Which blocks suit a problem: drawn, tried with few microbatches, and changed a little.

How good a block is shows where a schedule begins and ends, so a shorter schedule tells too.
"""

import random
from dataclasses import replace

from phalanx.parallel.pipeline.order.plan import Block, Plan, repeat
from phalanx.parallel.pipeline.order.problem import Problem
from phalanx.parallel.pipeline.order.replay import Replay
from phalanx.parallel.pipeline.order.squeeze import Rule, squeeze

_KNOWN = {
    2: (Block((0, 1)), Block((1, 1)), Block((0, 2)), Block((1, 2)), Block((0, 0))),
    4: (
        Block((1, 3, 1, 3)),
        Block((0, 1, 3, 1)),
        Block((1, 0, 1, 0), turn=3),
        Block((1, 0, 1, 0)),
        Block((0, 0, 0, 0)),
        Block((0, 0, 0, 0), turn=2),
        Block((0, 0, 3, 1)),
        Block((0, 2, 2, 2)),
    ),
}
"""Those of ZB-H1 and its kin; those of ZB-V, V-Half and V-Min, and others that did well."""

_KEPT = 6


def scout(problem: Problem, budget: float) -> tuple[list[Block], float]:
    """The best blocks found by placing about so many operations, best first; how many were."""
    short = problem.shortened(min(problem.num_microbatches, 2 * problem.num_ranks + 4))
    replay = Replay(short)
    size = 3 * short.num_stages * short.num_microbatches
    rnd = random.Random(0)
    scored: list[tuple[float, Block]] = []
    spent = 0.0
    target = None
    ideas = list(_ideas(problem.chunks))
    seen: set[tuple[tuple[int, ...], ...]] = set()
    while spent < budget:
        block = ideas.pop(0) if ideas else _idea(problem.chunks, scored, rnd)
        fitted = fitting(short, block)
        spent += 0.15 * size
        if fitted is None:
            continue
        block, plan = fitted
        key = tuple(map(tuple, plan))
        if key in seen:
            continue
        seen.add(key)
        rules = [Rule(), Rule(strict=True)]
        if target is not None:
            rules.append(Rule(target=target))
        spans = []
        for rule in rules:
            orders = [replay.operations(word) for word in squeeze(short, plan, rule)]
            ends = replay.run(orders)
            assert ends is not None
            spans.append(max(replay.spans(orders, ends)))
            spent += size
        scored.append((min(spans), block))
        scored.sort(key=lambda x: x[0])
        del scored[_KEPT:]
        least = max(short.work)
        target = least + 0.8 * (scored[0][0] - least)
    return [block for _, block in scored], spent


def fitting(problem: Problem, block: Block) -> tuple[Block, Plan] | None:
    """The block and its plan; at a slower pace if memory asks for it, up to a point."""
    for _ in range(4):
        plan = repeat(problem, block)
        if plan is not None:
            return block, plan
        block = replace(block, pace=block.pace * 1.3, slack=tuple(x / 2 for x in block.slack))
    return None


def _ideas(chunks: int) -> list[Block]:
    even = [Block((float(x),) * (2 * chunks)) for x in (1, 0, 2)]
    known = [*_KNOWN.get(2 * chunks, ()), *even]
    return [*known, *(replace(block, even=False) for block in known)]


def _idea(chunks: int, scored: list[tuple[float, Block]], rnd: random.Random) -> Block:
    """A new block, or a good one changed in one leg."""
    if not scored or rnd.random() < 0.5:
        return Block(
            tuple(float(rnd.choice((0, 0, 1, 1, 2, 3))) for _ in range(2 * chunks)),
            rnd.choice((0.0, 0.0, 1.0, 2.0)),
            rnd.choice((1.0, 1.0, 1.0, 1.1, 1.25)),
            rnd.random() < 0.5,
        )
    block = rnd.choice(scored[:4])[1]
    slack = list(block.slack)
    leg = rnd.randrange(len(slack))
    slack[leg] = max(0.0, slack[leg] + rnd.choice((-1, -0.5, 0.5, 1)))
    return replace(block, slack=tuple(slack))
