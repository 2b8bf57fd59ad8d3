"""Sums in bins: exact, the same in every order, and honest about what is not finite."""

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from phalanx.parallel.exact_sum import bins_of, total


def numbers(seed: int) -> Tensor:
    """Numbers that a plain sum rounds; every third time over all exponents of fp64."""
    rng = random.Random(seed)
    lowest, highest = (-1074, 1000) if seed % 3 == 0 else (-40, 10)
    values = [
        rng.uniform(-1, 1) * 2.0 ** rng.randint(lowest, highest)
        for _ in range(rng.choice([0, 1, 3, 100]))
    ]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(30))
def test_is_exact_and_of_any_order(seed: int) -> None:
    values = numbers(seed)
    bins = bins_of(values)
    assert sum(map(Fraction, bins.tolist())) == sum(map(Fraction, values.tolist()))
    assert total(bins) == math.fsum(values.tolist())
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    half = len(values) // 2
    parts = bins_of(values[order[:half]]) + bins_of(values[order[half:]])
    assert torch.equal(parts, bins)


def test_what_a_plain_sum_rounds_away_is_kept() -> None:
    values = torch.tensor([1e16, 1.0, 1.0], dtype=torch.float64)
    assert float((values[0] + values[1]) + values[2]) == 1e16
    assert total(bins_of(values)) == 1e16 + 2


def test_what_is_not_finite_shows() -> None:
    inf, nan = float("inf"), float("nan")
    largest = torch.finfo(torch.float64).max
    assert total(bins_of(torch.tensor([1.0, inf]))) == inf
    assert total(bins_of(torch.tensor([1.0, -inf]))) == -inf
    assert math.isnan(total(bins_of(torch.tensor([inf, -inf]))))
    assert math.isnan(total(bins_of(torch.tensor([nan, 1.0]))))
    assert total(bins_of(torch.tensor([largest, largest], dtype=torch.float64))) == inf
    assert total(bins_of(torch.tensor([largest], dtype=torch.float64))) == largest


def test_takes_scalars_and_other_formats() -> None:
    assert total(bins_of(torch.tensor(True))) == 1
    assert total(bins_of(torch.tensor(0.5, dtype=torch.bfloat16))) == 0.5
    assert total(bins_of(torch.arange(6).reshape(2, 3))) == 15
