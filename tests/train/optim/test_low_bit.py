"""Low-bit AdamW: code books, rounding, its error beside fp32, and what it holds in memory."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from phalanx.launch.config.compose import compose
from phalanx.train.optim import low_bit
from phalanx.train.optim.adamw import AdamW
from phalanx.train.optim.block_codes import Codec, Scratch, codecs
from phalanx.train.optim.blocks import FORMATS, StateFormat, block_size, check_column_cut
from phalanx.train.optim.codebooks import CodeBook, code_books, dynamic_codes, linear_codes
from phalanx.train.optim.config import OptimConfig, OptimizerName
from phalanx.train.optim.low_bit import LowBitAdamW
from phalanx.train.optim.registry import make_optimizer

LOW_BIT = sorted(FORMATS, key=lambda name: name.name)
SIGNED_8, UNSIGNED_8 = code_books(8)
SIGNED_4, LINEAR_4 = code_books(4)
CPU = torch.device("cpu")
SHAPES = {
    "wide": (24, 512),
    "odd": (140, 37),
    "cube": (9, 16, 32),
    "small": (4, 64),
    "norm": (300,),
}


def config_of(name: OptimizerName) -> OptimConfig:
    return OptimConfig(name=name, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Gradients whose sizes spread over some decades, as real ones do."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        normal = torch.randn(parameter.shape, generator=generator)
        sizes = 10.0 ** -(3 * torch.rand(parameter.shape, generator=generator))
        parameter.grad = (normal * sizes).to(parameter.dtype)


def encoded(book: CodeBook, values: Tensor) -> Tensor:
    codes = torch.empty(len(values), dtype=torch.int32)
    book.encode(values, codes, integers=torch.empty_like(codes), floats=torch.empty_like(values))
    return codes


def round_trip(codec: Codec, values: Tensor) -> Tensor:
    """Values (N, B) as their codes give them back."""
    blocks, size = values.shape
    codes = torch.full((blocks, -(-size // codec.per_byte)), 7, dtype=torch.uint8)
    scales = torch.empty(blocks, 1)
    scratch = Scratch(blocks * (size + 1), dtype=values.dtype, device=CPU)
    codec.encode(values, codes, scales, scratch)
    found = torch.empty_like(values)
    codec.decode(codes, scales, found, scratch)
    return found


def test_code_books_are_the_published_ones() -> None:
    """Some values of bitsandbytes' dynamic maps and of the 4-bit paper's maps."""
    assert [len(book.values) for book in (SIGNED_8, UNSIGNED_8, SIGNED_4)] == [256, 256, 16]
    for book, places in (
        (SIGNED_8, {0: -0.992968738, 63: -0.107031256, 126: -5.5e-7, 127: 0.0, 254: 0.992968738}),
        (UNSIGNED_8, {0: 0.0, 1: 3.25e-7, 2: 7.75e-7, 63: 0.010703126, 127: 0.103515625, 255: 1.0}),
    ):
        for place, value in places.items():
            assert float(book.values[place]) == pytest.approx(value, rel=1e-6)
    half = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [-value for value in reversed(half)] + [0.0, *half, 1.0]
    torch.testing.assert_close(SIGNED_4.values, torch.tensor(expected))
    assert LINEAR_4.values.tolist() == [i / 16 for i in range(1, 17)]
    with_zero = [0, 0.00325, 0.00775, 0.02125, 0.04375, 0.06625, 0.08875, 0.15625, 0.26875, 0.38125]
    assert dynamic_codes(bits=4, signed=False)[:10] == pytest.approx(with_zero)


@pytest.mark.parametrize("book", [SIGNED_8, UNSIGNED_8, SIGNED_4, LINEAR_4])
def test_table_rounds_as_a_search_does(book: CodeBook) -> None:
    generator = torch.Generator().manual_seed(1)
    values = 10 ** -(7 * torch.rand(1 << 14, generator=generator))
    if book in (SIGNED_8, SIGNED_4):
        values = torch.cat((values, -values))
    middles = book.middles[:-1]
    beside = torch.cat((middles.nextafter(torch.tensor(2.0)), middles.nextafter(-torch.ones(()))))
    values = torch.cat((values, book.values, middles, beside.clamp(-1, 1), torch.tensor([0.0])))
    if book in (UNSIGNED_8, LINEAR_4):
        values = values.clamp_min(0)
    assert torch.equal(encoded(book, values), torch.bucketize(values, middles).int())


def test_only_zero_becomes_zero_in_second_moments() -> None:
    tiny = torch.tensor([0.0, 1e-30, 1e-7, 3.25e-7, 1.0])
    assert encoded(UNSIGNED_8, tiny).tolist() == [0, 1, 1, 1, 255]
    assert encoded(SIGNED_8, tiny)[:2].tolist() == [127, 127]


def test_code_books_that_the_table_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="too close"):
        CodeBook([0.5, 0.5001, 0.5002, 1.0])
    with pytest.raises(ValueError, match="ascend"):
        CodeBook([0.5, 0.2])


@pytest.mark.parametrize("size", [256, 43])
@pytest.mark.parametrize("name", LOW_BIT)
def test_round_trip_gives_the_nearest_values(name: OptimizerName, size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(50, size, generator=generator) * torch.logspace(-12, 3, 50)[:, None]
    values[3] = 0
    for codec, moment in zip(codecs(FORMATS[name]), (values, values**2), strict=True):
        found = round_trip(codec, moment)
        scales = moment.abs().amax(1, keepdim=True)
        allowed = codec.book.values * scales[..., None]  # (N, 1, codes)
        nearest = (moment[..., None] - allowed).abs().amin(-1)
        if codec.book is UNSIGNED_8:  # zero is for zero
            nearest = (moment[..., None] - allowed[..., 1:]).abs().amin(-1)
        nearest[3] = 0
        error = (found - moment).abs()
        assert (error <= nearest * (1 + 1e-5) + scales * 1e-6).all()
        if codec.book in (UNSIGNED_8, LINEAR_4):  # a largest element of -1 is not kept, 1 is
            assert torch.equal(round_trip(codec, found), found), "rounding twice is rounding once"


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_block_with_a_number_that_is_not_finite_says_so(name: OptimizerName) -> None:
    for codec in codecs(FORMATS[name]):
        for bad in (torch.nan, -torch.nan, torch.inf):
            values = torch.rand(3, 64)
            values[1, 5] = bad
            found = round_trip(codec, values)
            assert not found[1].isfinite().any()
            assert found[0].isfinite().all()
            assert found[2].isfinite().all()


def test_second_moments_rounded_to_zero_explode() -> None:
    """Li et al., section 4.1: the zero point of a 4-bit code, and the linear code without it."""
    state = FORMATS[OptimizerName.adamw4bit]
    grad = torch.full((1, 128), 1e-3)
    grad[0, 0] = 1.0
    v = grad**2
    exact = grad / (v.sqrt() + 1e-8)
    with_zero = Codec(CodeBook(dynamic_codes(bits=4, signed=False)), state)
    exploded = grad / (round_trip(with_zero, v).sqrt() + 1e-8)
    assert exploded.max() > 1e4 * exact.max()
    linear = Codec(CodeBook(linear_codes(bits=4)), state)
    assert (grad / (round_trip(linear, v).sqrt() + 1e-8)).max() <= 1.001 * exact.max()


def trained(name: OptimizerName, *, steps: int = 50) -> tuple[list[float], Tensor]:
    """Losses of least squares with noisy inputs, and the weights."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(32, 128, generator=generator)
    weight = nn.Parameter(torch.zeros(32, 128))
    optimizer = make_optimizer({"weight": weight}, OptimConfig(name=name, weight_decay=0.0))
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 128, generator=generator) * torch.logspace(-1, 0, 128)
        loss = ((x @ (weight - target).T) ** 2).mean()
        loss.backward()
        optimizer.step(5e-2)
        losses.append(float(loss.detach()))
    return losses, weight.detach()


def test_training_stays_near_fp32() -> None:
    exact, weights = trained(OptimizerName.adamw)
    assert exact[-1] < 0.1 * exact[0]
    for name, apart, share in (
        (OptimizerName.adamw8bit, 0.02, 0.995),
        (OptimizerName.adamw4bit, 0.25, 0.94),
    ):
        losses, found = trained(name)
        assert exact[0] - losses[-1] > share * (exact[0] - exact[-1]), name
        assert 0 < float((found - weights).norm() / weights.norm()) < apart, name


@pytest.mark.parametrize(("name", "allowed"), [*zip(LOW_BIT, (1.07, 2.04), strict=True)])
def test_bytes_a_parameter(name: OptimizerName, allowed: float) -> None:
    shape = (512, 1024)
    optimizer = make_optimizer({"w": nn.Parameter(torch.zeros(shape))}, OptimConfig(name=name))
    held = sum(t.numel() * t.element_size() for t in optimizer.state_tensors().values())
    state = FORMATS[name]
    scales = 4 / 128  # 1024 columns fall into 8 parts
    assert held == 512 * 1024 * 2 * (state.bits / 8 + scales) + 4
    long = block_size((4096, 14336), state)
    assert long == state.block
    assert 2 * (state.bits / 8 + 4 / long) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOW_BIT)
def test_a_row_computes_alone_what_it_computes_among_others(
    name: OptimizerName, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also in slices of another size."""
    whole = make_parameters(dtype)
    optimizer = LowBitAdamW(whole, config_of(name))
    again = make_parameters(dtype)
    sliced = LowBitAdamW(again, config_of(name))
    for step in range(4):
        for named, each, limit in ((whole, optimizer, 2**16), (again, sliced, 300)):
            monkeypatch.setitem(low_bit.SLICE, "cpu", limit)
            set_gradients(named, step)
            each.step(1e-2)
    assert all(torch.equal(whole[name], again[name]) for name in SHAPES)
    states = sliced.state_tensors()
    for key, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, states[key]), key
    kinds = {key.split(".")[1] for key in states if key.endswith((".wide", ".odd", ".cube"))}
    parts = {f"exp_avg{sq}_{part}" for sq in ("", "_sq") for part in ("codes", "scales")}
    assert kinds == parts | {"step"}
    assert {"optim.exp_avg.small", "optim.exp_avg_sq.norm"} < states.keys()


@pytest.mark.parametrize("name", LOW_BIT)
def test_vectors_and_small_matrices_equal_plain_adamw(name: OptimizerName) -> None:
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    optimizer, plain = LowBitAdamW(ours, config_of(name)), AdamW(theirs, config_of(name))
    for step in range(3):
        for named, each in ((ours, optimizer), (theirs, plain)):
            set_gradients(named, step)
            each.step(1e-2)
    for key in ("small", "norm"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-14, atol=1e-14)
    assert not torch.equal(ours["wide"], theirs["wide"])


@pytest.mark.parametrize("name", LOW_BIT)
def test_state_loaded_in_place_continues_bit_for_bit(name: OptimizerName) -> None:
    parameters = make_parameters()
    optimizer = LowBitAdamW(parameters, config_of(name))
    for step in range(2):
        set_gradients(parameters, step)
        optimizer.step(0.1)
    copies = {key: nn.Parameter(p.detach().clone()) for key, p in parameters.items()}
    resumed = LowBitAdamW(copies, config_of(name))
    for key, tensor in resumed.state_tensors().items():
        tensor.copy_(optimizer.state_tensors()[key])
    for named, each in ((parameters, optimizer), (copies, resumed)):
        set_gradients(named, 2)
        each.step(0.1, keep_gradients=True)
    assert all(torch.equal(parameters[key], copies[key]) for key in SHAPES)
    assert all(p.grad is not None for p in copies.values())
    resumed.drop_gradients()
    before = copies["wide"].detach().clone()
    resumed.step(0.1)
    assert torch.equal(copies["wide"], before), "without a gradient nothing moves"


def test_blocks_follow_from_the_whole_shape() -> None:
    eight, four = StateFormat(bits=8, block=256), StateFormat(bits=4, block=128)
    found = {
        (4096, 14336): (256, 128),  # Llama 3 8B's w2
        (8192, 28672): (256, 128),
        (5120, 25600): (200, 128),  # Qwen 3 32B's
        (192, 192): (48, 48),
        (298, 37): (37, 37),
        (70, 257): (257, 257),
        (64, 63): (None, None),  # under 4096 elements
        (2, 3, 4): (None, None),
        (10_000, 16): (None, None),
        (10_000,): (None, None),
    }
    for shape, expected in found.items():
        assert (block_size(shape, eight), block_size(shape, four)) == expected, shape


def test_a_cut_inside_a_block_is_refused() -> None:
    for name in LOW_BIT:
        for parts in (1, 2, 4, 8):
            check_column_cut(name, "w2", (4096, 14336), parts=parts)
    with pytest.raises(ValueError, match=r"optim.name=adamw8bit: parallel.tp=3 cuts the 192 col"):
        check_column_cut(OptimizerName.adamw8bit, "wo", (192, 192), parts=3)
    check_column_cut(OptimizerName.adamw, "wo", (192, 192), parts=3)


AFTER_FORK = """
import os, signal
import phalanx.train.trainer
import torch
if os.fork() == 0:
    signal.alarm(30)
    torch.zeros(2**20).mul_(2)
    os._exit(0)
raise SystemExit(os.wait()[1] != 0)
"""


def test_imports_start_no_threads() -> None:
    """Ranks are forked from a process that has imported the trainer; torch's threads, had an import
    started them, would not be there."""
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    assert subprocess.run([sys.executable, "-c", AFTER_FORK], env=environment).returncode == 0


def test_configuration() -> None:
    config = compose(["optim=adamw8bit", "parallel.pp=1"])
    assert config.optim.name is OptimizerName.adamw8bit
    assert compose(["optim=adamw4bit"]).optim.name is OptimizerName.adamw4bit
    with pytest.raises(ValueError, match=r"optim\.name=adamw4bit: with pipeline.post_validation"):
        compose(["optim=adamw4bit", "pipeline.post_validation=true", "parallel.pp=2"])
    three = replace(config.model, num_heads=6, num_kv_heads=6, ffn_dim=768, vocab_size=4098)
    with pytest.raises(ValueError, match=r"adamw8bit: parallel.tp=6 cuts the 192 columns of att"):
        replace(
            config,
            model=three,
            training=replace(config.training, seq_len=126),
            parallel=replace(config.parallel, tp=6),
        )
