"""Sums that are the same in every order, bit for bit.

A number is cut into at most three parts, each a whole multiple of its bin's unit and small enough
that adding up a bin never rounds (the bins of reproducible summation; Demmel and Nguyen, 2013,
"Fast Reproducible Floating-Point Summation", here with fixed bins over all of fp64). So a sum over
ranks does not depend on which rank holds what, nor on the order of the reduction.
"""

import math
from functools import cache

import torch
from torch import Tensor

WIDTH = 28
"""Bits of a bin. A bin's sum is exact up to 2^(53 - WIDTH) numbers, 33 million."""
LOWEST = -1074
"""Exponent of the smallest fp64, the first bin's unit."""
NUM_BINS = -(-(1024 - LOWEST) // WIDTH)


def bins_of(values: Tensor) -> Tensor:
    """Add up numbers without rounding: any shape -> fp64 (NUM_BINS + 1,), on the same device.

    Bins of several sums may be added in any order; `total` tells the number. What is not finite is
    added up in the last place.
    """
    values = values.detach().double().flatten()
    finite = values.isfinite()
    rest = torch.where(finite, values, 0.0)
    units = torch.tensor(_units(), dtype=torch.float64, device=values.device)
    _, exponent = torch.frexp(rest)
    number = (exponent.long() - 1 - LOWEST).div(WIDTH, rounding_mode="floor").clamp_min(0)
    bins = torch.zeros(NUM_BINS + 1, dtype=torch.float64, device=values.device)
    for below in range(3):
        place = (number - below).clamp_min(0)
        unit = units[place]
        part = (rest / unit).trunc() * unit
        bins.index_add_(0, place, part)
        rest = rest - part
    bins[-1] = torch.where(finite, 0.0, values).sum()
    return bins


def total(bins: Tensor) -> float:
    """The sum of all numbers that went into bins, rounded once; waits for the device."""
    *finite, other = bins.tolist()
    if other != 0.0:
        return float(other)
    try:
        return math.fsum(finite)
    except OverflowError:
        return math.copysign(math.inf, next(x for x in reversed(finite) if x != 0.0))


@cache
def _units() -> tuple[float, ...]:
    return tuple(math.ldexp(1.0, LOWEST + WIDTH * number) for number in range(NUM_BINS))
