"""AdamW's update in operations that round once each.

torch's fused kernel rounds the elements that do not fill its vectors differently from the others,
so what an element becomes depends on where a shard begins. A last bit does not matter to a fp32
moment; a low-bit one it may move by a whole code. These operations give every element the same in
every layout, with any number of threads.
"""

import math

import torch
from torch import Tensor

from phalanx.train.optim.config import OptimConfig


def adamw_update(
    parameter: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    temporary: Tensor,
    config: OptimConfig,
    lr: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of Loshchilov & Hutter, 2019, algorithm 2, in place.

    Args:
        parameter: any shape, fp32 or fp64; `grad`, `m`, `v` and `temporary` are like it.
        temporary: scratch.
        config: betas and eps.
        weight_decay: decoupled decay of this parameter.
        step: steps done with this one, at least 1.
    """
    assert grad.dtype == parameter.dtype, (grad.dtype, parameter.dtype)
    m.mul_(config.beta1).add_(torch.mul(grad, 1 - config.beta1, out=temporary))
    v.mul_(config.beta2).add_(torch.mul(grad, grad, out=temporary).mul_(1 - config.beta2))
    # Times a reciprocal: CUDA divides by a number that way, CPUs do not.
    root = torch.sqrt(v, out=temporary).mul_(1 / math.sqrt(1 - config.beta2**step))
    change = torch.div(m, root.add_(config.eps), out=temporary)
    if weight_decay:
        parameter.mul_(1 - lr * weight_decay)
    parameter.sub_(change.mul_(lr / (1 - config.beta1**step)))
