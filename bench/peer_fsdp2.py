"""A peer of the benches: a training loop as one writes it by hand over FSDP2."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from phalanx.parallel.ranks import Ranks
from phalanx.train.build import torch_dtypes
from phalanx.train.config import Config
from phalanx.train.data.source import Batch
from phalanx.train.model.init import init_weights
from phalanx.train.model.transformer import Transformer
from phalanx.train.optim.config import OptimConfig
from phalanx.train.optim.schedule import learning_rate


class PeerLoop:
    """Same model, data, precision, microbatches and ZeRO stage (gradients are reduced at the same
    moments); torch's own sharding, clipping and AdamW."""

    def __init__(self, config: Config, ranks: Ranks, *, root_stays: bool = False) -> None:
        """`root_stays`: what no block holds (embedding, last norm, head) is gathered once a
        microbatch and not freed before its backward, torch's default."""
        self.config = config
        self.device = ranks.device
        dtypes = torch_dtypes(config.precision)
        with torch.device("meta"):
            self.model = Transformer(config.model).to(dtypes.params)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(ranks.device_type, (ranks.world_size,)),
            "reshard_after_forward": config.zero.stage == 3,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=dtypes.compute, reduce_dtype=dtypes.reduce, cast_forward_inputs=False
            ),
        }
        for block in self.model.layers.values():
            fully_shard(block, **options)
        if root_stays:
            options["reshard_after_forward"] = None
        fully_shard(self.model, **options)
        self.sharded = cast(FSDPModule, self.model)
        self.model.to_empty(device=ranks.device)
        self.model.tie_weights()
        init_weights(self.model, config.model, seed=config.training.seed)
        # FSDP2 averages over ranks; the loss below is a share of a global mean.
        self.world_size = ranks.world_size
        self.optimizer = adamw(self.model.parameters(), config.optim)
        rows = config.training.global_batch_size // ranks.world_size
        self.num_microbatches = rows // config.training.microbatch_size

    def run(self, batches: Iterator[Batch], first: int, steps: int) -> float:
        """Train `steps` steps; the last one's loss."""
        loss = 0.0
        for step in range(first, first + steps):
            loss = self._step(next(batches), step)
        return loss

    def close(self) -> None:
        """Nothing is held open."""

    def _step(self, batch: Batch, step: int) -> float:
        count = torch.tensor([batch.num_valid], device=self.device)
        dist.all_reduce(count)
        num_valid = int(count.item())
        total = torch.zeros((), device=self.device)
        for index in range(self.num_microbatches):
            if self.config.zero.stage < 2:
                last = index == self.num_microbatches - 1
                self.sharded.set_requires_gradient_sync(last)
            size = self.config.training.microbatch_size
            rows = slice(index * size, (index + 1) * size)
            document = None if batch.document_BS is None else batch.document_BS[rows]
            logits = self.model(
                batch.tokens_BS[rows].to(self.device),
                positions_BS=batch.positions_BS[rows].to(self.device),
                document_BS=None if document is None else document.to(self.device),
            )
            labels = batch.labels_BS[rows].to(self.device).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
            loss = loss / num_valid
            (loss * self.world_size).backward()
            total += loss.detach()
        if self.config.optim.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm)
        lr = learning_rate(self.config.optim.lr, step, self.config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(total)
        return float(total.item())


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
