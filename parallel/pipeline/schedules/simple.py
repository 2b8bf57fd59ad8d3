"""Schedules of one stage a rank: GPipe, 1F1B, and the zero-bubble family's ZB-H1 and ZB-H2.

All are one construction with other numbers: some forwards to warm up, then forwards and backwards
by turns, then what is left.
"""

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule, loop_placement


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., GPipe, 1811.06965)."""
    orders = [
        [Op(rank, kind, i) for kind in (Kind.F, Kind.BW) for i in range(num_microbatches)]
        for rank in range(num_ranks)
    ]
    return Schedule.of("gpipe", loop_placement(num_ranks), num_microbatches, orders)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward (Narayanan et al., PipeDream-Flush, 2006.09503).

    Rank r holds p - r microbatches at most.
    """
    orders = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        order = [Op(rank, Kind.F, i) for i in range(warmup)]
        for i in range(num_microbatches):
            if warmup + i < num_microbatches:
                order.append(Op(rank, Kind.F, warmup + i))
            order.append(Op(rank, Kind.BW, i))
        orders.append(order)
    return Schedule.of("1f1b", loop_placement(num_ranks), num_microbatches, orders)


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """A third of 1F1B's bubble in its memory (Qi et al., 2401.10241, section 2.1)."""
    return _handcrafted("zb_h1", 1, num_ranks, num_microbatches)


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """No bubble, in twice 1F1B's memory, where F = B = W (Qi et al., 2401.10241, section 2.2)."""
    return _handcrafted("zb_h2", 2, num_ranks, num_microbatches)


def _handcrafted(name: str, depth: int, num_ranks: int, num_microbatches: int) -> Schedule:
    """Rank r runs `depth` (p - 1 - r) forwards ahead and its weight gradients `depth` r behind.

    So every rank holds as much, and the weight gradients that are put off fill the end, where
    input gradients come in from the later ranks with gaps between them.
    """
    orders = []
    for rank in range(num_ranks):
        warmup = min(depth * (num_ranks - 1 - rank), num_microbatches)
        behind = depth * rank
        order = [Op(rank, Kind.F, i) for i in range(warmup)]
        for i in range(num_microbatches):
            if warmup + i < num_microbatches:
                order.append(Op(rank, Kind.F, warmup + i))
            order.append(Op(rank, Kind.B, i))
            if i >= behind:
                order.append(Op(rank, Kind.W, i - behind))
        left = range(max(num_microbatches - behind, 0), num_microbatches)
        order += [Op(rank, Kind.W, i) for i in left]
        orders.append(order)
    return Schedule.of(name, loop_placement(num_ranks), num_microbatches, orders)
