"""The peer of `phalanx bench pipeline`: torch's own schedules, run by torch.

The stages sleep as ours do. Their input gradient and their weight gradient are nodes of autograd's
graph of their own, which is what torch's split of the backward pass needs to run one without the
other. Torch computes both together on stage 0, whose input needs no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from phalanx.bench.pipeline import emulated
from phalanx.bench.pipeline.emulated import OpSeconds
from phalanx.parallel.pipeline.graph import loop_placement, v_placement

PEERS: dict[str, tuple[Callable[..., Any], int, Callable[[int], tuple[int, ...]]]] = {
    "torch_1f1b": (Schedule1F1B, 1, loop_placement),
    "torch_interleaved_zb": (ScheduleInterleavedZeroBubble, 2, lambda p: loop_placement(p, 2)),
    "torch_zbv": (ScheduleZBVZeroBubble, 2, v_placement),
}
"""Schedule, stages a rank, and placement, by the name in the table."""


class PeerPipeline:
    """One rank's stages under one of torch's schedules."""

    def __init__(
        self, name: str, seconds: OpSeconds, *, num_microbatches: int, group: dist.ProcessGroup
    ) -> None:
        schedule, chunks, place = PEERS[name]
        placement = place(group.size())
        num_stages = len(placement)
        self.num_microbatches = num_microbatches
        self.stages = {
            index: TorchStage(seconds, first=index == 0)
            for index, owner in enumerate(placement)
            if owner == group.rank()
        }
        self.last = num_stages - 1 in self.stages
        wrapped = [
            PipelineStage(
                module,
                index,
                num_stages,
                torch.device("cpu"),
                input_args=(emulated.tokens(1).to("meta") if index == 0 else emulated.boundary()),
                output_args=emulated.boundary(),
                group=group,
            )
            for index, module in self.stages.items()
        ]
        self._schedule = schedule(
            wrapped if chunks > 1 else wrapped[0],
            n_microbatches=num_microbatches,
            loss_fn=emulated.loss,
            scale_grads=False,
        )

    def step(self) -> None:
        """Every microbatch forward and backward."""
        tokens = emulated.tokens(self.num_microbatches)
        losses: list[Tensor] = []
        self._schedule.step(
            *((tokens,) if 0 in self.stages else ()),
            target=tokens if self.last else None,
            losses=losses,
            return_outputs=False,
        )

    def weights(self) -> list[nn.Parameter]:
        """Whose gradients tell whether all was done."""
        return [stage.weight for stage in self.stages.values()]


class TorchStage(nn.Module):
    """Adds its weight to its input, as `EmulatedStage`; splits as torch splits."""

    def __init__(self, seconds: OpSeconds, *, first: bool) -> None:
        super().__init__()
        self.seconds = seconds
        self.first = first
        self.weight = nn.Parameter(torch.zeros(emulated.WIDTH))
        # Without something below that learns, stage 0 would have no input gradient to compute.
        self.embedding = nn.Parameter(torch.zeros(emulated.WIDTH)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """As `EmulatedStage.forward`."""
        if self.embedding is not None:
            x = emulated.embedded(x) + self.embedding
        self.seconds.sleep(self.seconds.f)
        y: Tensor = _InputGradient.apply(x, self.seconds)
        return y + _WeightGradient.apply(self.weight, self.seconds)


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: OpSeconds) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.seconds.sleep(ctx.seconds.b)
        return grads[0].clone(memory_format=torch.contiguous_format), None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, seconds: OpSeconds) -> Tensor:
        ctx.seconds = seconds
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.seconds.sleep(ctx.seconds.w)
        return grads[0], None
