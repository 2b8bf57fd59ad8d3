"""Low-bit optimizer states: how many bits an element takes, and which elements share a scale.

A block is a run of elements inside one row of a parameter (dim 0; the other dims are flattened to
columns). Its size follows from the whole parameter's shape alone, never from how ranks divide it:
cut between rows, a state is therefore the same numbers in every layout. Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from phalanx.train.optim.config import OptimizerName

MIN_ELEMENTS = 4096
"""Smaller parameters keep moments in full precision (Dettmers et al., 2022, section 2.3); so do
vectors, and matrices with rows shorter than MIN_BLOCK."""
MIN_BLOCK = 32
"""Shorter blocks would spend more on scales than they save."""
CUTS = (8, 4, 2, 1)
"""Equal parts that a row should fall into between blocks, the first that can be had: tensor
parallelism of such a degree may cut columns."""


@dataclass(frozen=True, kw_only=True)
class StateFormat:
    """Number format of both moments."""

    bits: int
    """8, or 4: two elements in a byte."""
    block: int
    """Elements that share a scale, at most."""

    @property
    def per_byte(self) -> int:
        """Elements in a byte."""
        return 8 // self.bits

    def code_bytes(self, block: int) -> int:
        """Bytes of a block's codes; an odd block of 4 bits leaves half a byte unused."""
        return -(-block // self.per_byte)


FORMATS = {
    OptimizerName.adamw8bit: StateFormat(bits=8, block=256),
    OptimizerName.adamw4bit: StateFormat(bits=4, block=128),
}
"""By optim.name; what is not here keeps its states in full precision."""


def block_size(shape: Sequence[int], state: StateFormat) -> int | None:
    """Elements of a block of a parameter of global `shape`; None = full precision.

    The largest divisor of the row up to `state.block` that lets a row be cut into CUTS parts; where
    a row's length has no fitting divisor, the smallest one from MIN_BLOCK on.
    """
    if len(shape) < 2 or prod(shape) < MIN_ELEMENTS:
        return None
    columns = prod(shape[1:])
    if columns < MIN_BLOCK:
        return None
    for cuts in CUTS:
        width = columns // cuts
        for block in range(min(state.block, width), MIN_BLOCK - 1, -1):
            if columns % cuts == 0 and width % block == 0 and block % state.per_byte == 0:
                return block
    return next(size for size in range(MIN_BLOCK, columns + 1) if columns % size == 0)


def check_column_cut(
    name: OptimizerName, parameter: str, shape: Sequence[int], *, parts: int
) -> None:
    """Whether a parameter's columns can be cut into `parts` (parallel.tp) between blocks.

    Raises:
        ValueError: a block would lie on two ranks, whose scale neither knows.
    """
    block = block_size(shape, FORMATS[name]) if name in FORMATS else None
    columns = prod(shape[1:])
    if block is None or parts == 1 or columns % (parts * block) == 0:
        return
    raise ValueError(
        f"optim.name={name.name}: parallel.tp={parts} cuts the {columns} columns of {parameter} "
        f"{list(shape)} inside blocks of {block} that share a scale; use optim.name=adamw, or "
        f"a parallel.tp that divides {columns // block}"
    )
