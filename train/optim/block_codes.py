"""A moment as codes and scales of blocks, turned into numbers and back a bounded slice at a time.

Shapes: N blocks of B elements (see `blocks`), C bytes of codes a block, R rows of K blocks each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.train.optim.blocks import StateFormat
from phalanx.train.optim.codebooks import CodeBook, code_books


@dataclass(frozen=True)
class Moment:
    """One moment of one rank's rows."""

    codes: Tensor
    """(R, K * C), uint8."""
    scales: Tensor
    """(R, K), fp32: the largest size in each block."""

    @classmethod
    def zeros(cls, rows: int, blocks: int, code_bytes: int, device: torch.device) -> "Moment":
        """Blocks of zeros: under a scale of zero every code stands for one."""
        return cls(
            torch.zeros(rows, blocks * code_bytes, dtype=torch.uint8, device=device),
            torch.zeros(rows, blocks, dtype=torch.float32, device=device),
        )


class Scratch:
    """Memory that slices of up to `size` elements are worked on in; kept from step to step."""

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: of parameters and arithmetic, fp32 or fp64."""

        def empty(of: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=of, device=device)

        self.m, self.v, self.temporary = (empty(dtype) for _ in range(3))
        self.ratios, self.floats = (empty(torch.float32) for _ in range(2))
        self.codes, self.integers = (empty(torch.int32) for _ in range(2))


class Codec:
    """Codes of one moment in one format.

    Everything is element-wise but a block's maximum, and each operation rounds once: what comes out
    depends neither on slices nor on threads, and is the same on CPU and GPU.
    """

    def __init__(self, book: CodeBook, state: StateFormat) -> None:
        self.book = book
        self.per_byte = state.per_byte
        self._bytes = _values_by_byte(book.values, state.bits)
        self._on: dict[torch.device, Tensor] = {}

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Fill `out` (N, B), fp32 or fp64, from codes (N, C) and scales (N, 1).

        A block whose scale is not finite becomes NaN or infinite throughout, never a finite number
        (but for the codes of 0 under an infinite scale: NaN).
        """
        blocks, size = out.shape
        indices = scratch.integers[: codes.numel()]
        indices.view_as(codes).copy_(codes)
        values = scratch.floats[: codes.numel() * self.per_byte]
        # The values of a byte's codes lie together: one look-up copies them.
        whole = torch.float32 if self.per_byte == 1 else torch.int64
        torch.index_select(self._table(out.device), 0, indices, out=values.view(whole))
        torch.mul(values.view(blocks, -1)[:, :size], scales, out=out)

    def encode(self, values: Tensor, codes: Tensor, scales: Tensor, scratch: Scratch) -> None:
        """Write the codes (N, C) and scales (N, 1) nearest to `values` (N, B); a block with NaN
        gets a scale of NaN."""
        blocks, size = values.shape
        padded = codes.shape[1] * self.per_byte
        sizes = scratch.temporary[: values.numel()].view_as(values)
        scales.copy_(torch.abs(values, out=sizes).amax(dim=1, keepdim=True))
        ratios = scratch.ratios[: blocks * padded]
        # Under a denormal scale, ratios only lose digits; zero by zero is zero.
        divisors = scales.clamp_min(torch.finfo(torch.float32).tiny)
        table = ratios.view(blocks, padded)
        torch.div(values, divisors, out=table if padded == size else sizes)
        if padded > size:
            table.zero_()[:, :size] = sizes
        found = scratch.codes[: len(ratios)]
        self.book.encode(
            ratios,
            found,
            integers=scratch.integers[: len(ratios)],
            floats=scratch.floats[: len(ratios)],
        )
        if self.per_byte == 2:
            low, high = found.view(-1, 2).unbind(1)
            found = torch.add(low, high, alpha=16, out=scratch.integers[: len(low)])
        codes.copy_(found.view_as(codes))

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._bytes.to(device)
        return self._on[device]


def codecs(state: StateFormat) -> tuple[Codec, Codec]:
    """Of the first and of the second moment."""
    first, second = code_books(state.bits)
    return Codec(first, state), Codec(second, state)


def _values_by_byte(values: Tensor, bits: int) -> Tensor:
    """What a byte of codes stands for: (256,) fp32, or of two codes, (256,) int64 that hold two
    fp32 each, the lower half's first."""
    if bits == 8:
        return values
    byte = torch.arange(256)
    return values[torch.stack((byte % 16, byte // 16), dim=1)].view(torch.int64).flatten()
