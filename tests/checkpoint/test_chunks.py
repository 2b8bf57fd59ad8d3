"""The box that a rank holds of a tensor, by its placements."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from phalanx.checkpoint.chunks import sizes_and_offsets


def chunks_of(rows: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """torch.chunk with the empty parts that FSDP and DTensor add."""
    chunks = list(torch.chunk(rows, parts)) if rows.numel() else []
    return chunks + [rows[:0]] * (parts - len(chunks))


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_box_is_fsdp_over_tp_for_any_size(dp: int, tp: int) -> None:
    placements = (Replicate(), _StridedShard(0, split_factor=tp), Shard(0))
    for size in range(1, 23):
        rows = torch.arange(size)
        for i in range(dp):
            for j in range(tp):
                expected = chunks_of(chunks_of(rows, tp)[j], dp)[i]
                sizes, offsets = sizes_and_offsets(
                    "w", (size, 3), placements, mesh_sizes=(2, dp, tp), coordinate=(1, i, j)
                )
                assert sizes == (len(expected), 3)
                if len(expected):
                    assert offsets == (int(expected[0]), 0)


def test_box_of_two_plain_shards_cuts_left_to_right() -> None:
    sizes, offsets = sizes_and_offsets(
        "w", (8, 6), (Shard(0), Shard(0)), mesh_sizes=(2, 2), coordinate=(1, 0)
    )
    assert (sizes, offsets) == ((2, 6), (4, 0))
    sizes, offsets = sizes_and_offsets(
        "w", (8, 6), (Shard(1), Shard(0)), mesh_sizes=(3, 2), coordinate=(2, 1)
    )
    assert (sizes, offsets) == ((4, 2), (4, 4))


def test_box_refuses_what_it_does_not_understand() -> None:
    with pytest.raises(ValueError, match=r"w: placement Partial.*cannot be saved"):
        sizes_and_offsets("w", (8,), (Partial(),), mesh_sizes=(2,), coordinate=(0,))
    with pytest.raises(ValueError, match="split_factor=2"):
        sizes_and_offsets(
            "w",
            (8,),
            (_StridedShard(0, split_factor=4), Shard(0)),
            mesh_sizes=(2, 2),
            coordinate=(0, 0),
        )
