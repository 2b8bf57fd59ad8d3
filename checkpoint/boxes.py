"""What a rank keeps of a tensor: a box, in global coordinates. Torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element by type, in safetensors' names."""


@dataclass(frozen=True)
class Box:
    """A box of a tensor, in global coordinates."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.sizes)

    def overlap(self, other: "Box") -> "Box | None":
        """What both hold; None where that is nothing."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = (
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        if any(size <= 0 for size in sizes):
            return None
        return Box(begins, sizes)

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies in an array that holds `outer`."""
        return tuple(
            slice(begin - start, begin - start + size)
            for begin, size, start in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


def whole(shape: Iterable[int]) -> Box:
    """All of a tensor."""
    sizes = tuple(shape)
    return Box((0,) * len(sizes), sizes)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor, whoever holds it."""

    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    """Of the whole."""
