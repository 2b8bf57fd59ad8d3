"""What ranks tell each other: an error that several had, and numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.peers import Peers
from phalanx.parallel.ranks import Ranks, process_group


class Alike(Peers):
    """Three ranks that have the same to say, but for the last one's `text`."""

    def __init__(self, text: str | None = None) -> None:
        super().__init__(None)
        self.text = text

    def all_gather(self, value: Any) -> list[Any]:
        result, blame = value
        rank = blame.rank
        found = [blame if rank is None else replace(blame, rank=number) for number in range(3)]
        if self.text is not None:
            found[2] = replace(found[2], text=self.text)
        return [(result, blame) for blame in found]


def told(peers: Peers, error: Exception) -> str:
    def fail() -> None:
        raise error

    with pytest.raises(CheckpointError) as caught:
        peers.agree("look", fail)
    return str(caught.value)


def test_each_sentence_is_said_once_with_its_ranks() -> None:
    assert told(Alike(), ConnectionError("gone")) == "look: ranks 0, 1, 2: ConnectionError: gone"
    text = told(Alike("full"), ConnectionError("gone"))
    assert text == "look: ranks 0, 1: ConnectionError: gone; rank 2: full"
    assert told(Alike(), CheckpointError("rank 5: full")) == "look: rank 5: full"


def sum_and_fail(ranks: Ranks) -> list[Any]:
    """What `all_reduce` gives, what it says where ranks failed, and how often ranks met for it."""
    calls: list[str] = []
    with process_group(ranks), pytest.MonkeyPatch.context() as patch:
        peers = Peers(dist.new_group(backend="gloo"))
        for name in ("all_reduce", "all_gather_object"):
            function: Callable[..., Any] = getattr(dist, name)

            def counted(*args: Any, do: Any = function, name: str = name, **named: Any) -> Any:
                calls.append(name)
                return do(*args, **named)

            patch.setattr(dist, name, counted)

        def only_first(*failing: int) -> list[int]:
            if ranks.rank in failing:
                raise OSError(f"{ranks.rank} is full")
            return [2**62 if ranks.rank == 0 else 0, ranks.rank]

        found: list[Any] = [peers.all_reduce("add", only_first, count=2), list(calls)]
        with pytest.raises(CheckpointError) as caught:
            peers.all_reduce("add", lambda: only_first(1, 2), count=2)
        found.append(str(caught.value))
        with pytest.raises(
            CheckpointError, match=r"ranks 0, 1, 2: AssertionError: 2 numbers, not 3"
        ):
            peers.all_reduce("add", only_first, count=3)
        calls.clear()
        return [*found, peers.all_reduce("do", lambda: None), list(calls)]


def test_numbers_are_summed_or_all_ranks_fail(run_ranks: Callable[..., list[Any]]) -> None:
    said = "add: rank 1: OSError: 1 is full; rank 2: OSError: 2 is full"
    expected = [[2**62, 3], ["all_reduce"], said, [], ["all_reduce"]]
    assert run_ranks(sum_and_fail, world_size=3) == [expected] * 3


def test_one_process_alone_has_its_own_numbers() -> None:
    assert Peers(None).all_reduce("add", lambda: [5, 7], count=2) == [5, 7]
    with pytest.raises(CheckpointError, match="^add: rank 0: KeyError: 3$"):
        Peers(None).all_reduce("add", lambda: {}[3], count=2)
