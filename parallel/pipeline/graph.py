"""A pipeline schedule as data: what each rank does, in order.

Stages are numbered in the order of the model's layers; `placement` says which rank holds each. A
schedule says nothing of time: `simulate.py` does, for given costs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Kind(StrEnum):
    """What an operation computes (Qi et al., Zero Bubble Pipeline Parallelism, section 2)."""

    F = "F"
    """Forward."""
    B = "B"
    """Gradient of the input; the stage before waits for it."""
    W = "W"
    """Gradient of the weights; nobody waits for it."""
    BW = "BW"
    """Both in one, a plain backward: the stage before waits for the whole."""


_OP = re.compile(r"(\d+)(F|BW|B|W)(\d+)")


class Op(NamedTuple):
    """One operation, written like 3B7: stage 3, input gradient, microbatch 7."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Op":
        """Read one operation.

        Raises:
            ValueError: the text is not one.
        """
        found = _OP.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r} is no operation; write stage, kind (F, B, W or BW) and microbatch, "
                "like 3B7"
            )
        return cls(int(found[1]), Kind(found[2]), int(found[3]))


def loop_placement(num_ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Stages dealt out round robin: rank r holds r, r + p, r + 2p, ..."""
    return tuple(stage % num_ranks for stage in range(num_ranks * chunks))


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank, down and up again: rank r holds r and 2p - 1 - r."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


@dataclass(frozen=True)
class Schedule:
    """Orders of operations, one a rank."""

    name: str
    placement: tuple[int, ...]
    """Rank of each stage."""
    num_microbatches: int
    orders: tuple[tuple[Op, ...], ...]
    """By rank."""

    @classmethod
    def of(
        cls,
        name: str,
        placement: Iterable[int],
        num_microbatches: int,
        orders: Iterable[Iterable[Op]],
    ) -> "Schedule":
        """A schedule of any iterables."""
        return cls(name, tuple(placement), num_microbatches, tuple(tuple(o) for o in orders))

    @property
    def num_stages(self) -> int:
        """Stages of the whole model."""
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.orders)

    @property
    def chunks(self) -> int:
        """Most stages that a rank holds."""
        return max(len(self.stages_of(rank)) for rank in range(self.num_ranks))

    @property
    def splits_backward(self) -> bool:
        """Whether some weight gradient comes apart from its input gradient."""
        return any(op.kind is Kind.W for order in self.orders for op in order)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages that a rank holds, in the model's order."""
        return self._stages[rank]

    def chunk(self, stage: int) -> int:
        """A stage's place among those of its rank."""
        return self._stages[self.placement[stage]].index(stage)

    @cached_property
    def _stages(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)
            for rank in range(self.num_ranks)
        )
