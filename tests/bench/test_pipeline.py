"""What the benches are made of: stages that sleep, bytes that are counted, and settings."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from phalanx.bench.pipeline import emulated
from phalanx.bench.pipeline.emulated import EmulatedStage, OpSeconds, check_gradient
from phalanx.bench.pipeline.peer import TorchStage
from phalanx.bench.wgrad.live_memory import LiveMemory
from phalanx.parallel.pipeline.wgrad import WeightGradientStore
from phalanx.train.bench_config import (
    BenchConfig,
    EmulatedPipelineConfig,
    SlowNetworkConfig,
)

F, B, W = 3.0, 2.0, 1.0


class Recorded(OpSeconds):
    """Notes what would have been slept."""

    def __init__(self) -> None:
        super().__init__(F, B, W)
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def take(self) -> list[float]:
        """What was slept since the last call."""
        slept, self.slept = self.slept, []
        return slept


def boundary() -> Tensor:
    return torch.zeros(emulated.boundary().shape, requires_grad=True)


def test_emulated_stage_splits_as_the_schedule_says() -> None:
    seconds, store = Recorded(), WeightGradientStore()
    stage = EmulatedStage(seconds, store, first=False)
    for _ in range(2):
        x = boundary()
        y = stage(x)
        assert seconds.take() == [F]
        with store.deferring():
            emulated.loss(y, y).backward()
        assert seconds.take() == [B]
        assert x.grad is not None
        assert torch.all(x.grad == 1)
        store.take()()
        assert seconds.take() == [W]
    emulated.loss(stage(boundary()), x).backward()
    assert seconds.take() == [F, B, W]
    check_gradient(stage.weight, num_microbatches=3, steps=1, who="three")


@pytest.mark.parametrize("first", [False, True])
def test_torch_stage_splits_as_torch_splits(first: bool) -> None:
    seconds = Recorded()
    stage = TorchStage(seconds, first=first)
    if not first:
        x = boundary()
        y = stage(x)
        _, groups = stage_backward_input([y], [torch.ones_like(y)], [x], stage.parameters())
        assert seconds.take() == [F, B]
        stage_backward_weight(stage.parameters(), groups)
        assert seconds.take() == [W]
    else:
        emulated.loss(stage(emulated.tokens(1)), boundary()).backward()
        assert sorted(seconds.take()) == sorted([F, B, W])
    check_gradient(stage.weight, num_microbatches=1, steps=1, who="one")


@pytest.mark.parametrize("grad", [None, 2.0])
def test_work_left_out_is_seen(grad: float | None) -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = None if grad is None else torch.full((3,), grad * emulated.SEQ_LEN)
    with pytest.raises(RuntimeError, match=r"zb_v: wrong weight gradient .* should be 96"):
        check_gradient(weight, num_microbatches=3, steps=1, who="zb_v")


def test_live_memory_counts_what_the_graph_keeps() -> None:
    x = torch.ones(10, requires_grad=True)
    with LiveMemory() as live:
        y = (x * 2).exp()  # the product goes; exp keeps its result for backward
        assert live.alive() == 40
        assert live.peak == 80
        loss = y.sum()
        del y
        assert live.alive() == 44
        loss.backward()
        del loss
        assert live.alive() == 40  # x.grad
    assert x.grad is not None


def test_a_rank_s_costs_are_scaled_to_its_forward() -> None:
    settings = EmulatedPipelineConfig(costs=[4.0, 2.0, 1.0], forward_ms=8.0)
    assert settings.seconds == pytest.approx((0.008, 0.004, 0.002))


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (BenchConfig, {"rounds": 0}, ("bench.rounds=0", "at least 1")),
        (BenchConfig, {"steps": 0}, ("bench.steps=0", "at least 1")),
        (EmulatedPipelineConfig, {"ranks": 1}, ("bench.pipeline.ranks=1", "at least 2")),
        (EmulatedPipelineConfig, {"microbatches": 0}, ("microbatches=0", "at least 1")),
        (EmulatedPipelineConfig, {"microbatches": 7}, ("microbatches=7", "ranks=8", "take 8")),
        (EmulatedPipelineConfig, {"microbatches": 25}, ("microbatches=25", "take 24")),
        (EmulatedPipelineConfig, {"costs": [1.0, 2.0]}, ("costs=[1.0, 2.0]", "[F, B, W]")),
        (EmulatedPipelineConfig, {"costs": [1.0, 0.0, 1.0]}, ("costs=", "positive")),
        (EmulatedPipelineConfig, {"forward_ms": 0.0}, ("forward_ms=0.0", "above 0")),
        (BenchConfig, {"nodes": 1}, ("bench.nodes=1", "from 2")),
        (BenchConfig, {"ranks_per_node": 0}, ("bench.ranks_per_node=0", "at least 1")),
        (SlowNetworkConfig, {"mbit": 0.0}, ("bench.slow_network.mbit=0.0", "at least 0.1")),
        (SlowNetworkConfig, {"mbit": float("inf")}, ("mbit=inf", "finite")),
        (SlowNetworkConfig, {"waiting": 1.0}, ("bench.slow_network.waiting=1.0", "between 0 and")),
        (SlowNetworkConfig, {"loss_steps": -1}, ("bench.slow_network.loss_steps=-1", "or 0")),
    ],
)
def test_settings_that_mean_nothing(
    kind: type, values: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="bench") as caught:
        kind(**values)
    assert all(word in str(caught.value) for word in words)
