"""What peers' training loops share: batches, microbatches, the loss, learning rates, AdamW."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.data.source import Batch
from phalanx.train.optim.config import OptimConfig
from phalanx.train.optim.schedule import learning_rate


class Peer(ABC):
    """A loop over microbatches on ranks that are all data-parallel."""

    model: Any
    """Called as phalanx.train.model.transformer.Transformer is."""
    optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config = config
        self.device = ranks.device
        self.world_size = ranks.world_size
        rows = config.training.global_batch_size // ranks.world_size
        self.num_microbatches = rows // config.training.microbatch_size

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients of a microbatch; `last`: of the step."""

    @abstractmethod
    def update(self) -> None:
        """The step's end: clip, update, drop gradients."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held open."""

    def run(self, batches: Iterator[Batch], first: int, steps: int) -> float:
        """Train `steps` steps; the last one's loss."""
        loss = 0.0
        for step in range(first, first + steps):
            loss = self._step(next(batches), step)
        return loss

    def _step(self, batch: Batch, step: int) -> float:
        count = torch.tensor([batch.num_valid], device=self.device)
        dist.all_reduce(count)
        num_valid = int(count.item())
        lr = learning_rate(self.config.optim.lr, step, self.config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for index in range(self.num_microbatches):
            loss = self._loss(batch, index) / num_valid
            # Peers average over ranks; the loss is a share of a global mean already.
            self.backward(loss * self.world_size, last=index == self.num_microbatches - 1)
            total += loss.detach()
        self.update()
        dist.all_reduce(total)
        return float(total.item())

    def _loss(self, batch: Batch, index: int) -> Tensor:
        """Summed over the tokens of a microbatch."""
        size = self.config.training.microbatch_size
        rows = slice(index * size, (index + 1) * size)
        document = None if batch.document_BS is None else batch.document_BS[rows]
        logits = self.model(
            batch.tokens_BS[rows].to(self.device),
            positions_BS=batch.positions_BS[rows].to(self.device),
            document_BS=None if document is None else document.to(self.device),
        )
        labels = batch.labels_BS[rows].to(self.device).flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Torch's AdamW, fused, with the run's settings; vectors do not decay."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr.peak,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
