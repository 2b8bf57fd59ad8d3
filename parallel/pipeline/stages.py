"""Which layers a pipeline stage holds, and which rank holds which stages."""

import itertools


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Cut `num_layers` into consecutive ranges, one a stage, the longer ones first.

    The last stage also computes the head, so it is among the shorter ones.
    """
    short, longer = divmod(num_layers, num_stages)
    starts = [i * short + min(i, longer) for i in range(num_stages + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(starts)]


def stages_of_rank(pp_rank: int, pp_size: int, chunks: int) -> list[int]:
    """Stage numbers of a pipeline rank: round robin, as the interleaved schedule wants them."""
    return [pp_rank + chunk * pp_size for chunk in range(chunks)]
