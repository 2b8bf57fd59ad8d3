"""Which layers a stage holds and which rank a stage."""

import pytest

from phalanx.parallel.pipeline.stages import stage_layers, stages_of_rank


@pytest.mark.parametrize("num_layers", [1, 2, 5, 8, 13, 80])
def test_every_layer_once_in_order(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        cuts = stage_layers(num_layers, num_stages)
        assert len(cuts) == num_stages
        assert [layer for cut in cuts for layer in cut] == list(range(num_layers))


@pytest.mark.parametrize("num_layers", [5, 8, 13, 80])
def test_stages_are_as_equal_as_can_be_the_longer_first(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        sizes = [len(cut) for cut in stage_layers(num_layers, num_stages)]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert min(sizes) >= 1


def test_cuts_of_an_uneven_model() -> None:
    assert stage_layers(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]


@pytest.mark.parametrize(("pp_size", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
def test_every_stage_on_one_rank_its_neighbour_on_the_next(pp_size: int, chunks: int) -> None:
    held = [stages_of_rank(rank, pp_size, chunks) for rank in range(pp_size)]
    assert all(len(stages) == chunks for stages in held)
    owner = {stage: rank for rank, stages in enumerate(held) for stage in stages}
    assert sorted(owner) == list(range(pp_size * chunks))
    for stage in range(pp_size * chunks - 1):
        assert owner[stage + 1] == (owner[stage] + 1) % pp_size
    assert owner[0] == 0
    assert owner[pp_size * chunks - 1] == pp_size - 1
