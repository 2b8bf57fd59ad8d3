"""The training loss: cross-entropy divided by the step's global number of learned tokens.

Every microbatch contributes its sum over that one number, so the loss and its gradient do not
depend on how samples are spread over ranks and microbatches, however uneven their documents are.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.parallel.exact_sum import bins_of, total
from phalanx.parallel.executor import LossFn
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.tensor.loss import cross_entropy_sum


def global_valid_tokens(num_valid: int, mesh: Mesh) -> int:
    """Tokens with a label, over all data-parallel ranks; collective. At least 1."""
    count = torch.tensor([num_valid], dtype=torch.int64, device=mesh.device_type)
    for axis in ("dp_shard", "dp_replicate"):
        if mesh.size(axis) > 1:
            ranks = dist.get_process_group_ranks(mesh.group(axis))
            mesh.meter.all_reduced("control", ranks, count.nbytes)
            dist.all_reduce(count, group=mesh.group(axis))
    return max(1, int(count.item()))


def token_loss(mesh: Mesh, num_valid: int) -> LossFn:
    """The loss function of one step with `num_valid` learned tokens over all ranks."""
    group = mesh.group("tp") if mesh.size("tp") > 1 else None

    def loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        logits_NV, labels_N = logits_BSV.flatten(0, 1), labels_BS.flatten()
        return cross_entropy_sum(logits_NV, labels_N, group, meter=mesh.meter) / num_valid

    return loss


def world_sums(values: list[float | Tensor], mesh: Mesh) -> list[float]:
    """Each value, or all elements of it, summed over every rank; one all-reduce, one wait.

    Collective. Exact up to one rounding of each sum to fp64, so that it does not depend on which
    ranks hold what.
    """
    bins = torch.stack([bins_of(torch.as_tensor(v, device=mesh.device_type)) for v in values])
    mesh.meter.all_reduced("control", range(mesh.world.size()), bins.nbytes)
    dist.all_reduce(bins)
    return [total(row) for row in bins.cpu()]
