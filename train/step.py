"""One optimizer step of one rank, in its parts: gradients, norm, update."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.parallel.executor import Inputs
from phalanx.parallel.grad_norm import (
    clip_gradients,
    local_square_norm,
    nonfinite,
    settle_partial,
)
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.tied import sync_tied_gradient
from phalanx.parallel.zero.shard import free_gathered
from phalanx.train.build import Model, build_model
from phalanx.train.config import Config
from phalanx.train.data.source import Batch
from phalanx.train.loss import global_valid_tokens, token_loss, world_sums
from phalanx.train.optim.adamw import AdamW


class Gradients(NamedTuple):
    """What a backward pass says of the step, the same on every rank."""

    loss: float
    norm: float
    """Before clipping."""
    num_tokens: int
    """Learned tokens over all ranks."""
    stop: bool
    """Some rank was asked to stop."""


class Engine:
    """This rank's model and optimizer."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config = config
        self.mesh = mesh
        self.device = device
        self.model: Model = build_model(config, mesh, device)
        self.optimizer = AdamW(self.model.parameters, config.optim)

    def gradients(self, batch: Batch, *, stop: bool = False) -> Gradients:
        """Compute this step's gradients over all ranks; collective.

        `stop` says that this rank was asked to end the run; the answer tells every rank so.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; names the parameters.
        """
        num_valid = global_valid_tokens(batch.num_valid, self.mesh)
        loss_fn = token_loss(self.mesh, num_valid)
        local_loss = self.model.executor.backward(self._inputs(batch), loss_fn)
        settle_partial(self.model.parameters.values())
        if self.model.tied_copy is not None:
            sync_tied_gradient(self.model.parameters[self.model.tied_copy], self.mesh)
        square = local_square_norm(self.model.counted_parameters, self.device)
        loss, square_norm, stops = world_sums([self._once(local_loss), square, stop], self.mesh)
        norm = math.sqrt(square_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(self._blame(loss, norm))
        return Gradients(loss, norm, num_valid, stops > 0)

    def update(self, gradients: Gradients, lr: float) -> None:
        """Clip the gradients and step the optimizer."""
        limit = self.config.optim.max_grad_norm
        if limit > 0:
            clip_gradients(self.model.parameters.values(), gradients.norm, limit)
        self.optimizer.step(lr)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss a learned token over the batches; collective, the same on every rank."""
        for module in self.model.stages.values():
            module.eval()
        total, tokens = 0.0, 0
        for batch in batches:
            local = torch.zeros((), dtype=torch.float64, device=self.device)
            loss_fn = token_loss(self.mesh, 1)
            count = self.config.num_microbatches(self.mesh.world.size())
            for part, output in self.model.executor.forward(self._inputs(batch), count):
                local += loss_fn(output, part.target_BS)
            total += world_sums([self._once(local)], self.mesh)[0]
            tokens += global_valid_tokens(batch.num_valid, self.mesh)
        self._after_forward()
        return total / max(1, tokens)

    def next_logits(self, tokens_BS: Tensor, lengths: list[int]) -> Tensor:
        """Logits after each row's first `lengths[row]` tokens, (B, V); the same on every rank."""
        for module in self.model.stages.values():
            module.eval()
        positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous()
        inputs = Inputs(
            tokens_BS.to(self.device),
            tokens_BS.to(self.device),
            {"positions_BS": positions.to(self.device)},
        )
        rows = torch.arange(len(lengths))
        last = torch.tensor(lengths) - 1
        vocab = self.config.model.vocab_size
        logits = torch.zeros(len(lengths), vocab, dtype=torch.float32, device=self.device)
        for _, output in self.model.executor.forward(inputs, 1):
            mine = output[rows, last].float()
            start = self.mesh.rank("tp") * mine.shape[1]
            logits[:, start : start + mine.shape[1]] = mine
        for axis in ("tp", "pp"):
            if self.mesh.size(axis) > 1:
                dist.all_reduce(logits, group=self.mesh.group(axis))
        self._after_forward()
        return logits.cpu()

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer states by name; views, not copies."""
        model = {f"model.{name}": p.detach() for name, p in self.model.parameters.items()}
        return model | self.optimizer.state_tensors()

    def _inputs(self, batch: Batch) -> Inputs:
        extra = {"positions_BS": batch.positions_BS.to(self.device)}
        if batch.document_BS is not None:
            extra["document_BS"] = batch.document_BS.to(self.device)
        return Inputs(batch.tokens_BS.to(self.device), batch.labels_BS.to(self.device), extra)

    def _once(self, loss: Tensor) -> Tensor:
        """A loss that every tensor-parallel rank holds, counted by the first of them."""
        return loss if self.mesh.rank("tp") == 0 else torch.zeros_like(loss)

    def _after_forward(self) -> None:
        free_gathered(list(self.model.stages.values()))
        for module in self.model.stages.values():
            module.train()

    def _blame(self, loss: float, norm: float) -> str:
        """Name the parameters behind a loss or norm that is not finite; collective.

        Gradients behind a weight that is not finite are mostly lost too, so weights come first.
        """
        named = self.model.parameters.items()
        mine = (nonfinite(named), nonfinite((name, p.grad) for name, p in named))
        everyone: list[tuple[list[str], list[str]]] = [([], [])] * self.mesh.world.size()
        dist.all_gather_object(everyone, mine)
        weights, gradients = (_few(set().union(*lists)) for lists in zip(*everyone, strict=True))
        return (
            f"loss={loss}, gradient norm={norm}; "
            f"weights not finite in: {weights}; gradients not finite in: {gradients}"
        )


def _few(names: set[str]) -> str:
    """The first names in order, and how many more."""
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
