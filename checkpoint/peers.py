"""What ranks tell each other about a checkpoint: a failure on one is known to all."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phalanx.checkpoint.errors import CheckpointError
from phalanx.parallel.deliberate import is_deliberate

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Blame:
    """An error on one rank."""

    rank: int | None
    """None = the text says who."""
    text: str
    defect: bool


class Peers:
    """The ranks that save and load together; without a group, one process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def say(self, text: str) -> None:
        """Tell the person at the terminal, once."""
        if self.rank == 0:
            print(f"phalanx: {text}", file=sys.stderr, flush=True)

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all results, or fail on every rank alike.

        Raises:
            CheckpointError: `action` raised on some rank; says which, and what.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        answers = self.all_gather((result, None if error is None else self._blame(error)))
        blames = [blame for _, blame in answers if blame is not None]
        if blames:
            text = f"{what}: {'; '.join(_sentences(blames))}"
            raise CheckpointError(text, defect=any(blame.defect for blame in blames)) from error
        return [answer for answer, _ in answers]  # type: ignore[misc]

    def all_reduce(
        self, what: str, action: Callable[[], Sequence[int] | None], *, count: int = 0
    ) -> list[int]:
        """Run `action` on every rank and return the sums of its `count` numbers, or fail on every
        rank alike, as `agree`. One all-reduce, unless there are errors to be told.

        Raises:
            CheckpointError: `action` raised on some rank; says which, and what.
        """
        numbers = [0] * count
        error: Exception | None = None
        try:
            found = list(action() or ())
            assert len(found) == count, f"{len(found)} numbers, not {count}"
            numbers = found
        except Exception as caught:
            error = caught
        sums = torch.tensor([*numbers, error is not None], dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(sums, group=self.group)
        *numbers, failed = sums.tolist()
        if failed:

            def raise_mine() -> None:
                if error is not None:
                    raise error

            self.agree(what, raise_mine)
            raise CheckpointError(f"{what}: a rank failed without saying why")
        return numbers

    def _blame(self, error: Exception) -> _Blame:
        if isinstance(error, CheckpointError):  # every rank knows, and the text says who
            return _Blame(rank=None, text=str(error), defect=error.defect)
        deliberate = is_deliberate(error)
        kind = "" if deliberate and isinstance(error, ValueError) else f"{type(error).__name__}: "
        defect = not deliberate and not isinstance(error, OSError)
        return _Blame(rank=self.rank, text=f"{kind}{error}", defect=defect)


def _sentences(blames: Iterable[_Blame]) -> list[str]:
    """What to say of all errors: each text once, with the ranks that it is of."""
    ranks: dict[str, list[str]] = {}
    for blame in blames:
        of = ranks.setdefault(blame.text, [])
        of += [] if blame.rank is None else [str(blame.rank)]
    return [
        f"rank{'s' * (len(of) > 1)} {', '.join(of)}: {text}" if of else text
        for text, of in ranks.items()
    ]
