"""Which nodes protect each other, and where in a group each unit of data and parity lies.

Groups are laid across failure domains; in a group, stripes turn round so that every node carries
as much parity as every other (REFT's RAIM5, for any number of parities). Torch-free.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

ALIGN = 64
"""Units begin at multiples of this many bytes."""


def make_groups(
    racks: Sequence[str], *, parity: int, group_size: int
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Divide nodes into groups that protect each other: their numbers by group, and warnings.

    Groups are as large as group_size allows, of nearly equal size. A group has at most `parity`
    nodes of a rack, so that a rack may be lost whole; where that takes smaller groups, they are
    smaller, and where nothing helps, a warning names the rack. Every node that knows the racks
    finds the same groups.

    Args:
        racks: by node, the label of what it shares its fate with; "" = it shares with nobody.
        parity: nodes of a group that may be lost; 0 = every node for itself.
        group_size: most nodes of a group.

    Raises:
        ValueError: no such groups can be made of so many nodes.
    """
    num_nodes = len(racks)
    if not parity:
        return [(node,) for node in range(num_nodes)], []
    fewest, most = -(-num_nodes // group_size), num_nodes // (parity + 1)
    if fewest > most:
        raise ValueError(_impossible(num_nodes, parity, group_size))
    by_rack = {rack: count for rack, count in sorted(Counter(racks).items()) if rack}

    def crowded(num_groups: int) -> list[str]:
        return [rack for rack, count in by_rack.items() if count > parity * num_groups]

    num_groups = min(range(fewest, most + 1), key=lambda number: (len(crowded(number)), number))
    # Dealt like cards, rack by rack: of c nodes of a rack, no group gets more than c / groups,
    # rounded up, and sizes differ by one at most.
    order = sorted(range(num_nodes), key=lambda node: (racks[node], node))
    groups = sorted(
        tuple(sorted(islice(order, first, None, num_groups))) for first in range(num_groups)
    )
    return groups, [_crowded_warning(rack, groups, racks, parity) for rack in crowded(num_groups)]


def _impossible(num_nodes: int, parity: int, group_size: int) -> str:
    if num_nodes <= parity:
        advice = f"take launch.nodes={parity + 1} or more, or less parity"
    else:
        advice = f"take another number of nodes, less parity, or a larger group_size ({num_nodes})"
    return (
        f"checkpoint.snapshot.parity: {parity} parities need groups of at least {parity + 1} "
        f"nodes, of at most checkpoint.snapshot.group_size={group_size}; launch.nodes={num_nodes} "
        f"cannot be divided so: {advice}"
    )


def _crowded_warning(
    rack: str, groups: Iterable[tuple[int, ...]], racks: Sequence[str], parity: int
) -> str:
    shared = max(([node for node in group if racks[node] == rack] for group in groups), key=len)
    return (
        f"rack {rack} holds {len(shared)} nodes of one group ({', '.join(map(str, shared))}), of "
        f"which checkpoint.snapshot.parity lets {parity} be lost: losing the rack loses the "
        "snapshots in memory; use more racks or more parity"
    )


@dataclass(frozen=True)
class Stripes:
    """The units of one group of n members, each of which holds k = n - m of data and m of parity.

    There are n stripes, each of k units of data and m of parity, one of every member. In stripe s,
    member x has role (x - s) mod n: a role below m is the parity of that number, the others are
    data, from role m on. Member x's data unit j is bytes [j * unit, (j + 1) * unit) of its data, as
    far as they go; what lacks counts as zeros. Its parity unit p lies at p * unit of its m * unit
    bytes of parity.
    """

    n: int
    """Members."""
    m: int
    """Units of parity in a stripe; any so many members may be lost."""
    unit_bytes: int
    """Of each unit; 0 where m is 0."""

    @classmethod
    def for_lengths(cls, lengths: Sequence[int], m: int) -> "Stripes":
        """For members whose data have these lengths: units as short as the longest allows.

        They are odd multiples of 64 bytes: units that lie one behind another never begin at the
        same place in a page, and so do not drive each other out of caches that go by it. Parities
        in storage lie as this says: it may not change.
        """
        n = len(lengths)
        assert 0 <= m < n, f"{m} parities in a group of {n}"
        if not m:
            return cls(n, 0, 0)
        needed = -(-max(lengths) // (n - m) // ALIGN)
        return cls(n, m, (needed | 1) * ALIGN if needed else 0)

    @property
    def k(self) -> int:
        """Units of data in a stripe."""
        return self.n - self.m

    @property
    def parity_bytes(self) -> int:
        """Of a member's parity."""
        return self.m * self.unit_bytes

    def data_members(self, stripe: int) -> tuple[int, ...]:
        """Who holds the stripe's data, by data index."""
        return tuple((stripe + role) % self.n for role in range(self.m, self.n))

    def parity_members(self, stripe: int) -> tuple[int, ...]:
        """Who holds the stripe's parities, by number."""
        return tuple((stripe + role) % self.n for role in range(self.m))

    def stripe_of_data(self, member: int, unit: int) -> int:
        """The stripe in which the member's data unit has data index `unit`."""
        assert 0 <= unit < self.k
        return (member - self.m - unit) % self.n

    def stripe_of_parity(self, member: int, unit: int) -> int:
        """The stripe whose parity of number `unit` the member holds."""
        assert 0 <= unit < self.m
        return (member - unit) % self.n

    def data_range(self, unit: int, length: int) -> tuple[int, int]:
        """First byte of a data unit, and the byte behind it, in data of `length` bytes."""
        begin = unit * self.unit_bytes
        return min(begin, length), min(begin + self.unit_bytes, length)
