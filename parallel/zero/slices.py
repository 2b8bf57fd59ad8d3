"""Sizes of the slices that ranks hold of a unit, and of their form on the way. Torch-free.

A parameter of n rows is cut along dim 0 into S slices of ceil(n / S) rows, as torch.chunk cuts; the
last ones may be short or empty. A slice of the unit is its parameters' slices one behind the other,
padded to one size: first the matrices, each from a multiple of the quantization block on, so that
no block mixes two parameters; then the vectors, which always travel unquantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

from phalanx.parallel.kernels.block_format import ALIGNMENT, BlockFormat, Quantization, up
from phalanx.parallel.zero.config import ZeroConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter in a slice."""

    shape: tuple[int, ...]
    """Of the whole (of this tensor-parallel rank)."""
    chunk_rows: int
    """Rows of a full slice."""
    row_numel: int
    """Elements of a row."""
    offset: int
    """Where it begins in a slice."""

    @property
    def chunk(self) -> int:
        """Elements of a full slice."""
        return self.chunk_rows * self.row_numel

    def rows_of(self, slice_index: int) -> int:
        """Rows that a slice really holds."""
        return min(max(self.shape[0] - slice_index * self.chunk_rows, 0), self.chunk_rows)


class Slices:
    """What the parameters of one unit become."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], *, num_slices: int, block: int = 1
    ) -> None:
        """`shapes` have a dim 0; `block`: elements of a quantization block, 1 for none."""
        self.num_slices = num_slices
        self.entries: list[Entry] = [None] * len(shapes)  # type: ignore[list-item]
        offset = 0
        for is_vector in (False, True):
            for index, shape in enumerate(shapes):
                if (len(shape) < 2) is not is_vector:
                    continue
                rows, row_numel = -(-shape[0] // self.num_slices), prod(shape[1:])
                self.entries[index] = Entry(
                    shape=shape, chunk_rows=rows, row_numel=row_numel, offset=offset
                )
                offset += rows * row_numel if is_vector else up(rows * row_numel, block)
            offset = up(offset, ALIGNMENT if is_vector else lcm(block, ALIGNMENT))
            if not is_vector:
                self.matrix_numel = offset
                """Elements of a slice that may be quantized, from its beginning on."""
        self.numel = offset
        """Elements of a slice, padding counted."""


def block_format(kind: Quantization, config: ZeroConfig, num_slices: int) -> BlockFormat | None:
    """The format that values travel in; None for plain numbers, and where nothing travels."""
    if kind is Quantization.none or num_slices == 1:
        return None
    return BlockFormat(kind, config.block_size)


def wire_bytes(slices: Slices, fmt: BlockFormat | None, itemsize: int) -> int:
    """Bytes of a slice on its way; what is not quantized in numbers of `itemsize` bytes."""
    if fmt is None or not slices.matrix_numel:
        return slices.numel * itemsize
    rest = (slices.numel - slices.matrix_numel) * itemsize
    return fmt.row_bytes(slices.matrix_numel) + rest
