"""Which layers a stage holds: the slowest rank is as fast as can be."""

from collections.abc import Sequence
from itertools import product

import pytest

from phalanx.parallel.pipeline.graph import loop_placement, v_placement
from phalanx.parallel.pipeline.stages import stage_layers

PLACEMENTS = {
    "1 rank": loop_placement(1),
    "2 ranks": loop_placement(2),
    "3 ranks": loop_placement(3),
    "2 ranks interleaved": loop_placement(2, 2),
    "2 ranks in a V": v_placement(2),
    "3 ranks in a V": v_placement(3),
    "unequal ranks": (0, 1, 1, 0, 0),
}
EXTRAS = [(0.0, 0.0), (0.0, 0.4), (0.0, 2.5), (1.7, 0.0), (0.3, 1.2), (5.0, 5.0)]


def loads(
    counts: Sequence[int], placement: Sequence[int], embedding: float, head: float
) -> list[float]:
    """Time of each rank, the slowest first; a layer takes 1."""
    ranks = [0.0] * (max(placement) + 1)
    for count, rank in zip(counts, placement, strict=True):
        ranks[rank] += count
    ranks[placement[0]] += embedding
    ranks[placement[-1]] += head
    return sorted(ranks, reverse=True)


@pytest.mark.parametrize(("embedding", "head"), EXTRAS)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_slowest_rank_is_as_fast_as_any_cut_makes_it(
    name: str, embedding: float, head: float
) -> None:
    placement = PLACEMENTS[name]
    for num_layers in range(len(placement), 9):
        cuts = stage_layers(num_layers, placement, embedding=embedding, head=head)
        counts = [len(cut) for cut in cuts]
        every = [
            loads(other, placement, embedding, head)
            for other in product(range(1, num_layers + 1), repeat=len(placement))
            if sum(other) == num_layers
        ]
        assert loads(counts, placement, embedding, head) == pytest.approx(min(every))


@pytest.mark.parametrize("num_layers", [1, 2, 5, 8, 13, 80])
def test_every_layer_once_in_order(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        cuts = stage_layers(num_layers, loop_placement(num_stages), head=1.3)
        assert len(cuts) == num_stages
        assert min(len(cut) for cut in cuts) >= 1
        assert [layer for cut in cuts for layer in cut] == list(range(num_layers))


@pytest.mark.parametrize("num_layers", [5, 8, 13, 80])
def test_equal_stages_are_as_equal_as_can_be_the_longer_first(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        sizes = [len(cut) for cut in stage_layers(num_layers, loop_placement(num_stages))]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


def test_a_heavy_head_leaves_its_rank_fewer_layers() -> None:
    assert stage_layers(7, loop_placement(3), head=2.0) == [range(0, 3), range(3, 6), range(6, 7)]


def test_a_v_counts_both_stages_of_a_rank() -> None:
    """The first rank holds the head as well: one layer there, three on each other rank."""
    cuts = stage_layers(8, v_placement(3), head=2.0)
    assert [len(cut) for cut in cuts] == [1, 2, 2, 1, 1, 1]


def test_layers_of_a_rank_go_to_its_faster_stage() -> None:
    cuts = stage_layers(12, v_placement(2), head=2.0)
    assert [len(cut) for cut in cuts] == [4, 4, 3, 1]


def test_too_few_layers() -> None:
    with pytest.raises(ValueError, match="3 pipeline stages, but only 2 layers"):
        stage_layers(2, loop_placement(3))
