"""What all holders of an epoch are told: who keeps what, and who protects whom. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.checkpoint.erasure.stripes import Stripes
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.holder.transport import Address, address_of

VERSION = 2
"""Of what holders and their callers say to each other."""
TAKEN = 3
"""Exit code of a holder where there was one already."""


class HolderError(RuntimeError):
    """A holder cannot do what it was asked to; the message says why."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Spec:
    """An epoch, alike on all nodes: the members' ranks, parts and addresses, and their groups."""

    epoch: str
    """Its name."""
    token: str
    """Who has it may push to this epoch and read it."""
    parity: int
    """Members of a group that may be lost."""
    num_slots: int
    """Generations."""
    groups: tuple[tuple[int, ...], ...]
    addresses: tuple[Address | None, ...]
    """By member."""
    ranks: tuple[tuple[int, ...], ...]
    """By member."""
    parts: Sequence[list[list[Any]]] = field(repr=False)
    """By rank, `PartTable.to_json` of its part: read by `table`, when one is asked for. Empty where
    they were left out."""
    _tables: dict[int, PartTable] = field(default_factory=dict, init=False, repr=False)
    _stripes: dict[tuple[int, ...], Stripes] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Spec":
        """The epoch that `to_json` describes.

        Raises:
            HolderError: it makes no sense.
        """
        try:
            nodes = body["nodes"]
            spec = Spec(
                epoch=str(body["epoch"]),
                token=str(body["token"]),
                parity=int(body["parity"]),
                num_slots=int(body["slots"]),
                groups=tuple(tuple(map(int, group)) for group in body["groups"]),
                addresses=tuple(address_of(node["address"]) for node in nodes),
                ranks=tuple(tuple(map(int, node["ranks"])) for node in nodes),
                parts=body["parts"],
            )
            spec._check(len(spec.parts))
        except (KeyError, TypeError, ValueError) as error:
            raise HolderError(f"no epoch: {type(error).__name__}: {error}") from None
        return spec

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "epoch": self.epoch,
            "token": self.token,
            "parity": self.parity,
            "slots": self.num_slots,
            "groups": [list(group) for group in self.groups],
            "nodes": [
                {"address": address, "ranks": list(ranks)}
                for address, ranks in zip(self.addresses, self.ranks, strict=True)
            ],
            "parts": list(self.parts),
        }

    def _check(self, num_ranks: int) -> None:
        members = sorted(member for group in self.groups for member in group)
        if members != list(range(len(self.ranks))):
            raise ValueError(f"groups {self.groups} of {len(self.ranks)} nodes")
        if sorted(rank for ranks in self.ranks for rank in ranks) != list(range(num_ranks)):
            raise ValueError(f"ranks {self.ranks} of {num_ranks} parts")
        if self.num_slots < 2 or not self.token or not self.epoch:
            raise ValueError("two slots or more, an epoch and a token are needed")
        if not all(0 <= self.parity < len(group) for group in self.groups):
            raise ValueError(f"parity {self.parity} in groups {self.groups}")

    def table(self, rank: int) -> PartTable:
        """The rank's part."""
        if rank not in self._tables:
            self._tables[rank] = PartTable.from_json(self.parts[rank])
        return self._tables[rank]

    def tables(self) -> list[PartTable]:
        """The part of every rank."""
        return [self.table(rank) for rank in range(len(self.parts))]

    def group_of(self, member: int) -> tuple[int, ...]:
        """The members that protect each other with this one, itself included."""
        return next(group for group in self.groups if member in group)

    def length(self, member: int) -> int:
        """Bytes of a member's data: its ranks' parts back to back."""
        return sum(self.table(rank).nbytes for rank in self.ranks[member])

    def stripes(self, member: int) -> Stripes:
        """The stripes of the member's group; members count by their place in it."""
        group = self.group_of(member)
        if group not in self._stripes:
            lengths = [self.length(other) for other in group]
            self._stripes[group] = Stripes.for_lengths(lengths, self.parity)
        return self._stripes[group]
