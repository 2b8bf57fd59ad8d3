"""Where units of data and parity lie in a group."""

import itertools

import numpy as np
import pytest

from phalanx.checkpoint.erasure.codec import Codec
from phalanx.checkpoint.erasure.stripes import Stripes


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (6, 2), (8, 2), (14, 4)])
def test_every_member_has_one_unit_of_every_stripe(n: int, m: int) -> None:
    stripes = Stripes.for_lengths([1000] * n, m)
    for stripe in range(n):
        members = stripes.data_members(stripe) + stripes.parity_members(stripe)
        assert sorted(members) == list(range(n))
        for index, member in enumerate(stripes.data_members(stripe)):
            assert stripes.stripe_of_data(member, index) == stripe
        for number, member in enumerate(stripes.parity_members(stripe)):
            assert stripes.stripe_of_parity(member, number) == stripe
    for member in range(n):
        of_data = [stripes.stripe_of_data(member, unit) for unit in range(stripes.k)]
        of_parity = [stripes.stripe_of_parity(member, unit) for unit in range(m)]
        assert sorted(of_data + of_parity) == list(range(n))


@pytest.mark.parametrize("lengths", [[1000, 999, 0], [1, 0, 0], [0, 0, 0], [64, 64, 64], [129] * 3])
def test_units_cover_the_data(lengths: list[int]) -> None:
    stripes = Stripes.for_lengths(lengths, 1)
    assert stripes.unit_bytes * stripes.k >= max(lengths)
    assert (stripes.unit_bytes - 128) * stripes.k < max(lengths) or not max(lengths)
    assert stripes.parity_bytes == stripes.unit_bytes
    for length in lengths:
        ranges = [stripes.data_range(unit, length) for unit in range(stripes.k)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert all(end - begin <= stripes.unit_bytes for begin, end in ranges)


@pytest.mark.parametrize(
    ("longest", "unit"), [(0, 0), (1, 64), (128, 64), (129, 192), (384, 192), (10**9, 500_000_064)]
)
def test_units_are_as_long_in_every_version(longest: int, unit: int) -> None:
    """Parities in storage lie so; and units one behind another begin all over a page."""
    stripes = Stripes.for_lengths([longest, 0, 0], 1)
    assert stripes.unit_bytes == unit
    if unit:
        assert len({turn * unit % 4096 for turn in range(64)}) == 64


def test_without_parity_there_are_no_units() -> None:
    stripes = Stripes.for_lengths([1000], 0)
    assert (stripes.n, stripes.m, stripes.unit_bytes, stripes.parity_bytes) == (1, 0, 0, 0)


@pytest.mark.parametrize(("n", "m"), [(3, 1), (6, 2), (8, 2)])
def test_a_group_outlives_any_m_of_its_members(n: int, m: int) -> None:
    """All of it together: members of unequal sizes, parities made stripe by stripe, members lost,
    their data and parities made again."""
    rng = np.random.default_rng(n)
    data = [rng.integers(0, 256, int(size), np.uint8) for size in rng.integers(500, 3000, n)]
    stripes = Stripes.for_lengths([len(part) for part in data], m)
    unit, codec = stripes.unit_bytes, Codec(stripes.k, m)
    parities = [np.zeros(stripes.parity_bytes, np.uint8) for _ in range(n)]

    def units_of(stripe: int) -> dict[int, tuple[int, np.ndarray]]:
        """Member and bytes, by unit."""
        found = {}
        for index, member in enumerate(stripes.data_members(stripe)):
            begin, end = stripes.data_range(index, len(data[member]))
            padded = np.zeros(unit, np.uint8)
            padded[: end - begin] = data[member][begin:end]
            found[index] = (member, padded)
        for number, member in enumerate(stripes.parity_members(stripe)):
            row = parities[member][number * unit : (number + 1) * unit]
            found[stripes.k + number] = (member, row)
        return found

    for stripe in range(n):
        rows = [row for _, row in units_of(stripe).values()]
        codec.encode(rows[: stripes.k], rows[stripes.k :])
    for lost in itertools.combinations(range(n), m):
        for stripe in range(n):
            units = units_of(stripe)
            present = {i: row for i, (member, row) in units.items() if member not in lost}
            missing = {i: np.empty(unit, np.uint8) for i in units.keys() - present.keys()}
            codec.rebuild(present, missing)
            assert all(np.array_equal(row, units[i][1]) for i, row in missing.items())
