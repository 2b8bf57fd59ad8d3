"""What is said of an error that several ranks had."""

from dataclasses import replace
from typing import Any

import pytest

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.peers import Peers


class Alike(Peers):
    """Three ranks that have the same to say, but for the last one's `text`."""

    def __init__(self, text: str | None = None) -> None:
        super().__init__(None)
        self.text = text

    def gather(self, value: Any) -> list[Any]:
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
