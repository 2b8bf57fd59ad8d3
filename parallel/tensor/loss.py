"""Cross-entropy over logits whose vocabulary is cut across tensor-parallel ranks.

Each rank keeps its columns; what travels is three numbers a token (max, sum, the target's logit),
never the logits (Megatron-LM, Shoeybi et al., 2019, section 3). Shapes: N tokens, V vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from phalanx.parallel.comm_meter import CommMeter

IGNORE = -100
"""Label of a token that is not learned from."""


def cross_entropy_sum(
    logits_NV: Tensor,
    labels_N: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    meter: CommMeter | None = None,
) -> Tensor:
    """Sum of the cross-entropy over tokens whose label is not `IGNORE`, in fp32 (fp64 for fp64).

    `logits_NV` holds this rank's columns, in rank order, of a vocabulary cut evenly over `group`
    (None: all of them); every rank gets the same sum. `meter` counts what is sent.
    """
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if group is None or group.size() == 1:
        return F.cross_entropy(logits_NV, labels_N, reduction="sum", ignore_index=IGNORE)
    return _VocabParallelCrossEntropy.apply(logits_NV, labels_N, group, meter)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        logits_NV: Tensor,
        labels_N: Tensor,
        group: dist.ProcessGroup,
        meter: CommMeter | None,
    ) -> Tensor:
        width = logits_NV.shape[1]
        start = group.rank() * width
        highest = logits_NV.amax(dim=1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        shifted = logits_NV - highest.unsqueeze(1)
        local = (labels_N - start).clamp(0, width - 1)
        mine = (labels_N >= start) & (labels_N < start + width)
        target = shifted.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0.0)
        probabilities = shifted.exp_()
        reduced = torch.stack((probabilities.sum(dim=1), target))
        dist.all_reduce(reduced, group=group)
        if meter is not None:
            ranks = dist.get_process_group_ranks(group)
            for sent in (highest, reduced):
                meter.all_reduced("tensor", ranks, sent.nbytes)
        probabilities /= reduced[0].unsqueeze(1)
        valid = labels_N != IGNORE
        ctx.save_for_backward(probabilities, local, mine, valid)
        return (reduced[0].log() - reduced[1]).masked_fill(~valid, 0.0).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        probabilities, local, mine, valid = ctx.saved_tensors  # type: ignore[attr-defined]
        one_hot_part = (-mine.to(probabilities.dtype)).unsqueeze(1)
        result = probabilities.scatter_add(1, local.unsqueeze(1), one_hot_part)
        return result * (valid.unsqueeze(1) * grad), None, None, None
