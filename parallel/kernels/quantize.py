"""Blocks of floats as 8 or 4 bits and a scale: what weights and gradients travel in (ZeRO++).

A block is a number of neighbours in a row that share one fp32 scale (Wang et al., 2023, "ZeRO++",
section 3.1: quantizing in blocks). Quantization is symmetric, and rounds half to even. One
arithmetic everywhere, in fp32, so that a CPU and a GPU write the same bytes:

    scale = max(first_17_bits(absmax / largest code), 2^-120)        code = round(x * (1 / scale))

A scale of 17 bits makes code * scale exact, as codes have 7 at most. So a multiplication and an
addition in one instruction round as two do, what was rounded away is an exact difference, and
quantizing what was dequantized gives the same bytes again. Rounding a scale down also keeps
code * scale finite. The 2^-120 keep denormals from a division by zero.

A value comes back with an error of at most scale / 2 for int8 and int4, and for fp8 of at most
|x| / 16, or scale / 1024 where that is more.

Wire: a row's codes, then its scales, each filled up with zeros to 16 bytes. int4 puts elements i
and i + block / 2 of a block into byte i of it, as 16 * second + first in a signed byte.
"""

from types import ModuleType

import torch
from torch import Tensor

from phalanx.parallel.kernels.block_format import BlockFormat


@torch.no_grad()
def quantize(values: Tensor, out: Tensor, fmt: BlockFormat, residual: Tensor | None = None) -> None:
    """Write rows of floats as codes and scales.

    A block with a NaN or an infinity (also one that fp32 cannot hold) becomes NaN as a whole.

    Args:
        values: (K, N), any float format, N a multiple of fmt.block; rows may lie apart.
        out: uint8 (K, fmt.row_bytes(N)), rows at multiples of 4 bytes.
        residual: (K, N), any float format: is added to the values before, and holds afterwards
            what rounding took from the sum, which is 0 in blocks that became NaN (error feedback;
            Seide et al., 2014, "1-Bit Stochastic Gradient Descent"). With v the fp32 sum of values
            and residual, `v == dequantized + residual` afterwards up to one unit in v's last place.

    Raises:
        ValueError: shapes or formats do not fit each other.
    """
    rows, numel = _check("values", values, out, fmt)
    if residual is not None:
        if residual.shape != values.shape:
            raise ValueError(f"residual: is {tuple(residual.shape)}, values {(rows, numel)}")
        _check("residual", residual, out, fmt)
    if values.numel() == 0:
        return
    out[:, fmt.code_bytes(numel) : fmt.scales_at(numel)].zero_()
    out[:, fmt.scales_at(numel) + 4 * (numel // fmt.block) :].zero_()
    _backend(values).quantize(values, *split(out, numel, fmt), fmt, residual)


@torch.no_grad()
def dequantize(wire: Tensor, out: Tensor, fmt: BlockFormat) -> None:
    """Read rows of codes and scales: uint8 (K, fmt.row_bytes(N)) -> (K, N), any float format.

    Products are exact in fp32, and rounded where `out` has fewer bits.

    Raises:
        ValueError: shapes or formats do not fit each other.
    """
    _, numel = _check("out", out, wire, fmt)
    if out.numel():
        _backend(out).dequantize(*split(wire, numel, fmt), out, fmt)


@torch.no_grad()
def dequantize_sum(wire: Tensor, out: Tensor, fmt: BlockFormat, *, add: bool = False) -> None:
    """Read rows of codes and scales and add them up: uint8 (K, fmt.row_bytes(N)) -> (N,).

    Adds row after row, from the first on; in out's format, in fp32 where that has fewer bits than
    fp32. `add`: on top of what `out` holds.

    Raises:
        ValueError: shapes or formats do not fit each other, or there is no row.
    """
    if out.dim() != 1 or wire.dim() != 2 or wire.shape[0] == 0:
        raise ValueError(f"sums need (K, W) -> (N,); are {tuple(wire.shape)}, {tuple(out.shape)}")
    _, numel = _check("out", out.expand(wire.shape[0], -1), wire, fmt)
    if out.numel():
        _backend(out).dequantize_sum(*split(wire, numel, fmt), out, fmt, add)


def split(wire: Tensor, numel: int, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes int8 (K, fmt.code_bytes(numel)) and scales fp32 (K, blocks), views of a wire."""
    at, blocks = fmt.scales_at(numel), numel // fmt.block
    codes = wire[:, : fmt.code_bytes(numel)].view(torch.int8)
    return codes, wire[:, at : at + 4 * blocks].view(torch.float32)


def _check(name: str, floats: Tensor, wire: Tensor, fmt: BlockFormat) -> tuple[int, int]:
    """Rows and elements of a row."""
    if floats.dim() != 2 or not floats.is_floating_point():
        raise ValueError(f"{name}: needs floats (K, N); is {floats.dtype} {tuple(floats.shape)}")
    rows, numel = floats.shape
    wanted = (rows, fmt.row_bytes(numel))
    if wire.dtype is not torch.uint8 or tuple(wire.shape) != wanted:
        raise ValueError(
            f"wire of {name} {(rows, numel)}: needs torch.uint8 {wanted}; is {wire.dtype} "
            f"{tuple(wire.shape)}"
        )
    if numel and (floats.stride(1) != 1 or wire.stride(1) != 1):
        raise ValueError(f"{name}, wire: elements of a row have to be neighbours")
    if numel and (wire.storage_offset() % 4 or (rows > 1 and wire.stride(0) % 4)):
        raise ValueError(f"wire of {name}: rows have to lie at multiples of 4 bytes")
    if floats.device != wire.device:
        raise ValueError(f"{name} on {floats.device}, wire on {wire.device}: need one device")
    return rows, numel


def _backend(tensor: Tensor) -> ModuleType:
    """Triton is imported where there is a GPU, and nowhere else."""
    if tensor.is_cuda:
        from phalanx.parallel.kernels import quantize_triton as kernels

        return kernels
    from phalanx.parallel.kernels import quantize_torch

    return quantize_torch
