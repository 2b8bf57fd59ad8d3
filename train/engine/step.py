"""One optimizer step of one rank, in its parts: gradients, norm, update."""

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.parallel.executor import Inputs
from phalanx.parallel.grad_norm import (
    clip_gradients,
    local_squares,
    nonfinite,
    settle_partial,
)
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.runtime import PipelineExecutor
from phalanx.train.config import Config
from phalanx.train.data.source import Batch
from phalanx.train.engine.build import Model, build_model
from phalanx.train.engine.gradients import Gradients
from phalanx.train.engine.loss import global_valid_tokens, token_loss, world_sums
from phalanx.train.engine.post_validation import Action, PostValidation
from phalanx.train.optim.adamw import AdamW
from phalanx.train.optim.registry import make_optimizer


class Engine:
    """This rank's model and optimizer.

    A step is `gradients`, then `update`. With pipeline.post_validation it is settled only during
    the next `gradients`, or when something asks for it: see `settle`.
    """

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config = config
        self.mesh = mesh
        self.device = device
        self.model: Model = build_model(config, mesh, device)
        self.optimizer = make_optimizer(self.model.parameters, config.optim)
        self._settled: list[Gradients] = []
        self._post: PostValidation | None = None
        if config.pipeline.post_validation and config.parallel.pp > 1:
            executor = self.model.executor
            assert isinstance(executor, PipelineExecutor)
            executor.before_backward = self.settle
            assert isinstance(self.optimizer, AdamW), "OptimConfig.check_undoable"
            self._post = PostValidation(
                mesh,
                self.optimizer,
                self.model.parameters,
                max_norm=config.optim.max_grad_norm,
                timeout=timedelta(seconds=config.launch.timeout_s),
            )

    def gradients(self, batch: Batch, *, stop: bool = False) -> Gradients:
        """Compute this step's gradients over all ranks; collective.

        `stop` says that this rank was asked to end the run; the answer tells every rank so.

        With pipeline.post_validation the answer is over the pipeline ranks up to this one, no
        collective spans the pipeline, and the step before is settled on the way.

        Raises:
            FloatingPointError: the loss or a gradient is not finite (with pipeline.post_validation:
                was not, in the step before); names the parameters.
        """
        num_valid = global_valid_tokens(batch.num_valid, self.mesh)
        loss_fn = token_loss(self.mesh, num_valid)
        local_loss = self.model.executor.backward(self._inputs(batch), loss_fn)
        settle_partial(self.model.parameters.values())
        if self.model.tied is not None:
            self.model.tied.sync_gradient(self.mesh)
        squares = local_squares(self.model.counted_parameters, self.device)
        values: list[float | Tensor] = [self._once(local_loss), squares, stop]
        if self._post is not None:
            assert not self._post.pending, "the executor did not check the step before"
            return self._post.prefix(values, num_valid)
        gradients = Gradients.of(world_sums(values, self.mesh), num_valid)
        if not gradients.finite:
            raise FloatingPointError(self._blame(gradients))
        return gradients

    def update(self, gradients: Gradients, lr: float) -> None:
        """Clip the gradients and step the optimizer; post-validation may take it back later."""
        if self._post is not None:
            self._post.step(gradients, lr)
        else:
            limit = self.config.optim.max_grad_norm
            if limit > 0:
                clip_gradients(self.model.parameters.values(), gradients.norm, limit)
            self.optimizer.step(lr)
            self._settled.append(gradients)

    def settle(self) -> bool:
        """Make the last `update` final, where it is not yet; every pipeline rank must come here.

        Whatever reads parameters or optimizer states calls it first.

        Returns:
            Whether parameters changed on some pipeline rank, the same answer on every rank.

        Raises:
            FloatingPointError: the step's loss or a gradient was not finite; names the parameters.
                They and the optimizer's states are those before the step.
        """
        if self._post is None or not self._post.pending:
            return False
        gradients, action = self._post.check()
        if action is Action.skip:
            raise FloatingPointError(self._blame(gradients))
        self._settled.append(gradients)
        # The first pipeline rank never clips on its own, so at least its parameters changed.
        return action is Action.clipped

    def take_settled(self) -> list[Gradients]:
        """Steps that became final since the last call, in order."""
        settled, self._settled = self._settled, []
        return settled

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss a learned token over the batches; collective, the same on every rank."""
        self.settle()
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
        self.settle()
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
        self.settle()
        model = {f"model.{name}": p.detach() for name, p in self.model.parameters.items()}
        return model | self.optimizer.state_tensors()

    def rank_tensors(self) -> dict[str, Tensor]:
        """What belongs to this rank and this layout alone, by name: roundings that gradients
        are still owed (zero.error_feedback). Views, not copies."""
        rank, tensors = self.mesh.world.get_rank(), {}
        names = {id(parameter): name for name, parameter in self.model.parameters.items()}
        for stage, sharding in self.model.shardings.items():
            for unit in sharding.units:
                # A stage's copy of a tied weight has no name of its own.
                owner = names.get(id(unit.params[0].sharded), f"stage{stage}")
                for hop, residual in unit.reduced.residuals().items():
                    block = self.config.zero.block_size
                    where = "x".join(map(str, (*unit.reduced.cut, *residual.shape, block)))
                    tensors[f"residual.{rank}.{owner}.{hop}.{where}"] = residual
        return tensors

    def _inputs(self, batch: Batch) -> Inputs:
        extra = {"positions_BS": batch.positions_BS.to(self.device)}
        if batch.document_BS is not None:
            extra["document_BS"] = batch.document_BS.to(self.device)
        return Inputs(batch.tokens_BS.to(self.device), batch.labels_BS.to(self.device), extra)

    def _once(self, loss: Tensor) -> Tensor:
        """A loss that every tensor-parallel rank holds, counted by the first of them."""
        return loss if self.mesh.rank("tp") == 0 else torch.zeros_like(loss)

    def _after_forward(self) -> None:
        for sharding in self.model.shardings.values():
            sharding.forget()
        for module in self.model.stages.values():
            module.train()

    def _blame(self, found: Gradients) -> str:
        """Name the parameters behind a loss or norm that is not finite; collective.

        Gradients behind a weight that is not finite are mostly lost too, so weights come first.
        """
        named = self.model.parameters.items()
        mine = (nonfinite(named), nonfinite((name, p.grad) for name, p in named))
        everyone: list[tuple[list[str], list[str]]] = [([], [])] * self.mesh.world.size()
        dist.all_gather_object(everyone, mine)
        weights, gradients = (_few(set().union(*lists)) for lists in zip(*everyone, strict=True))
        return (
            f"loss={found.loss}, gradient norm={found.norm}; "
            f"weights not finite in: {weights}; gradients not finite in: {gradients}"
        )


def _few(names: set[str]) -> str:
    """The first names in order, and how many more."""
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
