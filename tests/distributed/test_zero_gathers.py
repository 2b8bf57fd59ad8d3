"""Whole parameters come and go in any order of asking for them, freeing and forgetting."""

from collections.abc import Callable
from typing import Any

import torch

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.partition import Extent, Partition
from tests.zero import Case, at, case

ALL = Extent.all


def begun_ahead(ranks: Ranks, one: Case) -> list[bool]:
    """Whether the second unit's parameters are right after it was begun ahead and not used."""
    with process_group(ranks):
        engine = one.engine(ranks)
        units = engine.model.shardings[0].units
        first, second = units[0].gathered, units[1].gathered
        masters = [p.sharded for p in units[1].params]
        for param in units[1].params:
            param.find()
        masters = [p.sharded.full_tensor() for p in units[1].params]  # type: ignore[attr-defined]
        found = []
        for given_up in (second.free, second.forget):
            second.start()
            first.finish()  # on its way, the other's memory is filled
            first.free()
            given_up()
            second.finish()
            wholes = [p.whole for p in units[1].params]
            found += [whole is not None and whole.numel() > 0 for whole in wholes]
            found += [
                torch.equal(whole, master)  # type: ignore[arg-type]
                for whole, master in zip(wholes, masters, strict=True)
            ]
            second.free()
        return found


def test_what_was_begun_ahead_may_be_given_up(run_ranks: Callable[..., list[Any]]) -> None:
    one = case(at(Partition(ALL, ALL, ALL)), dp_shard=2, num_layers=2)
    for found in run_ranks(begun_ahead, one, world_size=2):
        assert all(found)
