"""Which units of which stripes a checkpoint's files hold; see placement.Stripes."""

from dataclasses import dataclass
from functools import cached_property

from phalanx.checkpoint.erasure.stripes import Stripes
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.stored import StoredParity, StoredPart

File = StoredPart | StoredParity
Unit = tuple[int, int]
"""Stripe, and number in it: data first, then parity."""


@dataclass(frozen=True)
class Group:
    """Members that protect each other, and where in their files the units lie."""

    members: tuple[int, ...]
    parts: tuple[tuple[StoredPart, ...], ...]
    """By place in the group; a member's data are these parts' boxes, back to back."""
    parity: tuple[StoredParity | None, ...]
    """By place in the group."""
    num_parity: int

    @staticmethod
    def all_of(manifest: Manifest) -> "list[Group]":
        """The groups of a checkpoint; none where it has no parity."""
        if not manifest.num_parity or not manifest.parity:
            return []
        parity = {file.member: file for file in manifest.parity}
        return [
            Group(
                members=group,
                parts=tuple(
                    tuple(part for part in manifest.parts if part.member == member)
                    for member in group
                ),
                parity=tuple(parity.get(member) for member in group),
                num_parity=manifest.num_parity,
            )
            for group in manifest.groups
        ]

    @cached_property
    def lengths(self) -> list[int]:
        """Bytes of data, by place."""
        return [sum(part.table.nbytes for part in parts) for parts in self.parts]

    @cached_property
    def stripes(self) -> Stripes:
        """Where units lie."""
        return Stripes.for_lengths(self.lengths, self.num_parity)

    def units_of(self, file: File) -> set[Unit]:
        """Units that a file holds any of."""
        stripes, place = self.stripes, self.members.index(file.member)
        if isinstance(file, StoredParity):
            return {
                (stripes.stripe_of_parity(place, unit), stripes.k + unit)
                for unit in range(stripes.m)
            }
        begin, end = self.range_of(file)
        if begin == end:
            return set()
        return {
            (stripes.stripe_of_data(place, unit), unit)
            for unit in range(begin // stripes.unit_bytes, (end - 1) // stripes.unit_bytes + 1)
        }

    def range_of(self, file: StoredPart) -> tuple[int, int]:
        """First byte of a part in its member's data, and the byte behind it."""
        begin = 0
        for part in self.parts[self.members.index(file.member)]:
            if part.file == file.file:
                return begin, begin + part.table.nbytes
            begin += part.table.nbytes
        raise AssertionError(file.file)

    def missing_parity(self) -> set[Unit]:
        """Units of parity that no file of the manifest holds."""
        stripes = self.stripes
        return {
            (stripes.stripe_of_parity(place, unit), stripes.k + unit)
            for place, file in enumerate(self.parity)
            if file is None
            for unit in range(stripes.m)
        }
