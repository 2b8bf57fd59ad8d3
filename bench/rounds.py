"""Sides that take turns, backwards every second round: a machine that slows down slows all."""

import sys
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

import torch

from phalanx.parallel.ranks import Ranks

Name = TypeVar("Name", bound=Hashable)

ROUNDS, STEPS = 5, 4
"""Where bench.rounds and bench.steps are empty."""


def rounds(sides: Iterable[Name], count: int) -> Iterator[list[Name]]:
    """The sides' names in the order of each round."""
    names = list(sides)
    for number in range(count):
        yield names if number % 2 == 0 else names[::-1]


def synchronize(ranks: Ranks) -> None:
    """Wait for the device."""
    if ranks.device_type == "cuda":
        torch.cuda.synchronize()


def tell(ranks: Ranks, bench: str, text: str) -> None:
    """Say how far a benchmark is; rank 0 does."""
    if ranks.rank == 0:
        print(f"phalanx: bench {bench}: {text}", file=sys.stderr, flush=True)
