"""Block quantization on a GPU: one pass over memory for each of the three functions.

Writes the bytes that `quantize_torch` writes, by the arithmetic of
`parallel.zero.quantize`: multiplications and additions are not fused (Triton would), divisions are
rounded as IEEE 754 says, and fp8 is made of its bits, which needs no GPU that knows it. A program
takes some blocks of one row; blocks of any size, in tiles of powers of two with the rest masked.
"""

# Triton compiles annotations too, and knows none but its own.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.parallel.kernels.block_format import (
    LARGEST,
    LEAST_SCALE,
    SCALE_BITS,
    BlockFormat,
    Quantization,
)

INT4, FP8 = tl.constexpr(Quantization.int4.value), tl.constexpr(Quantization.fp8.value)
LEAST, FIRST_BITS = tl.constexpr(LEAST_SCALE), tl.constexpr(SCALE_BITS)
INF, NAN = tl.constexpr(float("inf")), tl.constexpr(float("nan"))
ROUNDER, ROUNDER_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
"""1.5 * 2^23: an fp32 added to it has its whole part, rounded half to even, in the last bits."""
FP8_ROUNDER, FP8_ROUNDER_BITS = tl.constexpr(16384.0), tl.constexpr(0x46800000)
"""2^14: the same in steps of 2^-9, those of fp8 under 2^-6."""

TILE = 1024
"""Bytes of codes that a program makes or reads, or one block's."""


def quantize(
    values: Tensor, codes: Tensor, scales: Tensor, fmt: BlockFormat, residual: Tensor | None
) -> None:
    """As `quantize.quantize`, with a wire's codes (K, bytes) and scales (K, blocks) apart."""
    rows, num_blocks = scales.shape
    left = values if residual is None else residual
    grid, shape = _grid(num_blocks, rows, fmt)
    with torch.cuda.device_of(values):
        _quantize[grid](
            values,
            left,
            codes,
            scales,
            num_blocks,
            values.stride(0),
            left.stride(0),
            codes.stride(0),
            scales.stride(0),
            LARGEST=LARGEST[fmt.kind],
            FEEDBACK=residual is not None,
            **shape,
        )


def dequantize(codes: Tensor, scales: Tensor, out: Tensor, fmt: BlockFormat) -> None:
    """As `quantize.dequantize`, with a wire's codes (K, bytes) and scales (K, blocks) apart."""
    rows, num_blocks = scales.shape
    grid, shape = _grid(num_blocks, rows, fmt)
    with torch.cuda.device_of(out):
        _dequantize[grid](
            codes,
            scales,
            out,
            num_blocks,
            codes.stride(0),
            scales.stride(0),
            out.stride(0),
            **shape,
        )


def dequantize_sum(codes: Tensor, scales: Tensor, out: Tensor, fmt: BlockFormat, add: bool) -> None:
    """As `quantize.dequantize_sum`, with a wire's codes (K, bytes) and scales (K, blocks) apart."""
    rows, num_blocks = scales.shape
    grid, shape = _grid(num_blocks, 1, fmt)
    with torch.cuda.device_of(out):
        _dequantize_sum[grid](
            codes,
            scales,
            out,
            rows,
            num_blocks,
            codes.stride(0),
            scales.stride(0),
            ADD=add,
            **shape,
        )


def _grid(num_blocks: int, rows: int, fmt: BlockFormat) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs by blocks and rows, and what the kernels have in common."""
    columns = triton.next_power_of_2(fmt.code_bytes(fmt.block))
    blocks_at_once = max(TILE // columns, 1)
    shape = {
        "KIND": fmt.kind.value,
        "BLOCK": fmt.block,
        "BYTES": fmt.code_bytes(fmt.block),
        "BLOCKS": blocks_at_once,
        "COLUMNS": columns,
        "num_warps": min(max(columns // 512, 4), 16),
        "enable_fp_fusion": False,
    }
    return (triton.cdiv(num_blocks, blocks_at_once), rows), shape


@triton.jit
def _quantize(
    values,
    left,
    codes,
    scales,
    num_blocks,
    values_row,
    left_row,
    codes_row,
    scales_row,
    LARGEST: tl.constexpr,
    FEEDBACK: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, column, there = _tile(num_blocks, BYTES, BLOCKS, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    at = block[:, None] * BLOCK + column[None, :]
    values += row * values_row
    left += row * left_row
    x = _load(values + at, left + at, there, FEEDBACK)
    largest, is_bad = _largest(x)
    second = x
    if KIND == INT4:
        second = _load(values + at + BYTES, left + at + BYTES, there, FEEDBACK)
        largest_second, is_bad_second = _largest(second)
        largest = tl.maximum(largest, largest_second)
        is_bad = tl.maximum(is_bad, is_bad_second)

    scale = tl.div_rn(largest, LARGEST)
    scale = (scale.to(tl.int32, bitcast=True) & FIRST_BITS).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, LEAST)
    inverse = tl.div_rn(1.0, scale)[:, None]
    scale = tl.where(is_bad > 0, NAN, scale)
    tl.store(scales + row * scales_row + block, scale, mask=block < num_blocks)

    code = _to_fp8(x * inverse) if KIND == FP8 else _round(x * inverse)
    byte = code
    if KIND == INT4:
        code_second = _round(second * inverse)
        byte = code + 16 * code_second
        if FEEDBACK:
            value = code_second.to(tl.float32)
            _store_rounded_away(left + at + BYTES, second, value, scale, there)
    tl.store(codes + row * codes_row + block[:, None] * BYTES + column, byte.to(tl.int8), there)
    if FEEDBACK:
        _store_rounded_away(left + at, x, _value(code, KIND), scale, there)


@triton.jit
def _dequantize(
    codes,
    scales,
    out,
    num_blocks,
    codes_row,
    scales_row,
    out_row,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, column, there = _tile(num_blocks, BYTES, BLOCKS, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    byte, scale = _read(
        codes + row * codes_row, scales + row * scales_row, block, column, there, BYTES, num_blocks
    )
    out += row * out_row + block[:, None] * BLOCK + column[None, :]
    tl.store(out, (_first(byte, KIND) * scale).to(out.dtype.element_ty), there)
    if KIND == INT4:
        tl.store(out + BYTES, (_second(byte) * scale).to(out.dtype.element_ty), there)


@triton.jit
def _dequantize_sum(
    codes,
    scales,
    out,
    num_rows,
    num_blocks,
    codes_row,
    scales_row,
    ADD: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, column, there = _tile(num_blocks, BYTES, BLOCKS, COLUMNS)
    out += block[:, None] * BLOCK + column[None, :]
    WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    byte, scale = _read(codes, scales, block, column, there, BYTES, num_blocks)
    total = (_first(byte, KIND) * scale).to(WIDE)
    total_second = total
    if KIND == INT4:
        total_second = (_second(byte) * scale).to(WIDE)
    if ADD:
        total = tl.load(out, there, other=0.0).to(WIDE) + total
        if KIND == INT4:
            total_second = tl.load(out + BYTES, there, other=0.0).to(WIDE) + total_second
    for _ in range(1, num_rows):
        codes += codes_row
        scales += scales_row
        byte, scale = _read(codes, scales, block, column, there, BYTES, num_blocks)
        total += (_first(byte, KIND) * scale).to(WIDE)
        if KIND == INT4:
            total_second += (_second(byte) * scale).to(WIDE)
    tl.store(out, total.to(out.dtype.element_ty), there)
    if KIND == INT4:
        tl.store(out + BYTES, total_second.to(out.dtype.element_ty), there)


@triton.jit
def _tile(num_blocks, BYTES: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Blocks and columns of codes of this program, and which of them there are."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, COLUMNS)
    return block, column, (block < num_blocks)[:, None] & (column < BYTES)[None, :]


@triton.jit
def _load(values, left, there, FEEDBACK: tl.constexpr):
    x = tl.load(values, there, other=0.0).to(tl.float32)
    if FEEDBACK:
        x += tl.load(left, there, other=0.0).to(tl.float32)
    return x


@triton.jit
def _largest(x):
    """Largest finite magnitude of each block, and 1 for one that holds anything else."""
    magnitude = tl.abs(x)
    is_finite = magnitude < INF
    bad = tl.where(is_finite, 0, 1)
    return tl.max(tl.where(is_finite, magnitude, 0.0), 1), tl.max(bad, 1)


@triton.jit
def _round(x):
    """To the nearest int32, half to even; for magnitudes under 2^22."""
    return (x + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def _to_fp8(x):
    """Bits of the nearest e4m3, half to even, in the low 8 of int32; for magnitudes to 448."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude + FP8_ROUNDER).to(tl.int32, bitcast=True) - FP8_ROUNDER_BITS
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(magnitude < 0.015625, small, large) | sign


@triton.jit
def _value(code, KIND: tl.constexpr):
    """Fp32 of a code in int32: a number, or the bits of an e4m3."""
    if KIND == FP8:
        bits = code & 0x7F
        large = ((bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        magnitude = tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, large)
        sign = (code & 0x80) << 24
        value = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def _store_rounded_away(left, x, value, scale, there):
    rest = x - value * scale[:, None]
    rest = tl.where((scale == scale)[:, None], rest, 0.0)
    tl.store(left, rest.to(left.dtype.element_ty), there)


@triton.jit
def _read(
    codes,
    scales,
    block,
    column,
    there,
    BYTES: tl.constexpr,
    num_blocks,
):
    """Bytes of codes as int32 (blocks, columns), and scales (blocks, 1)."""
    byte = tl.load(codes + block[:, None] * BYTES + column[None, :], there, other=0)
    scale = tl.load(scales + block, block < num_blocks, other=0.0)
    return byte.to(tl.int32), scale[:, None]


@triton.jit
def _first(byte, KIND: tl.constexpr):
    """Value of a byte, or of the first number in it."""
    if KIND == INT4:
        byte -= ((byte + 8) >> 4) * 16
    return _value(byte, KIND)


@triton.jit
def _second(byte):
    """Value of the second number in a byte of int4."""
    return ((byte + 8) >> 4).to(tl.float32)
