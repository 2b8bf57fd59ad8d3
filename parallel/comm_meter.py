"""Bytes that this rank sends, by what they are for and by the link that they take.

Counted where messages are handed to the collective layer, so that scales and padding are in them. A
collective is counted as what its best-known algorithm sends, whatever the backend chooses: an
all-gather or an exchange sends each peer its part; a ring all-reduce of n ranks sends its next
neighbour 2 (n - 1) / n of the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(kw_only=True)
class Traffic:
    """Bytes sent by one rank."""

    inside: float = 0
    """To ranks of its own node; a whole number, or NaN where it cannot be counted."""
    between: float = 0
    """To ranks of other nodes; likewise."""

    @property
    def total(self) -> float:
        """Over all links."""
        return self.inside + self.between


class CommMeter:
    """Adds up what one rank sends, by kind."""

    def __init__(self, *, rank: int, ranks_per_node: int) -> None:
        self._node = rank // ranks_per_node
        self._rank = rank
        self._ranks_per_node = ranks_per_node
        self._unseen: set[str] = set()
        self._traffic: dict[str, Traffic] = {}

    def cannot_see(self, kind: str) -> None:
        """Say that not all of this kind can be counted here: it is NaN from now on."""
        self._unseen.add(kind)
        self._traffic[kind] = _uncounted()

    def sent(self, kind: str, to: int, num_bytes: int) -> None:
        """Count `num_bytes` sent to world rank `to`."""
        traffic = self._traffic.setdefault(kind, Traffic())
        if to // self._ranks_per_node == self._node:
            traffic.inside += num_bytes
        else:
            traffic.between += num_bytes

    def exchanged(self, kind: str, ranks: Sequence[int], num_bytes: int) -> None:
        """Count `num_bytes` sent to every other one of the world ranks `ranks`."""
        for rank in ranks:
            if rank != self._rank:
                self.sent(kind, rank, num_bytes)

    def all_reduced(self, kind: str, ranks: Sequence[int], num_bytes: int) -> None:
        """Count a ring all-reduce of `num_bytes` over the world ranks `ranks`."""
        size = len(ranks)
        if size > 1:
            following = ranks[(list(ranks).index(self._rank) + 1) % size]
            self.sent(kind, following, 2 * (size - 1) * num_bytes // size)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What was sent since the last `take`, by kind."""
        return self._traffic

    def take(self) -> dict[str, Traffic]:
        """What was sent since the last call, by kind; counting begins anew."""
        taken = self._traffic
        self._traffic = {kind: _uncounted() for kind in self._unseen}
        return taken


def _uncounted() -> Traffic:
    return Traffic(inside=float("nan"), between=float("nan"))
