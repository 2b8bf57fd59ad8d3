"""Code books of low-bit optimizer states: the values that a code stands for, between -1 and 1.

Dynamic tree codes (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section
2.2) spend their values on many decades: each decade towards 1 has twice as many, evenly spread.
Second moments of 4 bits take a linear code without zero (Li et al., Memory Efficient Optimizers
with 4-bit States, 2023, section 4.1): a second moment that is rounded to zero makes the step
m / (sqrt(v) + eps) explode.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def dynamic_codes(*, bits: int, signed: bool) -> list[float]:
    """Values of a dynamic tree code in ascending order, 2**bits of them.

    0 and 1 are among them, -1 is not. For each of bits - 1 decades up to 1, the middles of equal
    parts of (0.1, 1): 2**i on each side of zero for decade i, or 2**(i + 1) where all is positive.
    """
    decades = bits - 1
    values = [0.0, 1.0]
    for i in range(decades):
        parts = 2**i if signed else 2 ** (i + 1)
        for part in range(parts):
            value = 10.0 ** (i - decades + 1) * (0.1 + 0.9 * (part + 0.5) / parts)
            values += [value, -value] if signed else [value]
    return sorted(values)


def linear_codes(*, bits: int) -> list[float]:
    """Evenly spaced values from 1 / 2**bits to 1, without zero."""
    return [(i + 1) / 2**bits for i in range(2**bits)]


class CodeBook:
    """Rounding to the nearest of some ascending values, and back, by table.

    A table over the upper 16 bits of fp32 gives a code that is right or one too low, which one
    comparison settles: on a CPU 20 times as fast as a binary search.
    """

    def __init__(self, values: Sequence[float], *, keep_positive: bool = False) -> None:
        """`keep_positive`: a value above 0 is never rounded to 0, but up to the next code.

        Raises:
            ValueError: values that the table cannot tell apart, or that do not ascend.
        """
        self.values = torch.tensor(values, dtype=torch.float32)
        """(codes,), fp32."""
        middles = (self.values[1:] + self.values[:-1]) / 2
        if keep_positive:
            middles[self.values[:-1] == 0] = 0.0
        if not (self.values[1:] > self.values[:-1]).all():
            raise ValueError("a code book's values must ascend")
        low, high = _bucket_ends()
        first = torch.bucketize(low, middles)
        if (torch.bucketize(high, middles) - first > 1).any():
            raise ValueError("a code book's values are too close for its table")
        self.middles = torch.cat((middles, torch.tensor([torch.inf])))
        """(codes,), fp32: a value above middles[c] has a higher code than c."""
        self._first = first.int()
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """On `device`: first code by upper bits (65536,) int32, `middles`, `values`."""
        if device not in self._tables:
            parts = (self._first, self.middles, self.values)
            first, middles, values = (part.to(device) for part in parts)
            self._tables[device] = (first, middles, values)
        return self._tables[device]

    def encode(self, values: Tensor, codes: Tensor, *, integers: Tensor, floats: Tensor) -> None:
        """Write the nearest codes to `codes`, of two equally near ones the lower.

        All 1-d of one length: values fp32, codes int32; integers (int32) and floats (fp32) are
        scratch. NaN gives any code, or one past the last.
        """
        first, middles, _ = self.tables(values.device)
        torch.bitwise_right_shift(values.view(torch.int32), 16, out=integers)
        torch.index_select(first, 0, integers.add_(2**15), out=codes)
        torch.index_select(middles, 0, codes, out=floats)
        # -1 where the value lies above the middle: the difference's sign bit, spread.
        floats.sub_(values)
        codes.sub_(torch.bitwise_right_shift(floats.view(torch.int32), 31, out=integers))


def _bucket_ends() -> tuple[Tensor, Tensor]:
    """Smallest and largest fp32 with the same upper 16 bits, in the order of those as int16.

    Infinities and what is not a number count as the largest of their sign.
    """
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    ends = torch.stack((upper << 16, (upper << 16) | 0xFFFF)).view(torch.float32)
    largest = torch.full_like(ends, torch.inf).copysign(ends)
    ends = torch.where(ends.isnan(), largest, ends)
    return ends.amin(0), ends.amax(0)


@cache
def code_books(bits: int) -> tuple[CodeBook, CodeBook]:
    """Of the first and of the second moment, 8 or 4 bits.

    The code of 8-bit second moments has a zero, which only zero is rounded to. Made when first
    asked for, never on import: their tables start torch's threads, and what is forked from a
    process that has threads hangs in its first parallel operator.
    """
    if bits == 8:
        unsigned = dynamic_codes(bits=8, signed=False)
        return CodeBook(dynamic_codes(bits=8, signed=True)), CodeBook(unsigned, keep_positive=True)
    return CodeBook(dynamic_codes(bits=4, signed=True)), CodeBook(linear_codes(bits=4))
