"""Few runs that still show every pair of options together."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain, combinations, product
from typing import Any


def pairwise(
    options: Mapping[str, Sequence[Hashable]],
    *,
    allowed: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> list[dict[str, Any]]:
    """Rows of one value for each option: every two values of two options stand together in at least
    one row, except those that stand together in no row that is `allowed`.

    Greedy: each row is the one with the most pairs that no row before has, and of equals the first;
    so name an option's cheapest value first.
    """
    rows = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    rows = [row for row in rows if allowed(row)]
    pairs = [set(combinations(row.items(), 2)) for row in rows]
    missing = set(chain.from_iterable(pairs))
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda number: len(pairs[number] & missing))
        chosen.append(rows[best])
        missing -= pairs[best]
    return chosen
