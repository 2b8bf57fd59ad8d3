"""Messages of a schedule: sent once, received once, and known to come in the sender's order."""

import pytest

from phalanx.parallel.pipeline.channels import _rounds
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.runtime import _forward_orders
from phalanx.parallel.pipeline.schedules.registry import GENERATORS, make_schedule
from phalanx.parallel.pipeline.simulate import Costs, simulate
from phalanx.parallel.pipeline.traffic import channels_of, needed_by, sent_by, traffic

PLACEMENTS = [(0, 1, 2, 3), loop_placement(3, 2), v_placement(4), (1, 0, 0)]


def test_channels_join_neighbouring_stages() -> None:
    assert channels_of((0, 1, 2)) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert channels_of(v_placement(2)) == [(0, 1), (1, 0)]
    assert (2, 0) in channels_of(loop_placement(3, 2))
    assert channels_of((0, 0)) == []


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("name", GENERATORS)
def test_all_that_is_needed_comes(name: str, num_ranks: int) -> None:
    schedule = make_schedule(name, num_ranks=num_ranks, num_microbatches=2 * num_ranks)
    placement, orders = schedule.placement, schedule.orders
    for rank, order in enumerate(orders):
        seen = traffic(placement, orders, rank)
        for sender, messages in seen.incoming.items():
            sent = sent_by(orders[sender], placement)
            assert messages == [m for m in sent if placement[m.stage] == rank]
        taken = []
        for op, reach in zip(order, seen.reach, strict=True):
            for sender, count in reach.items():
                taken.append(seen.incoming[sender][count - 1])
                assert taken[-1] == needed_by(op, len(placement))
        assert sorted(taken) == sorted(m for part in seen.incoming.values() for m in part)


def test_what_operations_need() -> None:
    assert needed_by(Op(0, Kind.F, 3), 2) is None
    assert needed_by(Op(1, Kind.F, 3), 2) == (Kind.F, 1, 3)
    assert needed_by(Op(1, Kind.BW, 3), 2) is None
    assert needed_by(Op(0, Kind.B, 3), 2) == (Kind.B, 0, 3)
    assert needed_by(Op(0, Kind.W, 3), 2) is None


@pytest.mark.parametrize(
    "placement", [(0, 1, 2, 3), loop_placement(3, 2), v_placement(4), (1, 0, 0)]
)
def test_rounds_take_every_channel_once_and_no_rank_twice(placement: tuple[int, ...]) -> None:
    channels = channels_of(placement)
    rounds = _rounds(channels)
    assert sorted(pair for pairs in rounds for pair in pairs) == channels
    for pairs in rounds:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))


@pytest.mark.parametrize(
    "placement", [(0, 1, 2, 3), loop_placement(3, 2), v_placement(4), (1, 0, 0)]
)
@pytest.mark.parametrize("num_microbatches", [1, 7])
def test_forwards_alone_do_not_block(placement: tuple[int, ...], num_microbatches: int) -> None:
    """As fast as forwards can be: the longest way, then one microbatch after the other."""
    orders = _forward_orders(placement, num_microbatches)
    schedule = Schedule.of("forwards", placement, num_microbatches, orders)
    timeline = simulate(schedule, Costs.uniform(1, 1, 1, num_stages=len(placement)))
    most = max(len(order) for order in orders) // num_microbatches
    assert timeline.makespan <= len(placement) + most * (num_microbatches - 1) + most
