"""Running one step's microbatches through the part of the model that this rank holds.

An executor computes gradients over a batch of microbatches (`backward`), or outputs alone
(`forward`). This one serves a rank that holds the whole model; `pipeline/runtime.py` has the one
for stages.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from phalanx.parallel.zero.shard import Sharding

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(output, target) of a microbatch -> its share of the step's loss, to be summed."""


class Inputs(NamedTuple):
    """What a rank computes in one step; dim 0 of every tensor counts samples."""

    tokens_BS: Tensor
    target_BS: Tensor
    extra: dict[str, Tensor]
    """Keyword arguments of the model, needed by every stage."""

    def split(self, num_microbatches: int) -> list["Inputs"]:
        """Equal parts, in order."""
        extra = {name: value.chunk(num_microbatches) for name, value in self.extra.items()}
        return [
            Inputs(tokens, target, {name: value[i] for name, value in extra.items()})
            for i, (tokens, target) in enumerate(
                zip(
                    self.tokens_BS.chunk(num_microbatches),
                    self.target_BS.chunk(num_microbatches),
                    strict=True,
                )
            )
        ]


class Executor(Protocol):
    """What the trainer asks of a rank's part of the model."""

    def backward(self, inputs: Inputs, loss_fn: LossFn) -> Tensor:
        """Accumulate gradients; the sum of the microbatches' losses, 0 where there is no head."""

    def forward(self, inputs: Inputs, num_microbatches: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Each microbatch with its output, without gradients; empty where there is no head."""


class WholeModelExecutor:
    """Gradient accumulation over microbatches on a rank that holds every layer."""

    def __init__(self, model: nn.Module, sharding: Sharding, *, num_microbatches: int) -> None:
        self.model = model
        self.num_microbatches = num_microbatches
        self.sharding = sharding

    def backward(self, inputs: Inputs, loss_fn: LossFn) -> Tensor:
        """See `Executor.backward`."""
        total: Tensor | None = None
        microbatches = inputs.split(self.num_microbatches)
        for index, part in enumerate(microbatches):
            last = index == len(microbatches) - 1
            self.sharding.before_backward(last=last)
            loss = loss_fn(self.model(part.tokens_BS, **part.extra), part.target_BS)
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    @torch.no_grad()
    def forward(self, inputs: Inputs, num_microbatches: int) -> Iterator[tuple[Inputs, Tensor]]:
        """See `Executor.forward`."""
        for part in inputs.split(num_microbatches):
            yield part, self.model(part.tokens_BS, **part.extra)
