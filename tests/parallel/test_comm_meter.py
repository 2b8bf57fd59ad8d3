"""The meter adds up what a rank sends, by kind and by link."""

import math

from phalanx.parallel.comm_meter import CommMeter, Traffic


def meter(rank: int = 1) -> CommMeter:
    """Of a rank among 8 on 4 nodes."""
    return CommMeter(rank=rank, ranks_per_node=2)


def test_messages_go_inside_a_node_or_between_nodes() -> None:
    mine = meter(rank=3)
    for to, num_bytes in ((2, 10), (1, 100), (7, 1000), (2, 5)):
        mine.sent("pipeline", to, num_bytes)
    assert mine.traffic == {"pipeline": Traffic(inside=15, between=1100)}
    assert mine.traffic["pipeline"].total == 1115


def test_kinds_are_apart_and_taking_begins_anew() -> None:
    mine = meter()
    mine.sent("params", 0, 7)
    mine.sent("grads", 2, 8)
    assert mine.take() == {"params": Traffic(inside=7), "grads": Traffic(between=8)}
    assert mine.take() == {}
    mine.sent("grads", 0, 1)
    assert mine.take() == {"grads": Traffic(inside=1)}


def test_an_exchange_sends_each_peer_its_part() -> None:
    mine = meter(rank=2)
    mine.exchanged("grads", [0, 2, 4, 6], 12)
    assert mine.traffic["grads"] == Traffic(between=36)
    mine.exchanged("grads", range(8), 1)
    assert mine.traffic["grads"] == Traffic(inside=1, between=42)
    mine.exchanged("grads", [2], 1000)
    assert mine.traffic["grads"].total == 43


def test_an_all_reduce_is_a_rings() -> None:
    """Each rank passes 2 (n - 1) / n of the data on to the next, which is where the ring turns a
    node's last rank into another link than its first."""
    first, last = meter(rank=0), meter(rank=1)
    for mine in (first, last):
        mine.all_reduced("control", range(8), 800)
        mine.all_reduced("control", [mine._rank], 800)  # alone: nothing
    assert first.traffic["control"] == Traffic(inside=1400)
    assert last.traffic["control"] == Traffic(between=1400)
    around = meter(rank=7)
    around.all_reduced("control", [5, 7], 10)
    assert around.traffic["control"] == Traffic(between=10)


def test_without_nodes_everything_is_inside() -> None:
    mine = CommMeter(rank=1, ranks_per_node=4)
    mine.exchanged("params", range(4), 5)
    assert mine.take() == {"params": Traffic(inside=15)}


def test_what_cannot_be_counted_is_nan_and_stays_so() -> None:
    mine = meter()
    mine.sent("tensor", 0, 3)
    mine.cannot_see("tensor")
    for _ in range(2):
        mine.sent("tensor", 0, 3)  # a part of it can
        mine.sent("control", 0, 1)
        taken = mine.take()
        assert math.isnan(taken["tensor"].inside)
        assert math.isnan(taken["tensor"].between)
        assert taken["control"] == Traffic(inside=1)
