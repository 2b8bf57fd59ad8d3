"""Where every rank can check the step before without any rank waiting for another's check."""

import pytest

from phalanx.parallel.pipeline.forwards_first import forwards_before_backward
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.schedules.registry import GENERATORS, make_schedule


def schedule(placement: tuple[int, ...], count: int, *orders: str) -> Schedule:
    return Schedule.of("test", placement, count, [map(Op.parse, o.split()) for o in orders])


def test_a_rank_s_own_first_backward_where_forwards_only_go_down() -> None:
    found = forwards_before_backward(
        schedule(
            loop_placement(2),
            3,
            "0F0 0F1 0BW0 0F2 0BW1 0BW2",
            "1F0 1BW0 1F1 1BW1 1F2 1BW2",
        )
    )
    assert found == (2, 1)


def test_before_a_forward_that_needs_another_rank_s_later_one() -> None:
    """Rank 0 holds the last stage, so its first backward comes before its third forward."""
    found = forwards_before_backward(
        schedule(
            v_placement(2),
            3,
            "0F0 0F1 3F0 3BW0 0F2 3F1 3BW1 0BW0 3F2 3BW2 0BW1 0BW2",
            "1F0 2F0 1F1 1F2 2F1 2BW0 1BW0 2F2 2BW1 1BW1 2BW2 1BW2",
        )
    )
    assert found == (3, 3), "1F2 needs 0F2, which comes after 3BW0"


@pytest.mark.parametrize("name", GENERATORS)
def test_no_forward_before_it_needs_one_after_it(name: str) -> None:
    made = make_schedule(name, num_ranks=4, num_microbatches=8)
    cut = forwards_before_backward(made)
    early = {op for order, end in zip(made.orders, cut, strict=True) for op in order[:end]}
    assert early
    assert all(op.kind is Kind.F for op in early)

    def needs(op: Op) -> Op | None:
        return Op(op.stage - 1, Kind.F, op.microbatch) if op.stage else None

    assert all(needs(op) in early for op in early if op.stage)
    for order, end in zip(made.orders, cut, strict=True):
        after = order[end]
        assert after.kind is not Kind.F or needs(after) not in early, "could go further"
