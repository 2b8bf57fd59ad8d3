"""One gradient for an embedding and a head that a pipeline keeps on different stages."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phalanx.parallel.grad_norm import settle_partial
from phalanx.parallel.local import local
from phalanx.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class TiedWeight:
    """A pipeline rank's part of a weight that the first and the last stage use.

    On two ranks each has a copy. A rank that holds both stages (a V placement's first) has two
    parameters over one memory, so that both stages' gradients add up in their own order: only
    `parameter` is optimized, saved and counted.
    """

    name: str
    """The whole model's name of it."""
    parameter: nn.Parameter
    twin: nn.Parameter | None
    """The last stage's parameter, on a rank that has both stages."""
    first: int
    """Pipeline rank of the first stage."""
    last: int
    """Pipeline rank of the last stage."""

    def sync_gradient(self, mesh: Mesh) -> None:
        """Add up the gradients of both uses, in place; called by the ranks that hold one.

        The first stage's plus the last's in every placement, so that copies and layouts agree bit
        for bit.
        """
        if self.twin is None:
            _add_across_ranks(self.parameter, mesh, self.first, self.last)
            return
        settle_partial([self.twin])
        assert self.parameter.grad is not None
        assert self.twin.grad is not None
        self.parameter.grad += self.twin.grad
        self.twin.grad = None


def share_memory(parameter: nn.Parameter, stage: nn.Module, fqn: str) -> nn.Parameter:
    """Give `stage` a parameter `fqn` of its own over the memory of `parameter`.

    After both are filled and before the first forward pass, in which ZeRO takes it over.
    """
    module, _, name = fqn.rpartition(".")
    twin = nn.Parameter(parameter.detach())
    setattr(stage.get_submodule(module), name, twin)
    return twin


@torch.no_grad()
def _add_across_ranks(parameter: Tensor, mesh: Mesh, first: int, last: int) -> None:
    grad = parameter.grad
    assert grad is not None
    mine = local(grad).contiguous()
    group = mesh.group("pp")
    is_first = mesh.rank("pp") == first
    peer = last if is_first else first
    theirs = torch.empty_like(mine)
    mesh.meter.sent("pipeline", dist.get_global_rank(group, peer), mine.nbytes)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
        ]
    )
    for work in works:
        work.wait()
    total = mine + theirs if is_first else theirs + mine
    local(grad).copy_(total)
