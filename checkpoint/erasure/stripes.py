"""Where in a group of nodes each unit of data and parity lies.

Stripes turn round so that every node carries as much parity as every other (REFT's RAIM5, for any
number of parities). Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 64
"""Units begin at multiples of this many bytes."""


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
