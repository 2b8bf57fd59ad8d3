"""The search for schedules: published figures met or beaten, limits kept, the same every time."""

import itertools
import random

import pytest

from phalanx.parallel.pipeline.graph import Kind, Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.order.plan import (
    Block,
    one_by_one,
    repeat,
    with_late_weights,
    without_weights,
)
from phalanx.parallel.pipeline.order.problem import Problem
from phalanx.parallel.pipeline.order.replay import Replay
from phalanx.parallel.pipeline.order.squeeze import Rule, squeeze
from phalanx.parallel.pipeline.search import best_order, best_schedule, least_memory
from phalanx.parallel.pipeline.search.bound import lower_bound
from phalanx.parallel.pipeline.simulate import Costs, Memory, report, simulate
from phalanx.parallel.pipeline.validate import validate

pytestmark = pytest.mark.pipeline

# Zero Bubble Pipeline Parallelism, table of bubble rates: ranks, microbatches, times of F, B and W
# and of a hop in microseconds, bubble rates of ZB-1p and of ZB-2p.
PUBLISHED = [
    (8, 24, (18522, 18086, 9337, 601), 0.1585, 0.0433),
    (8, 32, (18513, 18086, 9331, 626), 0.1242, 0.0039),
    (8, 64, (18546, 18097, 9321, 762), 0.0674, 0.0026),
    (8, 24, (29718, 29444, 19927, 527), 0.1323, 0.0029),
    (8, 32, (29802, 29428, 19530, 577), 0.1045, 0.0022),
    (8, 64, (29935, 29621, 19388, 535), 0.0554, 0.0010),
    (16, 48, (11347, 11248, 8132, 377), 0.1397, 0.0066),
    (16, 64, (11307, 11254, 8101, 379), 0.1088, 0.0054),
    (16, 128, (11325, 11308, 8109, 378), 0.0576, 0.0028),
    (32, 96, (10419, 10207, 7715, 408), 0.1421, 0.0038),
    (32, 128, (10408, 10204, 7703, 408), 0.1106, 0.0029),
    (32, 256, (10402, 10248, 7698, 460), 0.0594, 0.0018),
]
# The same for ZB-V, times of one of a rank's two stages.
PUBLISHED_V = [
    (16, 48, (14407, 14380, 9676, 1610), 0.0697),
    (16, 64, (14412, 14393, 9688, 1621), 0.0533),
    (16, 128, (14316, 14306, 9639, 1619), 0.0274),
    (24, 72, (6763, 6969, 5251, 755), 0.0638),
    (24, 96, (6783, 6984, 5259, 758), 0.0483),
    (24, 192, (6785, 6990, 5260, 770), 0.0250),
    (32, 96, (9458, 9748, 7288, 879), 0.0593),
    (32, 128, (9469, 9744, 7306, 892), 0.0451),
    (32, 256, (9447, 9644, 7193, 887), 0.0236),
]
SMALL = 192
"""Most ranks x microbatches in the short tests."""


def sized(rows: list[tuple]) -> list:
    """Rows, the large ones marked slow."""
    marks = [[] if row[0] * row[1] <= SMALL else [pytest.mark.slow] for row in rows]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]


def bubble(schedule: Schedule, f: float, b: float, w: float, hop: float, limit: float) -> float:
    """Span bubble of a schedule of equal stages, whose memory deltas are 2, -1 and -1."""
    size = {"num_stages": schedule.num_stages, "chunks": schedule.chunks}
    memory = Memory.uniform(2, -1, -1, **size)
    validate(schedule, memory=memory, limit=limit)
    return report(schedule, Costs.uniform(f, b, w, hop, **size), memory).span_bubble


@pytest.mark.parametrize(("p", "m", "costs", "zb_1p", "zb_2p"), sized(PUBLISHED))
def test_published_figures_are_met_or_beaten(p, m, costs, zb_1p, zb_2p) -> None:
    for limit, published in ((2 * p, zb_1p), (4 * p, zb_2p)):
        f, b, w, hop = costs
        found = best_schedule(num_ranks=p, num_microbatches=m, f=f, b=b, w=w, hop=hop, limit=limit)
        assert bubble(found, *costs, limit) <= published + 5e-4


@pytest.mark.parametrize(("p", "m", "costs", "zb_1p", "zb_2p"), PUBLISHED[1:2])
def test_one_stage_a_rank_meets_the_published_figures(p, m, costs, zb_1p, zb_2p) -> None:
    *times, hop = costs
    for limit, published in ((2 * p, zb_1p), (4 * p, zb_2p)):
        found = best_order(
            loop_placement(p),
            num_microbatches=m,
            costs=Costs.uniform(*times, hop, num_stages=p),
            memory=Memory.uniform(2, -1, -1, num_stages=p),
            limit=limit,
        )
        assert bubble(found, *costs, limit) <= published + 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(("p", "m", "costs", "published"), PUBLISHED_V)
def test_published_figures_of_the_v_are_met_or_beaten(p, m, costs, published) -> None:
    *times, hop = costs
    f, b, w = (2 * x for x in times)
    found = best_schedule(num_ranks=p, num_microbatches=m, f=f, b=b, w=w, hop=hop, limit=2 * p)
    assert bubble(found, f, b, w, hop, 2 * p) <= published + 5e-4


@pytest.mark.parametrize(("p", "m"), [(2, 6), (3, 9), (4, 12), (8, 24)])
def test_equal_times_leave_no_bubble_in_the_memory_of_1f1b(p: int, m: int) -> None:
    found = best_schedule(num_ranks=p, num_microbatches=m, f=1, b=1, w=1, hop=0, limit=2 * p)
    assert found.placement == v_placement(p)
    assert bubble(found, 1, 1, 1, 0, 2 * p) == 0


# Controllable Memory, unit costs: V-Min and V-Half with their peaks in microbatches.
@pytest.mark.parametrize(
    ("peak", "published"), [((8 + 4) // 3, 0.1233), ((8 + 2) // 2, 0.0813)], ids=["min", "half"]
)
def test_low_limits_are_used_as_well_as_by_the_blocks_made_for_them(
    peak: int, published: float
) -> None:
    found = best_schedule(num_ranks=8, num_microbatches=32, f=1, b=1, w=1, hop=0, limit=2 * peak)
    assert bubble(found, 1, 1, 1, 0, 2 * peak) <= published + 5e-4


def test_more_memory_is_never_slower_by_much() -> None:
    """Searches differ, but a higher limit must not lose what a lower one had."""
    bubbles = []
    for limit in (3, 4, 6, 12):
        found = best_schedule(num_ranks=3, num_microbatches=6, f=10, b=12, w=8, hop=1, limit=limit)
        bubbles.append(bubble(found, 10, 12, 8, 1, limit))
    assert all(later <= earlier + 5e-3 for earlier, later in itertools.pairwise(bubbles))
    assert bubbles[-1] < bubbles[0] / 4


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_unequal_stages_keep_their_limits(chunks: int) -> None:
    rnd = random.Random(chunks)
    for p, m in ((2, 3), (3, 5), (4, 6)):
        S = p * chunks
        placement = loop_placement(p, chunks)
        costs = Costs(*(tuple(rnd.uniform(1, 9) for _ in range(S)) for _ in range(3)), hop=0.5)
        f = tuple(rnd.uniform(2, 4) for _ in range(S))
        w = tuple(-rnd.uniform(0.5, 1.5) for _ in range(S))
        memory = Memory(f, tuple(-x - y for x, y in zip(f, w, strict=True)), w)
        least = least_memory(placement, num_microbatches=m, memory=memory)
        spans = []
        for limit in (least, 1.5 * least, None):
            found = best_order(
                placement, num_microbatches=m, costs=costs, memory=memory, limit=limit, effort_s=0.3
            )
            assert found.name == "auto"
            validate(found, memory=memory, limit=limit)
            spans.append(simulate(found, costs).longest_stage)
            problem = Problem(placement, m, costs, memory, limit)
            assert spans[-1] >= lower_bound(problem) * (1 - 1e-9)
        assert spans[2] < spans[0]


@pytest.fixture
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the best is not asked for, or is found at once."""
    monkeypatch.setattr("phalanx.parallel.pipeline.search.auto._EFFORT_S", 0.1)


@pytest.mark.usefixtures("little_effort")
def test_same_input_same_schedule() -> None:
    ask = {"num_ranks": 3, "num_microbatches": 5, "f": 10, "b": 11, "w": 7, "hop": 1, "limit": 6}
    assert best_schedule(**ask) == best_schedule(**ask)


@pytest.mark.parametrize("placement", [loop_placement(3), loop_placement(2, 2), v_placement(3)])
def test_least_memory_is_met_and_less_is_refused(placement: tuple[int, ...]) -> None:
    S, m = len(placement), 4
    costs = Costs.uniform(1, 1, 1, num_stages=S)
    memory = Memory.uniform(2, -1, -1, num_stages=S)
    least = least_memory(placement, num_microbatches=m, memory=memory)
    assert least == 2 * S / (max(placement) + 1)
    ask = {"num_microbatches": m, "costs": costs, "memory": memory}
    found = best_order(placement, **ask, limit=least, effort_s=0.3)
    assert memory.peak(found) == least
    with pytest.raises(ValueError, match=rf"memory limit .*least that would do is {least:g}"):
        best_order(placement, **ask, limit=least - 0.5)


def test_a_backward_that_needs_memory_counts_in_the_least() -> None:
    memory = Memory((2.0, 2.0), (1.0, 1.0), (-3.0, -3.0))
    assert least_memory((0, 0), num_microbatches=3, memory=memory) == 5
    assert least_memory((0, 1), num_microbatches=3, memory=memory) == 3


@pytest.mark.usefixtures("little_effort")
def test_one_rank_or_one_microbatch_is_a_schedule() -> None:
    for p, m in ((1, 3), (3, 1), (1, 1)):
        found = best_schedule(num_ranks=p, num_microbatches=m, f=1, b=1, w=1, hop=0, limit=2)
        assert bubble(found, 1, 1, 1, 0, 2) <= 1 - m / (m * p + 1)
    with pytest.raises(ValueError, match="0 ranks"):
        best_schedule(num_ranks=0, num_microbatches=1, f=1, b=1, w=1, hop=0)


def test_placements_that_are_no_pipeline_are_refused() -> None:
    costs, memory = Costs.uniform(1, 1, 1, num_stages=4), Memory.uniform(2, -1, -1, num_stages=4)
    with pytest.raises(ValueError, match="placement"):
        best_order((0, 0, 1, 2), num_microbatches=2, costs=costs, memory=memory)


@pytest.mark.parametrize("limit", [4.0, 7.0, None])
@pytest.mark.parametrize("rule", [Rule(), Rule(0.5, 0.5), Rule(strict=True), Rule(target=25.0)])
def test_every_squeezed_plan_is_a_schedule(limit: float | None, rule: Rule) -> None:
    """Any plan, at any limit: complete, no rank stuck, and its times are the simulator's."""
    placement, m = v_placement(3), 5
    size = {"num_stages": 6, "chunks": 2}
    costs, memory = Costs.uniform(3, 4, 2, 0.3, **size), Memory.uniform(2, -1, -1, **size)
    problem = Problem(placement, m, costs, memory, limit)
    replay = Replay(problem)
    plans = [one_by_one(problem)]
    for slack in itertools.product((0, 2), repeat=4):
        plan = repeat(problem, Block(slack))
        if plan is not None:
            plans.append(plan)
    for plan in [*plans, *(with_late_weights(problem, plan) for plan in plans)]:
        words = squeeze(problem, plan, rule)
        schedule = problem.schedule("squeezed", words)
        validate(schedule, memory=memory, limit=limit)
        orders = [replay.operations(word) for word in words]
        ends = replay.run(orders)
        assert ends is not None
        span = max(replay.spans(orders, ends))
        assert span == pytest.approx(simulate(schedule, costs).longest_stage, rel=1e-12)
        again = without_weights(problem, words)
        if again is not None:
            kinds = [[op for op in order if op.kind is not Kind.W] for order in schedule.orders]
            assert [len(order) for order in again] == [len(order) for order in kinds]


@pytest.mark.parametrize("times", [(1, 0, 0), (1, 0, 1), (0, 0, 1), (0, 1, 0)])
def test_operations_that_take_no_time(times: tuple[float, float, float]) -> None:
    f, b, w = times
    found = best_schedule(num_ranks=4, num_microbatches=8, f=f, b=b, w=w, hop=0.0)
    costs = Costs.uniform(f, b, w, num_stages=found.num_stages, chunks=found.chunks)
    assert simulate(found, costs).longest_stage >= 8 * sum(times) * (1 - 1e-9)
