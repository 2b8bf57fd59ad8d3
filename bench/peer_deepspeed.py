"""The peer of `phalanx bench zero`: the same training through DeepSpeed's ZeRO-3 engine.

DeepSpeed joins the process group that is there. Its settings are its defaults, so parameters of
less than 100,000 elements stay gathered between uses; the optimizer is torch's AdamW.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from phalanx.bench.peer_fsdp2 import adamw
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.data.source import Batch
from phalanx.train.model.init import init_weights
from phalanx.train.model.transformer import Transformer
from phalanx.train.optim.schedule import learning_rate


def installed() -> bool:
    """Whether the peer can run here."""
    return importlib.util.find_spec("deepspeed") is not None


def settings(config: Config, *, num_microbatches: int) -> dict[str, Any]:
    """DeepSpeed's configuration of the run: ZeRO-3 in fp32, as it is by default."""
    return {
        "train_micro_batch_size_per_gpu": config.training.microbatch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }


class DeepSpeedLoop:
    """Same model, data, microbatches and learning rates in fp32; all ranks are data-parallel."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """In the ranks' process group; collective."""
        self.config = config
        self.device = ranks.device
        self.world_size = ranks.world_size
        rows = config.training.global_batch_size // ranks.world_size
        self.num_microbatches = rows // config.training.microbatch_size
        deepspeed = _imported(ranks)
        model = Transformer(config.model).to(ranks.device)
        init_weights(model, config.model, seed=config.training.seed)
        self.optimizer = adamw(model.parameters(), config.optim)
        with redirect_stdout(sys.stderr):  # it prints; a bench's output is a table
            self.engine: Any = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=settings(config, num_microbatches=self.num_microbatches),
                dist_init_required=False,
            )[0]

    def run(self, batches: Iterator[Batch], first: int, steps: int) -> float:
        """Train `steps` steps; the last one's loss."""
        loss = 0.0
        for step in range(first, first + steps):
            loss = self._step(next(batches), step)
        return loss

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()

    def _step(self, batch: Batch, step: int) -> float:
        count = torch.tensor([batch.num_valid], device=self.device)
        dist.all_reduce(count)
        num_valid = int(count.item())
        lr = learning_rate(self.config.optim.lr, step, self.config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for index in range(self.num_microbatches):
            size = self.config.training.microbatch_size
            rows = slice(index * size, (index + 1) * size)
            document = None if batch.document_BS is None else batch.document_BS[rows]
            logits = self.engine(
                batch.tokens_BS[rows].to(self.device),
                positions_BS=batch.positions_BS[rows].to(self.device),
                document_BS=None if document is None else document.to(self.device),
            )
            labels = batch.labels_BS[rows].to(self.device).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / num_valid
            # Gradients are averaged over ranks; the loss is a share of a global mean already.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            self.engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total.item())


def _imported(ranks: Ranks) -> Any:
    """The package, told in its way who this rank is."""
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    if ranks.device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # It calls functions that torch has renamed since; at each step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with redirect_stdout(sys.stderr):
        import deepspeed

        backend = "gloo" if ranks.device_type == "cpu" else "nccl"
        deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    return deepspeed
