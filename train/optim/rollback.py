"""Taking an AdamW step back in place, without a copy of what was before.

Qi et al., Zero Bubble Pipeline Parallelism, section 4 (post-validation). The step's own
gradient must still be there. What was before comes back up to rounding: the parameter to the last
bits; a moment with an error of the format's unit roundoff x the size of the gradient's part in it,
so a moment far smaller than the gradient it took in loses digits.
"""

import math

import torch
from torch import Tensor

from phalanx.train.optim.config import OptimConfig


@torch.no_grad()
def undo_adamw(
    parameter: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    config: OptimConfig,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """Make the last AdamW step of one parameter undone, in place.

    Args:
        parameter: any shape, a plain tensor; so are `grad` and the moments.
        grad: what the step took.
        state: `exp_avg`, `exp_avg_sq` and `step` (how many steps were done, at least 1).
        config: betas (above 0) and eps of the step.
        lr: learning rate of the step.
        weight_decay: decoupled decay of this parameter.
    """
    m, v = state["exp_avg"], state["exp_avg_sq"]
    steps = int(state["step"].item())
    assert steps >= 1, "no step to undo"
    root = v.sqrt().div_(math.sqrt(1 - config.beta2**steps)).add_(config.eps)
    parameter.addcdiv_(m, root, value=lr / (1 - config.beta1**steps))
    if weight_decay:
        parameter.div_(1 - lr * weight_decay)
    state["step"].sub_(1)
    if steps == 1:  # known exactly
        m.zero_()
        v.zero_()
        return
    m.sub_(grad, alpha=1 - config.beta1).div_(config.beta1)
    # Rounding may leave a little less than nothing, whose root would be NaN.
    v.addcmul_(grad, grad, value=config.beta2 - 1).div_(config.beta2).clamp_(min=0)
