"""Interleaved 1F1B: several stages a rank, microbatches taken through them in groups.

Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM
(2104.04473), section 2.2.
"""

from itertools import pairwise

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule, loop_placement


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> Schedule:
    """Each rank takes a group of p microbatches through all its chunks before the next group.

    Where p does not divide the microbatches, the groups are as even as can be and no smaller than
    p: a small last group would stall every rank (or, alternating strictly, all of them for ever).
    Rank r runs 2 (p - 1 - r) + (chunks - 1) p forwards before its first backward.
    """
    groups = _groups(num_ranks, num_microbatches)
    turns = [(chunk, i) for group in groups for chunk in range(chunks) for i in group]
    orders = []
    for rank in range(num_ranks):
        forwards = [Op(chunk * num_ranks + rank, Kind.F, i) for chunk, i in turns]
        backwards = [Op((chunks - 1 - chunk) * num_ranks + rank, Kind.BW, i) for chunk, i in turns]
        warmup = min(2 * (num_ranks - 1 - rank) + (chunks - 1) * len(groups[0]), len(turns))
        order = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            order += [forward, backward]
        order += backwards[len(turns) - warmup :]
        orders.append(order)
    placement = loop_placement(num_ranks, chunks)
    return Schedule.of("interleaved", placement, num_microbatches, orders)


def _groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Consecutive microbatches, the first group among the larger ones."""
    count = max(num_microbatches // num_ranks, 1)
    ends = [-(-num_microbatches * n // count) for n in range(count + 1)]
    return [range(begin, end) for begin, end in pairwise(ends)]
