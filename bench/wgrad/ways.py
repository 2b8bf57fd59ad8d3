"""Three ways to run a backward pass over the same stage: what `phalanx bench wgrad` compares.

Each holds a stage of its own with the same weights, and takes a microbatch through F, B and W. What
it holds between B and W is what a zero-bubble schedule holds.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from phalanx.parallel.pipeline.wgrad import WeightGradientStore, defer_weight_gradients
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.engine.build import torch_dtypes
from phalanx.train.model.init import init_weights
from phalanx.train.model.transformer import Transformer


class Plain:
    """Autograd's own backward, both gradients in one: B does all, W nothing."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        training = config.training
        with torch.device("meta"):
            layers = range(1, config.model.num_layers)
            stage = Transformer(config.model, layers=layers).to(
                torch_dtypes(config.precision).compute
            )
        self.prepare(stage)
        self.stage = stage.to_empty(device=ranks.device)
        init_weights(self.stage, config.model, seed=training.seed)
        generator = torch.Generator().manual_seed(training.seed + ranks.rank)
        shape = training.microbatch_size, training.seq_len
        dtype = torch_dtypes(config.precision).compute
        x = torch.randn(*shape, config.model.dim, generator=generator)
        labels = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        self.x_BSD = x.to(ranks.device, dtype)
        self.labels_BS = labels.to(ranks.device)
        self.positions_BS = torch.arange(shape[1], device=ranks.device).expand(shape)

    def prepare(self, stage: Transformer) -> None:
        """Before the weights are there."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """F: the stage's input, and the loss; the stage is all but the first layer, and the head.

        Torch's split needs an input with a gradient, so nothing is compared on the first stage.
        """
        x = self.x_BSD.detach().requires_grad_()
        logits = self.stage(x, positions_BS=self.positions_BS)
        return x, F.cross_entropy(logits.flatten(0, 1).float(), self.labels_BS.flatten())

    def input_gradient(self, x: Tensor, loss: Tensor) -> Callable[[], object]:
        """B, in place of x.grad; returns W."""
        loss.backward()
        return lambda: None


class Deferred(Plain):
    """Our store."""

    def prepare(self, stage: Transformer) -> None:
        """See `Plain.prepare`."""
        self.store = WeightGradientStore()
        defer_weight_gradients(stage, self.store)

    def input_gradient(self, x: Tensor, loss: Tensor) -> Callable[[], object]:
        """See `Plain.input_gradient`."""
        with self.store.deferring():
            loss.backward()
        return self.store.take()


class TorchSplit(Plain):
    """Torch's split of autograd's graph, as its pipeline stages call it."""

    def input_gradient(self, x: Tensor, loss: Tensor) -> Callable[[], object]:
        """See `Plain.input_gradient`."""
        weights = list(self.stage.parameters())
        outputs = [loss]
        _, groups = stage_backward_input(outputs, None, [x], iter(weights))
        # Torch's stages keep inputs and outputs until W, too.
        held: list[Any] = [x, outputs, groups]
        return lambda: stage_backward_weight(iter(weights), held[2])


WAYS: dict[str, type[Plain]] = {"plain": Plain, "deferred": Deferred, "torch_split": TorchSplit}
"""By the name in the table."""
