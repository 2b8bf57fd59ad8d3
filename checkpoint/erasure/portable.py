"""Products of a matrix with long rows of bytes: what a codec asks of a library, and NumPy's way.

NumPy runs everywhere and makes the same bytes as every other backend, several times slower; other
backends are tested against it when they are loaded. Torch-free; NumPy drops the GIL in each call.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from phalanx.checkpoint.erasure.field import REDUCED, Bytes

BLOCK = 32 << 10
"""Bytes of a row that are worked on at a time: those of all rows should stay in the caches."""


class Backend(Protocol):
    """Arithmetic of GF(2^8) on rows of bytes of one length.

    No row may be written that overlaps another. Any number of threads may call.
    """

    name: str
    """For people."""

    def multiply(self, matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """Set target i to the sum over j of matrix[i, j] times source j; one target or more."""

    def add(self, coefficient: int, source: Bytes, target: Bytes) -> None:
        """Add coefficient times source to target."""


class Portable:
    """NumPy, by Horner's rule over the bits of the coefficients: doubling and XOR are all it needs.

    Eight bytes are doubled at a time, as one integer whose bytes do not disturb each other.
    """

    name = "numpy"

    def multiply(self, matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """As `Backend.multiply`."""
        for begin in range(0, len(targets[0]), BLOCK):
            pieces = [source[begin : begin + BLOCK] for source in sources]
            for row, target in zip(matrix, targets, strict=True):
                piece = target[begin : begin + BLOCK]
                piece[:] = _dot(row, pieces, len(piece))

    def add(self, coefficient: int, source: Bytes, target: Bytes) -> None:
        """As `Backend.add`."""
        row = np.array([coefficient], np.uint8)
        for begin in range(0, len(target), BLOCK):
            piece = target[begin : begin + BLOCK]
            piece ^= _dot(row, [source[begin : begin + BLOCK]], len(piece))


def _dot(row: Bytes, pieces: Sequence[Bytes], length: int) -> Bytes:
    """The sum of row[j] times piece j."""
    words = np.zeros(-(-length // 8), np.uint64)
    total = words.view(np.uint8)[:length]
    for bit in reversed(range(int(np.bitwise_or.reduce(row)).bit_length())):
        _double(words)
        for coefficient, piece in zip(row.tolist(), pieces, strict=True):
            if coefficient >> bit & 1:
                total ^= piece
    return total


def _double(words: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
    """Multiply each byte by x, in place."""
    carries = words >> np.uint64(7)
    carries &= np.uint64(0x0101010101010101)
    carries *= np.uint64(REDUCED)
    words &= np.uint64(0x7F7F7F7F7F7F7F7F)
    words <<= np.uint64(1)
    words ^= carries
