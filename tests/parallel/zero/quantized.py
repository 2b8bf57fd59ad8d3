"""Block quantization as it is defined: slowly, one block at a time, for the tests of all paths."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from phalanx.parallel.kernels.block_format import BlockFormat, Quantization

LARGEST = {Quantization.int8: 127, Quantization.int4: 7, Quantization.fp8: 448}


def reference(values: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """What quantized floats (K, N) come back as, and the scale of each element: fp64 (K, N)."""
    rows, numel = values.shape
    back = torch.empty(rows, numel, dtype=torch.float64)
    scales = torch.empty(rows, numel, dtype=torch.float64)
    for row in range(rows):
        for first in range(0, numel, fmt.block):
            place = slice(first, first + fmt.block)
            block = [np.float32(x) for x in values[row, place].tolist()]
            scale = scale_of(block, fmt)
            scales[row, place] = scale
            back[row, place] = torch.tensor([back_of(x, scale, fmt) for x in block]).double()
    return back, scales


def scale_of(block: list[np.float32], fmt: BlockFormat) -> float:
    """A number of 17 bits; NaN for blocks that are not finite."""
    if not all(math.isfinite(x) for x in block):
        return math.nan
    exact = np.float32(max(abs(x) for x in block)) / np.float32(LARGEST[fmt.kind])
    fraction, exponent = math.frexp(float(exact))
    return max(math.ldexp(math.floor(fraction * 2**17), exponent - 17), 2.0**-120)


def back_of(x: np.float32, scale: float, fmt: BlockFormat) -> float:
    """Code times scale, in fp64."""
    if math.isnan(scale):
        return math.nan
    scaled = float(x * (np.float32(1) / np.float32(scale)))
    if fmt.kind is not Quantization.fp8:
        return round(scaled) * scale  # Python rounds half to even
    found = min(fp8_codes(), key=lambda code: (abs(code[0] - abs(scaled)), code[1] % 2))
    return math.copysign(found[0], scaled) * scale


@cache
def fp8_codes() -> list[tuple[float, int]]:
    """Value and bits of the codes of e4m3 from 0 up, without NaN."""
    codes = []
    for bits in range(127):
        exponent, mantissa = bits >> 3, bits & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        codes.append((value, bits))
    return codes


def largest_error(back: Tensor, scales: Tensor, fmt: BlockFormat) -> Tensor:
    """What a value that comes back as `back` may be off, but for the rounding of fp32."""
    if fmt.kind is Quantization.fp8:
        # e4m3 has 3 bits behind the point; under 2^-6 its steps are of 2^-9.
        return torch.maximum(back.abs() / 16, scales / 1024)
    return scales / 2


def adversarial(fmt: BlockFormat, num_blocks: int, seed: int = 0) -> Tensor:
    """fp32 (num_blocks * block,): outliers, zeros, denormals, ties, extremes, NaN, infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_blocks, fmt.block, generator=generator)
    largest = torch.finfo(torch.float32).max
    for number in range(num_blocks):
        block = x[number]
        match number % 13:
            case 1:
                block[number % fmt.block] = 1e6
            case 2:
                block.zero_()
            case 3:
                block.mul_(1e-42)
            case 4:
                block.mul_(1e-36)
            case 5:
                block[-1] = math.nan
            case 6:
                block[0] = -math.inf
            case 7:
                block.mul_(1e36).clamp_(-largest, largest)[1] = -largest
            case 8:  # halves of the scale
                block.mul_(4).round_().div_(2)[0] = -LARGEST[fmt.kind]
            case 9:
                block.fill_(-0.3)
            case 10:
                block.copy_(torch.logspace(-12, 0, fmt.block, 10.0))
            case 11:
                block[0], block[1] = math.inf, math.nan
            case 12:
                block.neg_().abs_().neg_()
    return x.flatten()
