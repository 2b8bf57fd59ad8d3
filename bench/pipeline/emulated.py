"""Pipeline stages that take time but no processor: what `phalanx bench pipeline` runs.

Every operation sleeps for what it costs, so that eight ranks on two cores behave like eight
devices. Around it everything is real: autograd, the split of the backward pass, the tensors sent.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.parallel.pipeline.wgrad import WeightGradientStore

SEQ_LEN, WIDTH = 32, 64
"""Tokens of a microbatch, and channels: 8 KiB pass between two stages."""


@dataclass
class OpSeconds:
    """What a stage's operations sleep, in seconds; `awake` turns them on."""

    f: float
    b: float
    w: float
    awake: bool = True
    """False: nothing sleeps, to warm up quickly."""

    @classmethod
    def share(cls, seconds: tuple[float, float, float], *, chunks: int) -> "OpSeconds":
        """Those of one of a rank's `chunks` equal stages, from F, B and W of them all."""
        f, b, w = (s / chunks for s in seconds)
        return cls(f, b, w)

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass without computing."""
        if self.awake:
            time.sleep(seconds)


def boundary() -> Tensor:
    """What passes between stages, fp32 (1, SEQ_LEN, WIDTH), on the meta device."""
    return torch.empty(1, SEQ_LEN, WIDTH, device="meta", requires_grad=True)


def tokens(num_microbatches: int) -> Tensor:
    """What enters stage 0 in a step, int64 (num_microbatches, SEQ_LEN)."""
    return torch.ones(num_microbatches, SEQ_LEN, dtype=torch.int64)


def embedded(tokens_BS: Tensor) -> Tensor:
    """Tokens as channels, fp32 (B, SEQ_LEN, WIDTH)."""
    return tokens_BS.float().unsqueeze(-1).expand(-1, -1, WIDTH)


def loss(output: Tensor, _target: Tensor) -> Tensor:
    """A sum, so that every weight's gradient is known."""
    return output.sum()


def check_gradient(weight: Tensor, *, num_microbatches: int, steps: int, who: str) -> None:
    """Whether every microbatch of every step added its gradient: one a token.

    Raises:
        RuntimeError: some did not, so that the time measured is not worth anything.
    """
    expected = float(num_microbatches * steps * SEQ_LEN)
    found = None if weight.grad is None else weight.grad
    if found is None or not torch.all(found == expected):
        text = "none" if found is None else f"{float(found.min()):g} to {float(found.max()):g}"
        raise RuntimeError(f"{who}: wrong weight gradient ({text}); it should be {expected:g}")


class EmulatedStage(nn.Module):
    """Adds its weight to its input, and takes its time for it.

    The weight gradient goes through the store that real layers use, so B and W come apart, or not,
    as in training.
    """

    def __init__(self, seconds: OpSeconds, store: WeightGradientStore, *, first: bool) -> None:
        super().__init__()
        self.seconds = seconds
        self.store = store
        self.first = first
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, SEQ_LEN) tokens on the first stage, (B, SEQ_LEN, WIDTH) on others, to the latter."""
        if self.first:
            x = embedded(x)
        y: Tensor = _Emulated.apply(x, self.weight, self)
        return y


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: EmulatedStage) -> Tensor:
        ctx.stage = stage
        stage.seconds.sleep(stage.seconds.f)
        return x + weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        stage: EmulatedStage = ctx.stage
        stage.seconds.sleep(stage.seconds.b)

        def weight_gradient() -> None:
            stage.seconds.sleep(stage.seconds.w)
            found = grad.sum(dim=(0, 1))
            if stage.weight.grad is None:
                stage.weight.grad = found
            else:
                stage.weight.grad += found

        stage.store.defer(weight_gradient)
        return grad.clone(memory_format=torch.contiguous_format), None, None
