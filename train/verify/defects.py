"""Defects that `phalanx verify` can plant in a layout, to show that it finds them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from phalanx.parallel.executor import Executor, Inputs, LossFn
from phalanx.parallel.local import local
from phalanx.parallel.mesh import Mesh
from phalanx.train.config import Defect
from phalanx.train.engine.build import Model

SCALE = 1.5
"""Factor of a wrongly scaled gradient."""


def inject(model: Model, defect: Defect) -> Executor:
    """The model's executor, or one that spoils the gradients it computes."""
    if defect in (Defect.grad_scale, Defect.drop_grad):
        return _SpoilingExecutor(model, defect)
    return model.executor


def swapped(step: int) -> int:
    """The step whose batch a run with reordered batches computes: neighbours change places."""
    return step ^ 1


class StaleShard:
    """Keeps rank 0's shard of one matrix from being updated, when that defect is asked for."""

    def __init__(self, model: Model, defect: Defect, mesh: Mesh) -> None:
        self._shard: Tensor | None = None
        if defect is Defect.stale_shard and mesh.world.get_rank() == 0:
            self._shard = local(_victim(model).detach())
            self._before = self._shard.clone()

    def restore(self) -> None:
        """Undo the update of the shard."""
        if self._shard is not None:
            self._shard.copy_(self._before)


class _SpoilingExecutor:
    def __init__(self, model: Model, defect: Defect) -> None:
        self._model = model
        self._executor = model.executor
        self._defect = defect

    def backward(self, inputs: Inputs, loss_fn: LossFn) -> Tensor:
        """The real backward pass, then the defect."""
        loss = self._executor.backward(inputs, loss_fn)
        if self._defect is Defect.drop_grad:
            grads = [_victim(self._model).grad]
            factor = 0.0
        else:
            grads = [p.grad for p in self._model.parameters.values()]
            factor = SCALE
        with torch.no_grad():
            for grad in grads:
                if grad is not None:
                    local(grad).mul_(factor)
        return loss

    def forward(self, inputs: Inputs, num_microbatches: int) -> Iterator[tuple[Inputs, Tensor]]:
        """As without a defect."""
        return self._executor.forward(inputs, num_microbatches)


def _victim(model: Model) -> Tensor:
    """The first feed-forward matrix that this rank holds."""
    return next(p for n, p in model.parameters.items() if n.endswith("feed_forward.w1.weight"))
