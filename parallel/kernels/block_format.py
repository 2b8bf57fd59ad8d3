"""The form of values that travel or are kept quantized: codes in blocks, each with a scale.

A row of elements is its codes, then its scales, both filled up to `ALIGNMENT` bytes. Both backends
(`quantize_torch`, `quantize_triton`) write these bytes. Torch-free.
"""

from dataclasses import dataclass
from enum import Enum

ALIGNMENT = 16
"""Elements that regions of a slice are filled up to, and bytes that codes and scales are."""


class Quantization(Enum):
    """Number formats that values travel in, in blocks that share a scale."""

    none = "none"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


LARGEST = {Quantization.int8: 127.0, Quantization.int4: 7.0, Quantization.fp8: 448.0}
"""Value of the largest code; fp8 is e4m3 without infinities."""
SCALE_BITS = -128
"""Of an fp32: sign, exponent and the first 16 of the 23 bits behind the point."""
LEAST_SCALE = 2.0**-120


@dataclass(frozen=True)
class BlockFormat:
    """Number format of codes, and how many of them share a scale."""

    kind: Quantization
    """int8, int4 or fp8."""
    block: int
    """Elements; even for int4."""

    def __post_init__(self) -> None:
        if self.kind is Quantization.none:
            raise ValueError("kind=none: choose one of int8, int4, fp8")
        if self.block < 1 or (self.kind is Quantization.int4 and self.block % 2):
            raise ValueError(f"block={self.block}: needs a positive number, for int4 an even one")

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of `numel` elements, before they are filled up."""
        return numel // 2 if self.kind is Quantization.int4 else numel

    def scales_at(self, numel: int) -> int:
        """Byte of a row of `numel` elements at which its scales begin."""
        return up(self.code_bytes(numel), ALIGNMENT)

    def row_bytes(self, numel: int) -> int:
        """Bytes of a row of `numel` elements.

        Raises:
            ValueError: `numel` is no multiple of `block`.
        """
        if numel % self.block:
            raise ValueError(f"{numel} elements: no multiple of block={self.block}")
        return self.scales_at(numel) + up(4 * (numel // self.block), ALIGNMENT)


def up(number: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-number // multiple) * multiple
