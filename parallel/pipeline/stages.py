"""Which layers a pipeline stage holds."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def stage_layers(
    num_layers: int,
    placement: Sequence[int],
    *,
    layer: float = 1.0,
    embedding: float = 0.0,
    head: float = 0.0,
) -> list[range]:
    """Cut `num_layers` equal layers into consecutive ranges, at least one a stage.

    The slowest rank, over all its stages, is as fast as can be; so is then every other in turn:
    layers are given out one by one, each to the rank that is fastest with it (layers are alike, so
    this is exact), and on its rank to the fastest stage. Of equals the earliest takes it.

    Args:
        num_layers: of the whole model.
        placement: rank of each stage, as in Schedule.placement.
        layer: time of a layer, in any unit.
        embedding: time of what the first stage does besides its layers.
        head: time of what the last stage does besides.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    num_stages = len(placement)
    if num_layers < num_stages:
        raise ValueError(f"{num_stages} pipeline stages, but only {num_layers} layers")
    stages = [layer] * num_stages
    stages[0] += embedding
    stages[-1] += head
    counts = [1] * num_stages
    held: dict[int, list[int]] = {rank: [] for rank in sorted(set(placement))}
    for stage, rank in enumerate(placement):
        held[rank].append(stage)
    for _ in range(num_layers - num_stages):
        rank = min(held, key=lambda rank: sum(stages[stage] for stage in held[rank]))
        stage = min(held[rank], key=lambda stage: stages[stage])
        counts[stage] += 1
        stages[stage] += layer
    return cut(counts)


def cut(counts: Sequence[int]) -> list[range]:
    """Consecutive ranges of these lengths."""
    return [range(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]
