"""One gradient for an embedding and a head that a pipeline keeps on different ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.mesh import Mesh


@torch.no_grad()
def sync_tied_gradient(parameter: Tensor, mesh: Mesh) -> None:
    """Add up the first and the last pipeline rank's gradients of their copies, in place.

    Called by those two only. Both add in the same order, so that the copies stay equal bit for bit.
    """
    grad = parameter.grad
    assert grad is not None
    mine = (grad.to_local() if isinstance(grad, DTensor) else grad).contiguous()
    group, last = mesh.group("pp"), mesh.size("pp") - 1
    is_first = mesh.rank("pp") == 0
    peer = last if is_first else 0
    theirs = torch.empty_like(mine)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
        ]
    )
    for work in works:
        work.wait()
    total = mine + theirs if is_first else theirs + mine
    (grad.to_local() if isinstance(grad, DTensor) else grad).copy_(total)
