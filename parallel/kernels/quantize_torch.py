"""Block quantization by torch operators: what a CPU runs, and what GPU kernels are tested against.

Goes through a tensor in slices that stay in a core's cache from one operator to the next, and
makes its scratch once a call. The choice of operators is measured: `amax` and `amin` take a tenth
of the time of one norm over the blocks, and reading fp8 by way of fp16 a third of torch's own
conversion.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from phalanx.parallel.kernels.block_format import (
    LARGEST,
    LEAST_SCALE,
    SCALE_BITS,
    BlockFormat,
    Quantization,
)

SLICE = 1 << 18
"""Elements that pass through the operators at a time."""
GROUP = 4 * SLICE
"""Elements whose scales are made at once: a call on a few scales costs more than its arithmetic."""


def quantize(
    values: Tensor, codes: Tensor, scales: Tensor, fmt: BlockFormat, residual: Tensor | None
) -> None:
    """As `quantize.quantize`, with a wire's codes (K, bytes) and scales (K, blocks) apart."""
    x_KNB = values.unflatten(1, (-1, fmt.block))
    left_KNB = None if residual is None else residual.unflatten(1, (-1, fmt.block))
    codes_KNB = codes.unflatten(1, (x_KNB.shape[1], -1))
    codec = Codec(fmt, x_KNB)
    staged = values.dtype is not torch.float32 or residual is not None
    stage = Scratch(min(GROUP, x_KNB.numel()) if staged else 0, torch.float32, values.device)
    for place in _pieces(x_KNB, GROUP):
        x, scale, code = x_KNB[place], scales[place], codes_KNB[place]
        left = None if left_KNB is None else left_KNB[place]
        if staged:
            x = _sum(x, left, out=stage.like(x))
        _make_scales(x, scale, fmt)
        for part in _slices(x, scale.reciprocal(), code):
            codec.encode(*part)
        if left is not None:
            for *what, rest in _slices(x, scale, code, left):
                rest.copy_(codec.rounded_away(*what))


def dequantize(codes: Tensor, scales: Tensor, out: Tensor, fmt: BlockFormat) -> None:
    """As `quantize.dequantize`, with a wire's codes (K, bytes) and scales (K, blocks) apart."""
    out_KNB = out.unflatten(1, (-1, fmt.block))
    codes_KNB = codes.unflatten(1, (out_KNB.shape[1], -1))
    codec = Codec(fmt, out_KNB)
    for place in _pieces(out_KNB, SLICE):
        codec.decode(codes_KNB[place], scales[place], out_KNB[place])


def dequantize_sum(codes: Tensor, scales: Tensor, out: Tensor, fmt: BlockFormat, add: bool) -> None:
    """As `quantize.dequantize_sum`, with a wire's codes (K, bytes) and scales (K, blocks) apart."""
    out_1NB = out.view(1, -1, fmt.block)
    codes_KNB = codes.unflatten(1, (out_1NB.shape[1], -1))
    codec = Codec(fmt, out_1NB)
    wide = out.dtype in (torch.float32, torch.float64)
    stage = Scratch(0 if wide else min(SLICE, out.numel()), torch.float32, out.device)
    for _, span in _pieces(out_1NB, SLICE):
        into = out_1NB[:, span]
        total = into if wide else stage.like(into).copy_(into)
        for row in range(len(codes)):
            place = (slice(row, row + 1), span)
            if row or add:
                codec.add(codes_KNB[place], scales[place], total)
            else:
                codec.decode(codes_KNB[place], scales[place], total)
        if not wide:
            into.copy_(total)


class Codec:
    """The operators on one slice of blocks, with their scratch; k rows, n blocks of b elements."""

    def __init__(self, fmt: BlockFormat, blocks_KNB: Tensor) -> None:
        self.kind = fmt.kind
        size, device = min(blocks_KNB.numel(), GROUP), blocks_KNB.device
        self.floats = Scratch(size, torch.float32, device)
        """For what is computed before codes or after them."""
        wide = torch.int16 if fmt.kind is Quantization.fp8 else torch.int8
        self.whole = Scratch(fmt.code_bytes(size), wide, device)
        """For codes as whole numbers; fp8 takes 16 bits."""
        self.unit = 256.0 if fmt.kind is Quantization.fp8 else 1.0
        """Value of a 1 that `_read` gives."""

    def encode(self, x: Tensor, inverse: Tensor, codes: Tensor) -> None:
        """Fp32 (k, n, b) times inverse scales (k, n), rounded to codes (k, n, bytes)."""
        scaled = torch.mul(x, inverse.unsqueeze(2), out=self.floats.like(x))
        if self.kind is Quantization.fp8:
            codes.view(torch.float8_e4m3fn).copy_(scaled)
            return
        scaled.round_()
        if self.kind is Quantization.int4:
            first, second = scaled.chunk(2, dim=2)
            scaled = first.add_(second, alpha=16)
        codes.copy_(scaled)

    def rounded_away(self, x: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
        """In place of x (k, n, b): what codes (k, n, bytes) lack of it; 0 in blocks of NaN."""
        kept = self.floats.like(x)
        self._read(codes, kept)
        x.addcmul_(kept, self._scale(scale), value=-1)
        if not scale.isfinite().all():
            x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return x

    def decode(self, codes: Tensor, scale: Tensor, out: Tensor) -> None:
        """Codes (k, n, bytes) times scales (k, n) -> any float format (k, n, b)."""
        floats = out if out.dtype is torch.float32 else self.floats.like(out)
        self._read(codes, floats)
        floats.mul_(self._scale(scale))
        if floats is not out:
            out.copy_(floats)

    def add(self, codes: Tensor, scale: Tensor, total: Tensor) -> None:
        """Codes (k, n, bytes) times scales (k, n), on top of fp32 or fp64 (k, n, b)."""
        floats = self.floats.like(total)
        self._read(codes, floats)
        if total.dtype is torch.float32:
            total.addcmul_(floats, self._scale(scale))
        else:
            total.add_(floats.mul_(self._scale(scale)))

    def _scale(self, scale: Tensor) -> Tensor:
        scale = scale.unsqueeze(2)
        return scale if self.unit == 1.0 else scale * self.unit

    def _read(self, codes: Tensor, out: Tensor) -> None:
        """Values of codes (k, n, bytes), in `unit`: fp32 (k, n, b)."""
        if self.kind is Quantization.int8:
            out.copy_(codes)
        elif self.kind is Quantization.int4:
            first, second = out.chunk(2, dim=2)
            whole = torch.add(codes, 8, out=self.whole.like(codes)).bitwise_right_shift_(4)
            second.copy_(whole)
            first.copy_(torch.sub(codes, whole, alpha=16, out=whole))
        else:
            # fp16 has one more bit of exponent, and a bias that is larger by 8: sign to its place,
            # a 0 behind it, then the other seven bits.
            bits = self.whole.like(codes).copy_(codes)
            bits.mul_(128).bitwise_and_(-0x4001)
            out.copy_(bits.view(torch.float16))


class Scratch:
    """Memory that tensors of several shapes take in turn."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._all = torch.empty(numel, dtype=dtype, device=device)
        self._last = self._all

    def like(self, shaped: Tensor) -> Tensor:
        """A tensor of the same shape; mostly the one of the last call, which saves its making."""
        if self._last.shape != shaped.shape:
            self._last = self._all[: shaped.numel()].view(shaped.shape)
        return self._last


def _sum(values: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
    """Values, and a residual where there is one, in fp32."""
    if residual is None:
        return out.copy_(values)
    return torch.add(values.float(), residual.float(), out=out)


def _make_scales(x: Tensor, out: Tensor, fmt: BlockFormat) -> None:
    """Scales of fp32 blocks: (k, n, b) -> (k, n), NaN for what is not finite."""
    torch.maximum(torch.amax(x, 2), torch.amin(x, 2).neg_(), out=out)
    out.div_(LARGEST[fmt.kind])
    out.view(torch.int32).bitwise_and_(SCALE_BITS)
    out.clamp_min_(LEAST_SCALE)
    out.nan_to_num_(nan=math.nan, posinf=math.nan)


def _pieces(blocks_KNB: Tensor, limit: int) -> Iterator[tuple[slice, slice]]:
    """Rows and blocks of pieces of at most `limit` elements: of one row, or of whole rows."""
    rows, num_blocks, block = blocks_KNB.shape
    per_piece = limit // block
    rows_at_once = max(per_piece // num_blocks, 1)
    for row in range(0, rows, rows_at_once):
        for first in range(0, num_blocks, per_piece):
            last = min(first + per_piece, num_blocks)
            yield slice(row, min(row + rows_at_once, rows)), slice(first, last)


def _slices(blocks_KNB: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A piece, and others of as many rows and blocks, in SLICE elements where rows allow it."""
    rows, num_blocks, block = blocks_KNB.shape
    dim, size = (0, num_blocks * block) if rows > 1 else (1, block)
    count = max(SLICE // size, 1)
    splits = (tensor.split(count, dim) for tensor in (blocks_KNB, *others))
    return zip(*splits, strict=True)
