"""Sums that each pipeline rank knows up to itself, and the whole that all learn later."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.pipeline.prefix import PrefixSums
from phalanx.parallel.ranks import Ranks, process_group

LAYOUTS: list[dict[str, int]] = [
    {"pp": 4},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2},
    {"pp": 2, "dp_replicate": 2},
]
STEPS = 3
TENTH = 0.1


def sums(ranks: Ranks) -> list[tuple[int, list[list[float]], list[list[float]]]]:
    """By layout: place in the pipeline; each step's prefix and whole of (step + rank, 10^rank)."""
    found = []
    with process_group(ranks):
        for layout in LAYOUTS:
            degrees = ParallelConfig(**{"dp_shard": 1, **layout})
            mesh = build_mesh(degrees, world_size=ranks.world_size, device_type="cpu")
            chain = PrefixSums(mesh, timeout=timedelta(seconds=60))
            prefixes, wholes = [], []
            for step in range(STEPS):
                many = torch.tensor([10**ranks.rank, TENTH, 1e16, -1e16], dtype=torch.float64)
                prefixes.append(chain.prefix([float(step + ranks.rank), many]))
                wholes.append(chain.whole())
            assert chain.is_last == (mesh.rank("pp") == mesh.size("pp") - 1)
            found.append((mesh.rank("pp"), prefixes, wholes))
    return found


def test_prefix_and_whole(run_ranks: Callable[..., list[Any]]) -> None:
    everyone = run_ranks(sums, world_size=4)
    for i, layout in enumerate(LAYOUTS):
        a_stage = 4 // layout["pp"]
        for place, prefixes, wholes in (rank[i] for rank in everyone):
            upto = range((place + 1) * a_stage)
            for step in range(STEPS):
                assert prefixes[step] == [
                    sum(step + rank for rank in upto),
                    math.fsum([*(10**rank for rank in upto), *(TENTH for _ in upto)]),
                ], (layout, place)
                assert wholes[step] == [4 * step + 6, math.fsum([1111, 4 * TENTH])]


def not_finite(ranks: Ranks) -> tuple[list[float], list[float]]:
    with process_group(ranks):
        mesh = build_mesh(ParallelConfig(pp=3, dp_shard=1), world_size=3, device_type="cpu")
        chain = PrefixSums(mesh, timeout=timedelta(seconds=60))
        value = float("inf") if ranks.rank == 1 else 1.0
        return chain.prefix([value]), chain.whole()


def test_infinities_travel(run_ranks: Callable[..., list[Any]]) -> None:
    first, second, third = run_ranks(not_finite, world_size=3)
    assert first == ([1.0], [float("inf")])
    assert second == third == ([float("inf")], [float("inf")])


def pipelines_made(ranks: Ranks) -> list[list[int]]:
    """Groups of pipeline ranks that this rank takes part in making."""
    made = []
    helper = distributed_c10d._new_process_group_helper

    def noted(size: int, rank: int, members: list[int], *args: Any, **kwargs: Any) -> Any:
        made.append(members)
        return helper(size, rank, members, *args, **kwargs)

    with process_group(ranks), pytest.MonkeyPatch.context() as patch:
        degrees = ParallelConfig(pp=2, dp_shard=2)
        mesh = build_mesh(degrees, world_size=ranks.world_size, device_type="cpu")
        patch.setattr(distributed_c10d, "_new_process_group_helper", noted)
        PrefixSums(mesh, timeout=timedelta(seconds=60))
    return [members for members in made if members in ([0, 2], [1, 3])]


def test_only_its_own_ranks_make_a_gloo_group(run_ranks: Callable[..., list[Any]]) -> None:
    """Others would split NCCL's communicator meanwhile, and wait forever for the group's ranks."""
    everyone = run_ranks(pipelines_made, world_size=4)
    assert everyone == [[[0, 2]], [[1, 3]], [[0, 2]], [[1, 3]]]
