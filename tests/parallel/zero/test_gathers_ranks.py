"""What was gathered ahead may be given up before its use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.partition import Extent, Partition
from phalanx.parallel.zero.unit import Unit
from tests.parallel.zero.layouts import Case, at, case

NODE, ALL = Extent.node, Extent.all


def is_whole(unit: Unit) -> bool:
    """Whether modules hold what the masters make together; collective."""
    found = []
    for param in unit.params:
        assert isinstance(param.sharded, DTensor)
        assert param.whole is not None
        there = param.whole.untyped_storage().nbytes() > 0
        found.append(there and torch.equal(param.whole, param.sharded.detach().full_tensor()))
    return all(found)


def given_up(ranks: Ranks, one: Case) -> list[bool]:
    """Whether a unit is whole after it was begun ahead, given up, and asked for."""
    found = []
    with process_group(ranks):
        first, second, *_ = one.engine(ranks).model.shardings[0].units
        for _ in range(2):
            second.gathered.start()
            first.gathered.finish()  # on its way, the other one may come through
            second.gathered.free()
            second.gathered.finish()
            found.append(is_whole(second))
            first.gathered.free()
            second.gathered.free()

            second.gathered.start()
            second.gathered.forget()
            with torch.no_grad():
                for param in second.params:
                    param.local.mul_(2.0)
            second.gathered.finish()
            found.append(is_whole(second))
            for unit in (first, second):
                unit.gathered.forget()
    return found


@pytest.mark.parametrize("params", [ALL, NODE], ids=str)
def test_what_was_begun_may_be_given_up(
    run_ranks: Callable[..., list[Any]], params: Extent
) -> None:
    """As a prefetched block's is whose output needs no gradient."""
    one = case(at(Partition(params, ALL, ALL)), dp_shard=4)
    for found in run_ranks(given_up, one, world_size=4):
        assert found == [True] * 4
