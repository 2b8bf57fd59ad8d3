"""Block quantization on a CPU, to the bit against its definition, and what follows from it."""

import math

import pytest
import torch
from torch import Tensor

from phalanx.parallel.kernels import quantize_torch
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.kernels.quantize import (
    BlockFormat,
    dequantize,
    dequantize_sum,
    quantize,
    split,
)
from tests.parallel.zero.quantized import LARGEST, adversarial, largest_error, reference

KINDS = tuple(LARGEST)
WIDTHS = {Quantization.int8: 8, Quantization.int4: 4, Quantization.fp8: 8}
NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def there(values: Tensor, fmt: BlockFormat, residual: Tensor | None = None) -> Tensor:
    """(K, N) -> wire."""
    wire = torch.full((len(values), fmt.row_bytes(values.shape[1])), 0xA5, dtype=torch.uint8)
    quantize(values, wire, fmt, residual)
    return wire


def back(wire: Tensor, numel: int, fmt: BlockFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Wire -> (K, N)."""
    out = torch.full((len(wire), numel), 7.0, dtype=dtype)
    dequantize(wire, out, fmt)
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, or both NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "num_blocks", "block"),
    [(1, 1, 8), (3, 13, 24), (2, 31, 10), (1, 7, 256), (5, 1, 66), (2, 3, 1000)],
)
def test_to_the_bit_as_defined(kind: Quantization, rows: int, num_blocks: int, block: int) -> None:
    fmt = BlockFormat(kind, block)
    values = adversarial(fmt, rows * num_blocks).view(rows, -1)
    wanted, scales = reference(values, fmt)
    found = back(there(values, fmt), num_blocks * block, fmt)
    assert same(found.double(), wanted)

    finite = scales.isfinite()
    assert torch.equal(found.isfinite(), finite), "a block that is not finite is NaN as a whole"
    assert torch.all(found[~finite].isnan())
    assert torch.all(found[values == 0].nan_to_num() == 0)
    error = (found.double() - values.double()).abs()
    # A product of x with a rounded reciprocal decides about ties: some 2^-17 of a step.
    bound = largest_error(wanted, scales, fmt) * (1 + 2.0**-14)
    assert torch.all(error[finite] <= bound[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_the_slices_of_large_tensors_do_not_show(
    kind: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one row and of several, and their last ones, give what one piece gives."""
    fmt = BlockFormat(kind, 16)
    values = adversarial(fmt, 6 * 29).view(6, -1)
    residual = torch.randn(6, 29 * 16)
    kept = residual.clone()
    wire = there(values, fmt, kept)
    out, total = back(wire, 29 * 16, fmt), torch.empty(29 * 16)
    dequantize_sum(wire, total, fmt)
    for size, group in ((16, 16), (16 * 5, 16 * 10), (16 * 29, 16 * 64), (16 * 20, 16 * 63)):
        monkeypatch.setattr(quantize_torch, "SLICE", size)
        monkeypatch.setattr(quantize_torch, "GROUP", group)
        again, sums = residual.clone(), torch.empty(29 * 16)
        found = there(values, fmt, again)
        for one, other in zip(split(found, 464, fmt), split(wire, 464, fmt), strict=True):
            finite = split(wire, 464, fmt)[1].isfinite()
            shape = (6, 29, -1)
            assert torch.equal(one.view(shape)[finite], other.view(shape)[finite])
        assert same(again, kept)
        assert same(back(found, 464, fmt), out)
        dequantize_sum(found, sums, fmt)
        assert same(sums, total)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_not_finite_leaves_its_neighbours_alone(kind: Quantization) -> None:
    fmt = BlockFormat(kind, 8)
    values = torch.randn(2, 40)
    clean = back(there(values, fmt), 40, fmt)
    for bad in (NAN, INF, -INF):
        spoiled = values.clone()
        spoiled[1, 19] = bad
        residual = torch.zeros_like(spoiled)
        found = back(there(spoiled, fmt, residual), 40, fmt)
        assert torch.all(found[1, 16:24].isnan())
        assert torch.all(residual[1, 16:24] == 0), "what is NaN now must not be so for ever"
        found[1, 16:24] = clean[1, 16:24]
        assert torch.equal(found, clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 3e38, 1e-30, 5e-39, 1e-45, 2.0**-120 * 448])
def test_the_largest_magnitude_has_the_largest_code(kind: Quantization, size: float) -> None:
    fmt = BlockFormat(kind, 8)
    values = torch.tensor([[0.25, -1, 0.5, 0, -0.5, 1, -0.0, 0.125]]) * size
    found = back(there(values, fmt), 8, fmt)
    assert torch.all(found.isfinite())
    assert torch.equal(found[0, [1, 4]], -found[0, [5, 2]])
    assert torch.all(found.abs() <= values.abs().max()), "a scale is rounded down"
    if size >= 2.0**-120 * 448:
        assert found[0, 5] == pytest.approx(float(values[0, 5]), rel=2.0**-16, abs=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 250, 4096])
def test_again_gives_the_same_bytes(kind: Quantization, block: int) -> None:
    """Codes times scales are exact, so that what came back is on the grid."""
    fmt = BlockFormat(kind, block)
    generator = torch.Generator().manual_seed(block)
    sizes = torch.logspace(-25, 37, 300, 10.0).view(-1, 1)
    values = (torch.randn(300, block, generator=generator) * sizes).clamp(-3.4e38, 3.4e38)
    wire = there(values, fmt)
    found = back(wire, block, fmt)
    assert torch.equal(there(found, fmt), wire)
    residual = torch.zeros_like(found)
    assert torch.equal(back(there(found, fmt, residual), block, fmt), found)
    assert torch.all(residual == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_exact(kind: Quantization) -> None:
    fmt = BlockFormat(kind, 16)
    values = torch.randn(64, 64) * torch.logspace(-38, 37, 64, 10.0).view(-1, 1)
    wire = there(values, fmt)
    found = back(wire, 64, fmt)
    exact = back(wire, 64, fmt, torch.float64)
    assert torch.equal(found.double(), exact)
    scales = split(wire, 64, fmt)[1].view(64, 4, 1).double()
    steps = exact.view(64, 4, 16) / scales * (512 if kind is Quantization.fp8 else 1)
    assert torch.equal(steps, steps.round())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values_dtype", FLOATS)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float64])
def test_a_residual_is_what_was_rounded_away(
    kind: Quantization, values_dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    fmt = BlockFormat(kind, 64)
    values = torch.randn(4, 640).to(values_dtype)
    residual = (torch.randn(4, 640) * 0.01).to(residual_dtype)
    total = values.float() + residual.float()
    wire = there(values, fmt, residual)
    assert residual.dtype is residual_dtype
    assert torch.equal(wire, there(total, fmt)), "the sum is what is quantized"
    found = back(wire, 640, fmt, torch.float64)
    last_place = torch.ldexp(torch.ones_like(total), total.frexp().exponent - 24).double()
    gap = (total.double() - (found + residual.double())).abs()
    assert torch.all(gap <= last_place)
    assert torch.count_nonzero(gap) <= gap.numel() // 1000, "and mostly exact"


@pytest.mark.parametrize("kind", [Quantization.int8, Quantization.int4])
def test_feedback_makes_up_for_rounding(kind: Quantization) -> None:
    """What comes back adds up to what was sent, but for the last residual."""
    fmt = BlockFormat(kind, 32)
    gradient = torch.randn(1, 320)
    residual = torch.zeros(1, 320)
    sent, plain = torch.zeros(1, 320, dtype=torch.float64), back(there(gradient, fmt), 320, fmt)
    for _ in range(64):
        sent += back(there(gradient, fmt, residual), 320, fmt, torch.float64)
    drift = (sent / 64 - gradient).abs().max()
    assert drift < (plain - gradient).abs().max() / 16
    assert torch.allclose(sent + residual, 64 * gradient.double(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_have_no_preferred_sign(kind: Quantization) -> None:
    fmt = BlockFormat(kind, 256)
    values = torch.randn(1, 1 << 18, generator=torch.Generator().manual_seed(3))
    wire = there(values, fmt)
    error = back(wire, 1 << 18, fmt, torch.float64) - values
    assert abs(float(error.mean())) < 5 * float(error.std()) / 2**9
    assert torch.equal(back(there(-values, fmt), 1 << 18, fmt), -back(wire, 1 << 18, fmt))
    relative = float(error.norm() / values.norm())
    low, high = {"int8": (0.004, 0.008), "int4": (0.1, 0.15), "fp8": (0.02, 0.03)}[kind.name]
    assert low < relative < high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_formats_and_rows_that_lie_apart(kind: Quantization, dtype: torch.dtype) -> None:
    fmt = BlockFormat(kind, 24)
    wide = torch.randn(5, 400).to(dtype)
    values = wide[::2, 8:248]
    wires = torch.full((6, fmt.row_bytes(240) + 32), 0xA5, dtype=torch.uint8)
    wire = wires[::2, 16:-16]
    quantize(values, wire, fmt)
    assert torch.equal(wire, there(values.float().contiguous(), fmt))
    untouched = torch.ones_like(wires, dtype=torch.bool)
    untouched[::2, 16:-16] = False
    assert torch.all(wires[untouched] == 0xA5)

    outs = torch.zeros(5, 400, dtype=dtype)
    dequantize(wire, outs[::2, 8:248], fmt)
    assert torch.equal(outs[::2, 8:248], back(wire, 240, fmt).to(dtype))
    outs[::2, 8:248] = 0
    assert torch.all(outs == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("add", [False, True])
def test_sums_are_those_of_rows_in_order(
    kind: Quantization, dtype: torch.dtype, rows: int, add: bool
) -> None:
    fmt = BlockFormat(kind, 40)
    wire = there(torch.randn(rows, 400) * torch.logspace(-4, 4, rows).view(-1, 1), fmt)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    out = torch.randn(400).to(dtype)
    total = out.to(wide) if add else torch.zeros(400, dtype=wide)
    for row in back(wire, 400, fmt, wide):
        total = total + row
    dequantize_sum(wire, out, fmt, add=add)
    assert torch.equal(out, total.to(dtype))


def test_a_sum_with_nan_is_nan() -> None:
    fmt = BlockFormat(Quantization.int4, 8)
    values = torch.ones(3, 16)
    values[1, 3] = NAN
    out = torch.zeros(16)
    dequantize_sum(there(values, fmt), out, fmt)
    assert torch.all(out[:8].isnan())
    assert torch.all((out[8:] - 3).abs() < 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 10, 250, 65536])
@pytest.mark.parametrize("num_blocks", [1, 7])
def test_bytes_of_a_wire(kind: Quantization, block: int, num_blocks: int) -> None:
    fmt, numel = BlockFormat(kind, block), block * num_blocks
    needed = numel * WIDTHS[kind] // 8 + 4 * num_blocks
    assert fmt.row_bytes(numel) % 16 == 0
    assert needed <= fmt.row_bytes(numel) < needed + 32
    wire = there(torch.ones(2, numel), fmt)
    codes, scales = split(wire, numel, fmt)
    used = torch.zeros_like(wire)
    split(used, numel, fmt)[0].fill_(1)
    split(used, numel, fmt)[1].view(torch.int32).fill_(0x01010101)
    assert int(used.sum()) == 2 * needed
    assert torch.all(wire[used == 0] == 0), "what fills up is always the same"
    assert codes.shape == (2, numel * WIDTHS[kind] // 8)
    assert scales.shape == (2, num_blocks)


def test_nothing_takes_no_bytes() -> None:
    fmt = BlockFormat(Quantization.int8, 8)
    assert fmt.row_bytes(0) == 0
    wire = there(torch.ones(2, 0), fmt, torch.zeros(2, 0))
    assert wire.shape == back(wire, 0, fmt).shape == (2, 0)
    dequantize_sum(wire, torch.ones(0), fmt)
    assert back(there(torch.ones(0, 8), fmt), 8, fmt).shape == (0, 8)


def test_two_elements_share_a_byte() -> None:
    fmt = BlockFormat(Quantization.int4, 8)
    wire = there(torch.tensor([[7.0, -1, 0, 3, 2, -7, -1, 0]]), fmt)
    codes, scales = split(wire, 8, fmt)
    assert codes.tolist() == [[16 * 2 + 7, 16 * -7 - 1, 16 * -1 + 0, 16 * 0 + 3]]
    assert scales.tolist() == [[1.0]]


def test_gradients_are_not_recorded() -> None:
    fmt = BlockFormat(Quantization.int8, 8)
    values = torch.randn(1, 8, requires_grad=True)
    assert not back(there(values, fmt), 8, fmt).requires_grad


def test_what_does_not_fit_is_said() -> None:
    fmt = BlockFormat(Quantization.int8, 8)
    values, wire = torch.randn(2, 16), torch.zeros(2, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="choose one of int8, int4, fp8"):
        BlockFormat(Quantization.none, 8)
    with pytest.raises(ValueError, match="block=9.*even"):
        BlockFormat(Quantization.int4, 9)
    with pytest.raises(ValueError, match="17 elements: no multiple of block=8"):
        fmt.row_bytes(17)
    with pytest.raises(ValueError, match=r"needs torch.uint8 \(2, 32\)"):
        quantize(values, wire[:, :16], fmt)
    with pytest.raises(ValueError, match=r"needs floats \(K, N\)"):
        quantize(values.int(), wire, fmt)
    with pytest.raises(ValueError, match="neighbours"):
        quantize(torch.randn(16, 2).t(), wire, fmt)
    with pytest.raises(ValueError, match="residual: is"):
        quantize(values, wire, fmt, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        quantize(values, torch.zeros(2, 64, dtype=torch.uint8)[:, 1:33], fmt)
    with pytest.raises(ValueError, match=r"sums need \(K, W\) -> \(N,\)"):
        dequantize_sum(wire[:0], torch.zeros(16), fmt)
