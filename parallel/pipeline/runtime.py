"""Pipeline stages run by torch's schedules.

Stages and shapes are declared up front, so that no shape is ever negotiated between ranks. Losses
are summed, never averaged. Under FSDP2 torch's runtime reduces gradients once, after a step's last
microbatch, at every ZeRO stage.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.schedules import _PipelineSchedule

from phalanx.parallel.executor import Inputs, LossFn

_SCHEDULES: dict[str, Callable[..., _PipelineSchedule]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


class PipelineExecutor:
    """The stages that one pipeline rank holds, under a schedule.

    `boundary` is the shape and dtype of what passes between stages for one microbatch; `output`
    that of the last stage's output (both as meta tensors); `group` the pipeline ranks.
    """

    def __init__(
        self,
        stages: dict[int, nn.Module],
        *,
        num_stages: int,
        num_microbatches: int,
        schedule: str,
        group: dist.ProcessGroup,
        device: torch.device,
        tokens: Tensor,
        boundary: Tensor,
        output: Tensor,
    ) -> None:
        self.stages = stages
        self.num_stages = num_stages
        self.group = group
        self.boundary = boundary
        self.device = device
        self._loss_fn: LossFn | None = None
        wrapped = [
            PipelineStage(
                module,
                index,
                num_stages,
                device,
                input_args=tokens if index == 0 else boundary,
                output_args=output if index == num_stages - 1 else boundary,
                group=group,
            )
            for index, module in stages.items()
        ]
        self._schedule = _SCHEDULES[schedule](
            wrapped if schedule == "interleaved" else wrapped[0],
            n_microbatches=num_microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def backward(self, inputs: Inputs, loss_fn: LossFn) -> Tensor:
        """See `Executor.backward`."""
        self._loss_fn = loss_fn
        losses: list[Tensor] = []
        args = (inputs.tokens_BS,) if 0 in self.stages else ()
        self._schedule.step(
            *args,
            target=inputs.target_BS if self.num_stages - 1 in self.stages else None,
            losses=losses,
            return_outputs=False,
            **inputs.extra,  # type: ignore[arg-type]
        )
        self._loss_fn = None
        if not losses:
            return torch.zeros((), device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def forward(self, inputs: Inputs, num_microbatches: int) -> Iterator[tuple[Inputs, Tensor]]:
        """See `Executor.forward`. Microbatches follow each other through the stages."""
        sends: list[dist.Work] = []
        kept: list[Tensor] = []
        for part in inputs.split(num_microbatches):
            for index, module in self.stages.items():
                x = part.tokens_BS if index == 0 else self._receive(part, index - 1)
                x = module(x, **part.extra)
                if index == self.num_stages - 1:
                    yield part, x
                    continue
                work = dist.isend(
                    x.contiguous(), group=self.group, group_dst=self._owner(index + 1)
                )
                assert work is not None
                sends.append(work)
                kept.append(x)
        for work in sends:
            work.wait()

    def _receive(self, part: Inputs, sender: int) -> Tensor:
        shape = (part.tokens_BS.shape[0], *self.boundary.shape[1:])
        x = torch.empty(shape, dtype=self.boundary.dtype, device=self.device)
        dist.recv(x, group=self.group, group_src=self._owner(sender))
        return x

    def _owner(self, stage: int) -> int:
        return stage % self.group.size()

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        assert self._loss_fn is not None
        return self._loss_fn(output, target)
