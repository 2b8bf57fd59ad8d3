"""Triton's block quantization writes the bytes that torch operators write on a CPU.

Needs a GPU; or Triton's interpreter, `TRITON_INTERPRET=1`, which runs the kernels on a CPU.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from phalanx.parallel.kernels import quantize as dispatch
from phalanx.parallel.kernels import quantize_torch
from phalanx.parallel.kernels.block_format import BlockFormat, Quantization
from phalanx.parallel.kernels.quantize import (
    dequantize,
    dequantize_sum,
    quantize,
    split,
)
from tests.parallel.zero.quantized import LARGEST, adversarial

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED, reason="needs a CUDA device"
    ),
]

KINDS = tuple(LARGEST)
SHAPES = [(1, 1, 8), (3, 13, 24), (2, 301, 10), (1, 7, 256), (5, 1, 66), (2, 3, 3000)]
FLOATS = [torch.float32, torch.float64, torch.float16]
if not INTERPRETED:  # the interpreter cuts bf16 off, where GPUs round
    FLOATS.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's tensors lie on the CPU."""
    if INTERPRETED:
        from phalanx.parallel.kernels import quantize_triton as kernels

        monkeypatch.setattr(dispatch, "_backend", lambda _: kernels)


def by_torch(values: Tensor, fmt: BlockFormat, residual: Tensor | None = None) -> Tensor:
    """(K, N) on the CPU -> wire."""
    numel = values.shape[1]
    wire = torch.zeros(len(values), fmt.row_bytes(numel), dtype=torch.uint8)
    quantize_torch.quantize(values, *split(wire, numel, fmt), fmt, residual)
    return wire


def same_floats(a: Tensor, b: Tensor) -> bool:
    """The same bits, or both NaN."""
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num().view(torch.uint8), b.nan_to_num().view(torch.uint8)
    )


def same_wire(a: Tensor, b: Tensor, numel: int, fmt: BlockFormat) -> bool:
    """The same bytes, but for codes of blocks that are NaN, which say nothing."""
    a, b = a.cpu(), b.cpu()
    scales = split(a, numel, fmt)[1]
    finite = scales.isfinite()
    codes = (split(wire, numel, fmt)[0].view(*finite.shape, -1) for wire in (a, b))
    return same_floats(scales, split(b, numel, fmt)[1]) and torch.equal(
        *(code[finite] for code in codes)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "num_blocks", "block"), SHAPES)
@pytest.mark.parametrize("feedback", [False, True])
def test_the_bytes_of_torch(
    kind: Quantization, rows: int, num_blocks: int, block: int, feedback: bool
) -> None:
    fmt, numel = BlockFormat(kind, block), num_blocks * block
    values = adversarial(fmt, rows * num_blocks).view(rows, -1)
    residual = torch.randn(rows, numel) * 0.01 if feedback else None
    here = None if residual is None else residual.clone().to(DEVICE)
    wire = torch.zeros(rows, fmt.row_bytes(numel), dtype=torch.uint8, device=DEVICE)
    quantize(values.to(DEVICE), wire, fmt, here)
    wanted = by_torch(values, fmt, residual)
    assert same_wire(wire, wanted, numel, fmt)
    if residual is not None and here is not None:
        assert same_floats(here, residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "num_blocks", "block"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_of_torch(
    kind: Quantization, rows: int, num_blocks: int, block: int, dtype: torch.dtype
) -> None:
    fmt, numel = BlockFormat(kind, block), num_blocks * block
    wire = by_torch(adversarial(fmt, rows * num_blocks).view(rows, -1), fmt)
    codes, scales = split(wire, numel, fmt)
    wanted, found = (torch.zeros(rows, numel, dtype=dtype) for _ in range(2))
    quantize_torch.dequantize(codes, scales, wanted, fmt)
    found = found.to(DEVICE)
    dequantize(wire.to(DEVICE), found, fmt)
    assert same_floats(found, wanted)

    for add in (False, True):
        total = torch.randn(numel).to(dtype)
        here = total.clone().to(DEVICE)
        quantize_torch.dequantize_sum(codes, scales, total, fmt, add)
        dequantize_sum(wire.to(DEVICE), here, fmt, add=add)
        assert same_floats(here, total)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_comes_back(kind: Quantization) -> None:
    """All bytes that codes can be: not the NaN of e4m3, and no more than two 7 in a byte."""
    fmt = BlockFormat(kind, 512 if kind is Quantization.int4 else 256)
    wire = torch.zeros(1, fmt.row_bytes(fmt.block), dtype=torch.uint8)
    codes, scales = split(wire, fmt.block, fmt)
    codes.copy_(torch.arange(-128, 128))
    if kind is Quantization.fp8:
        codes[codes & 0x7F == 0x7F] = 0
    elif kind is Quantization.int4:
        codes.clamp_(-7 * 16 - 7, 7 * 16 + 7)
    scales.fill_(0.75)
    wanted = torch.empty(1, fmt.block)
    quantize_torch.dequantize(codes, scales, wanted, fmt)
    found = torch.empty(1, fmt.block, device=DEVICE)
    dequantize(wire.to(DEVICE), found, fmt)
    assert same_floats(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_lie_apart(kind: Quantization, dtype: torch.dtype) -> None:
    fmt = BlockFormat(kind, 24)
    values = torch.randn(5, 400).to(dtype)
    wires = torch.full((6, fmt.row_bytes(240) + 32), 0xA5, dtype=torch.uint8, device=DEVICE)
    wire = wires[::2, 16:-16]
    quantize(values.to(DEVICE)[::2, 8:248], wire, fmt)
    wanted = by_torch(values[::2, 8:248], fmt)
    assert torch.equal(wire.cpu(), wanted)
    untouched = torch.ones_like(wires, dtype=torch.bool)
    untouched[::2, 16:-16] = False
    assert torch.all(wires[untouched] == 0xA5)

    outs = torch.zeros(5, 400, dtype=dtype, device=DEVICE)
    dequantize(wire, outs[::2, 8:248], fmt)
    floats = torch.zeros(3, 240, dtype=dtype)
    quantize_torch.dequantize(*split(wanted, 240, fmt), floats, fmt)
    assert same_floats(outs[::2, 8:248].contiguous(), floats)
    outs[::2, 8:248] = 0
    assert torch.all(outs == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_blocks(kind: Quantization) -> None:
    fmt = BlockFormat(kind, 65536)
    values = torch.randn(2, 2 * 65536)
    wire = torch.zeros(2, fmt.row_bytes(2 * 65536), dtype=torch.uint8, device=DEVICE)
    quantize(values.to(DEVICE), wire, fmt)
    assert torch.equal(wire.cpu(), by_torch(values, fmt))


def test_a_gpu_gets_the_kernels() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter is put in by the fixture")
    backend: ModuleType = dispatch._backend(torch.empty(1, device="cuda"))
    assert backend.__name__ == "phalanx.parallel.kernels.quantize_triton"
