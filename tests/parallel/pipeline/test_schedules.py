"""Named schedules: they can run, and have the bubbles and peaks that their papers give them."""

import pytest

from phalanx.parallel.pipeline.graph import Kind, Schedule, v_placement
from phalanx.parallel.pipeline.schedules.blocks import Block, from_block
from phalanx.parallel.pipeline.schedules.registry import (
    GENERATORS,
    chunks_of,
    fewest_microbatches,
    make_schedule,
    placement_of,
)
from phalanx.parallel.pipeline.simulate import Costs, Memory, ScheduleReport, report
from phalanx.parallel.pipeline.validate import validate

pytestmark = pytest.mark.pipeline

# Model, p, m, time of F, B, W of a rank and of a hop in microseconds; bubbles of 1F1B, ZB-H1, ZB-H2
# (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 5.3).
ICLR = [
    (8, 24, 18522, 18086, 9337, 601, 0.2431, 0.1585, 0.1083),  # 1.5B
    (8, 32, 18513, 18086, 9331, 626, 0.1985, 0.1242, 0.0837),  # 1.5B
    (8, 64, 18546, 18097, 9321, 762, 0.124, 0.0674, 0.0444),  # 1.5B
    (8, 24, 29718, 29444, 19927, 527, 0.2347, 0.1323, 0.0698),  # 6.2B
    (8, 32, 29802, 29428, 19530, 577, 0.1898, 0.1045, 0.0559),  # 6.2B
    (8, 64, 29935, 29621, 19388, 535, 0.1091, 0.0554, 0.0294),  # 6.2B
    (16, 48, 11347, 11248, 8132, 377, 0.2552, 0.1397, 0.0672),  # 14.6B
    (16, 64, 11307, 11254, 8101, 379, 0.2082, 0.1088, 0.0516),  # 14.6B
    (16, 128, 11325, 11308, 8109, 378, 0.1251, 0.0576, 0.0266),  # 14.6B
    (32, 96, 10419, 10207, 7715, 408, 0.2646, 0.1421, 0.0641),  # 28.3B
    (32, 128, 10408, 10204, 7703, 408, 0.2168, 0.1106, 0.049),  # 28.3B
    (32, 256, 10402, 10248, 7698, 460, 0.1352, 0.0594, 0.0257),  # 28.3B
]

# The same of a stage with two a rank, and ZB-V's bubble last (its longer version, 2401.10241,
# section 6).
LONGER = [
    (16, 48, 14407, 14380, 9676, 1610, 0.2668, 0.1536, 0.0823, 0.0697),  # 6.2B
    (16, 64, 14412, 14393, 9688, 1621, 0.2206, 0.1198, 0.063, 0.0533),  # 6.2B
    (16, 128, 14316, 14306, 9639, 1619, 0.139, 0.0637, 0.0325, 0.0274),  # 6.2B
    (24, 72, 6763, 6969, 5251, 755, 0.2699, 0.1439, 0.0628, 0.0638),  # 14.6B
    (24, 96, 6783, 6984, 5259, 758, 0.2229, 0.1121, 0.048, 0.0483),  # 14.6B
    (24, 192, 6785, 6990, 5260, 770, 0.1403, 0.0595, 0.0247, 0.025),  # 14.6B
    (32, 96, 9458, 9748, 7288, 879, 0.2676, 0.1429, 0.0629, 0.0593),  # 28.3B
    (32, 128, 9469, 9744, 7306, 892, 0.2204, 0.1111, 0.0478, 0.0451),  # 28.3B
    (32, 256, 9447, 9644, 7193, 887, 0.1362, 0.0593, 0.0251, 0.0236),  # 28.3B
]

PEAKS = {
    "zb_v": lambda p: p,
    "v_half": lambda p: (p + 2) // 2,
    "v_min": lambda p: (p + 4) // 3,
    "1f1b": lambda p: p,
    "zb_h1": lambda p: p,
}


def measure(schedule: Schedule, f: float, b: float, w: float, hop: float = 0) -> ScheduleReport:
    """At costs of a whole rank; memory as the papers count it (2 for F, then -1 and -1)."""
    size = {"num_stages": schedule.num_stages, "chunks": schedule.chunks}
    costs = Costs.uniform(f, b, w, hop, **size)
    return report(schedule, costs, Memory.uniform(2, -1, -1, **size))


def make(name: str, p: int, m: int, cost: tuple[float, float, float, float]) -> Schedule:
    """Ordered for costs of a whole rank."""
    chunks = chunks_of(name)
    costs = Costs.uniform(*cost, num_stages=p * chunks, chunks=chunks)
    return make_schedule(name, num_ranks=p, num_microbatches=m, costs=costs)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_runs_for_any_number_of_microbatches(name: str, p: int) -> None:
    for m in {1, 2, p - 1, p, p + 1, 2 * p, 3 * p - 1} - {0}:
        schedule = make_schedule(name, num_ranks=p, num_microbatches=m)
        validate(schedule)
        assert (schedule.name, schedule.num_microbatches) == (name, m)
        assert schedule.placement == placement_of(name, p)
        assert schedule.splits_backward == (name not in ("gpipe", "1f1b", "interleaved"))


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("p", [6, 8, 12, 16])
def test_runs_on_many_ranks(name: str, p: int) -> None:
    for m in (1, p - 1, p, p + 5, 3 * p):
        validate(make_schedule(name, num_ranks=p, num_microbatches=m))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_runs_with_any_number_of_chunks(p: int, chunks: int) -> None:
    for m in range(1, 3 * p + 2):
        schedule = make_schedule("interleaved", num_ranks=p, num_microbatches=m, chunks=chunks)
        validate(schedule)
        assert schedule.chunks == chunks


@pytest.mark.parametrize("row", ICLR)
def test_bubbles_of_the_paper(row: tuple[float, ...]) -> None:
    p, m, *cost, plain, h1, h2 = row
    for name, bubble in (("1f1b", plain), ("zb_h1", h1), ("zb_h2", h2)):
        schedule = make_schedule(name, num_ranks=int(p), num_microbatches=int(m))
        assert measure(schedule, *cost).span_bubble == pytest.approx(bubble, abs=5e-4)


@pytest.mark.parametrize("row", LONGER)
def test_bubbles_of_the_longer_paper(row: tuple[float, ...]) -> None:
    p, m, f, b, w, hop, plain, h1, h2, _ = row
    for name, bubble in (("1f1b", plain), ("zb_h1", h1), ("zb_h2", h2)):
        schedule = make_schedule(name, num_ranks=int(p), num_microbatches=int(m))
        found = measure(schedule, 2 * f, 2 * b, 2 * w, hop)
        assert found.span_bubble == pytest.approx(bubble, abs=5e-4)


@pytest.mark.parametrize(
    "row", [LONGER[0], *(pytest.param(row, marks=pytest.mark.slow) for row in LONGER[1:])]
)
def test_zb_v_is_no_worse_than_its_paper(row: tuple[float, ...]) -> None:
    p, m, f, b, w, hop, *_, bubble = row
    cost = (2 * f, 2 * b, 2 * w, hop)
    found = measure(make("zb_v", int(p), int(m), cost), *cost)
    assert found.span_bubble <= bubble + 5e-4
    assert found.peak_memory <= 2 * p


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("p", [2, 3, 4, 6, 8, 12, 16])
def test_peaks_are_exact(name: str, p: int) -> None:
    found = measure(make_schedule(name, num_ranks=p, num_microbatches=p + 1), 1, 1, 1)
    assert found.peak_microbatches == pytest.approx(PEAKS[name](p))


@pytest.mark.slow
@pytest.mark.parametrize("cost", [(1, 1, 1, 0), (10, 12, 8, 0.2), (10, 10, 5, 0.5)])
@pytest.mark.parametrize("name", ["zb_v", "v_half", "v_min"])
@pytest.mark.parametrize("p", [2, 3, 4, 6, 8, 12, 16])
def test_peaks_are_exact_for_all_costs(
    name: str, p: int, cost: tuple[float, float, float, float]
) -> None:
    for m in (p, p + 1, 3 * p, 8 * p):
        found = measure(make(name, p, m, cost), *cost)
        assert found.peak_microbatches == pytest.approx(PEAKS[name](p))


# p = 8, m = 32, F = B = W: what the published scheduler reaches.
@pytest.mark.parametrize(
    ("name", "bubble"),
    [("1f1b", 0.1795), ("zb_h1", 0.0680), ("v_half", 0.0813), ("v_min", 0.1233), ("zb_h2", 0)],
)
def test_bubbles_at_equal_costs(name: str, bubble: float) -> None:
    found = measure(make_schedule(name, num_ranks=8, num_microbatches=32), 1, 1, 1)
    assert found.span_bubble <= bubble + 5e-5


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_zb_v_has_no_bubble_at_equal_costs(p: int) -> None:
    found = measure(make_schedule("zb_v", num_ranks=p, num_microbatches=3 * p), 1, 1, 1)
    assert found.span_bubble == pytest.approx(0, abs=1e-9)


def test_v_schedules_order_by_the_costs_that_they_are_given() -> None:
    cost = (1000, 1200, 800, 20)
    for name in ("zb_v", "v_half", "v_min"):
        plain = make_schedule(name, num_ranks=4, num_microbatches=8)
        fitted = make(name, 4, 8, cost)
        assert measure(fitted, *cost).span_bubble < measure(plain, *cost).span_bubble


def test_v_schedules_take_unequal_stages() -> None:
    costs = Costs((1, 2, 1, 3, 1, 1), (1, 2, 1, 2, 1, 4), (1, 2, 0.5, 2, 1, 3), hop=0.1)
    for name in ("zb_v", "v_half", "v_min"):
        validate(make_schedule(name, num_ranks=3, num_microbatches=7, costs=costs))


def test_the_same_input_makes_the_same_schedule() -> None:
    for name in GENERATORS:
        first, second = (make(name, 3, 4, (10, 12, 8, 0.3)) for _ in range(2))
        assert first == second


def test_interleaved_is_shorter_than_1f1b_and_holds_more() -> None:
    plain = measure(make_schedule("1f1b", num_ranks=4, num_microbatches=8), 1, 1, 1)
    found = measure(make_schedule("interleaved", num_ranks=4, num_microbatches=8), 1, 1, 1)
    # (p - 1) (F + B) / chunks of bubble (Megatron, section 2.2).
    assert found.longest_stage == pytest.approx(24 + 3 * 3 / 2)
    assert found.longest_stage < plain.longest_stage
    assert found.peak_microbatches > plain.peak_microbatches


def test_dualpipe_v_is_shorter_than_1f1b() -> None:
    for p in (2, 4, 8):
        plain = measure(make_schedule("1f1b", num_ranks=p, num_microbatches=4 * p), 1, 1, 1)
        found = measure(make_schedule("dualpipe_v", num_ranks=p, num_microbatches=4 * p), 1, 1, 1)
        assert found.span_bubble < plain.span_bubble
        assert found.peak_microbatches <= p + 1


def test_a_new_block_is_a_few_lines() -> None:
    p = 4  # ZB-V's, with the steps of its two directions exchanged
    down = [4 * i for i in range(p)]
    up = [6 * p - 5 - 2 * i for i in range(p)]
    back_down = [6 * p - 4 + 4 * i for i in range(p)]
    back_up = [12 * p - 9 - 2 * i for i in range(p)]
    block = Block(v_placement(p), down + up[::-1], back_up + back_down[::-1])
    costs = Costs.uniform(1, 1, 1, num_stages=2 * p)
    schedule = from_block("mine", block, 12, costs, peak_stages=2 * p)
    validate(schedule)
    found = measure(schedule, 1, 1, 1)
    assert (found.peak_microbatches, found.span_bubble) == (p, 0)


def test_a_block_that_collides_or_does_not_fit_is_refused() -> None:
    costs = Costs.uniform(1, 1, 1, num_stages=2)
    with pytest.raises(ValueError, match="0F and 0B share a slot of rank 0"):
        Block((0, 1), (0, 1), (3, 2)).repeat(2)
    with pytest.raises(ValueError, match="a peak of 1 is too little"):
        from_block("mine", Block((0, 1), (0, 1), (7, 2)), 8, costs, peak_stages=1)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="zb_h3: unknown; choose one of gpipe, 1f1b"):
        make_schedule("zb_h3", num_ranks=4, num_microbatches=8)
    with pytest.raises(ValueError, match="at least 2"):
        make_schedule("1f1b", num_ranks=1, num_microbatches=8)
    with pytest.raises(ValueError, match="0 microbatches: it needs at least 1"):
        make_schedule("1f1b", num_ranks=4, num_microbatches=0)
    with pytest.raises(ValueError, match="3 stages per rank: it has 1"):
        make_schedule("zb_h1", num_ranks=4, num_microbatches=8, chunks=3)
    with pytest.raises(ValueError, match="needs at least 2"):
        make_schedule("interleaved", num_ranks=4, num_microbatches=8, chunks=1)
    costs = Costs.uniform(1, 1, 1, num_stages=4)
    with pytest.raises(ValueError, match="give those of 8, 2 a rank"):
        make_schedule("zb_v", num_ranks=4, num_microbatches=8, costs=costs)
    assert all(fewest_microbatches(name, 8) == 1 for name in GENERATORS)


def test_every_weight_gradient_of_dualpipe_v_follows_its_stage() -> None:
    schedule = make_schedule("dualpipe_v", num_ranks=4, num_microbatches=8)
    apart = [op for order in schedule.orders for op in order if op.kind is Kind.W]
    assert len(apart) == sum(op.kind is Kind.B for order in schedule.orders for op in order) > 0
