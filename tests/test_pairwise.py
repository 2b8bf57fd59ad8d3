"""Covering arrays have every pair that is allowed, in far fewer rows than there are."""

from itertools import combinations, product
from typing import Any

import pytest

from tests.pairwise import pairwise

OPTIONS = {"letter": "abcde", "digit": (1, 2, 3, 4), "first": (False, True), "last": (False, True)}


def no_long_words(row: dict[str, Any]) -> bool:
    return not (row["letter"] == "e" and row["digit"] > 2)


@pytest.mark.parametrize("allowed", [lambda row: True, no_long_words])
def test_every_allowed_pair_stands_in_a_row(allowed: Any) -> None:
    rows = pairwise(OPTIONS, allowed=allowed)
    assert all(map(allowed, rows))
    for (one, ones), (other, others) in combinations(OPTIONS.items(), 2):
        for pair in product(ones, others):
            possible = allowed({"letter": "a", "digit": 1, one: pair[0], other: pair[1]})
            found = any((row[one], row[other]) == pair for row in rows)
            assert found == possible, f"{one}, {other}: {pair}"
    assert len(rows) <= 5 * 4


def test_the_first_of_equals_is_taken() -> None:
    """What covers nothing new is as cheap as its place says."""
    rows = pairwise({"number": range(6), "letter": "abc", "dear": (False, True)})
    assert len(rows) == 6 * 3
    assert sum(row["dear"] for row in rows) == 6
