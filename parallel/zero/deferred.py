"""ZeRO where weight gradients come after the backward pass: the one place that reaches into FSDP2.

FSDP2 takes gradients up in autograd hooks, as each block's backward pass ends. Where a pipeline
defers weight gradients there are none yet by then, so that FSDP2's steps after a backward pass run
once more after the weight gradients (torch's own pipeline stages do the same at the end of a step).
None of this has a public interface; a test holds what is used here to the installed torch.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from phalanx.parallel.zero.shard import before_backward


def before_input_gradient(model: nn.Module, *, stage: int) -> None:
    """Before a backward pass that defers its weight gradients: nothing is reduced in it."""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(stage == 3)


def after_weight_gradient(model: nn.Module, *, stage: int, last: bool) -> None:
    """Take up the weight gradients of a microbatch; `last`: of the model's last one in the step.

    Stages 2 and 3 reduce them, 0 and 1 add them to those before, in the reduction's format.
    """
    if not isinstance(model, FSDPModule):
        return
    before_backward(model, stage=stage, last=last)
    root = _state(model)
    for state in reversed(root._state_ctx.all_states):
        for group in reversed(_param_groups(state)):
            group.post_backward()
    root._root_post_backward_final_callback()


def prefetch_in_backward(model: nn.Module) -> None:
    """Have each block's backward pass gather the block before, as FSDP2 does by itself elsewhere.

    What it does by itself, the reverse of the forward passes' order, is wrong where other
    microbatches' forward passes lie between; see `forget_forward`.
    """
    units: dict[int, FSDPModule] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            units.setdefault(id(_state(module)), module)
    before: FSDPModule | None = None
    for unit in units.values():
        if before is not None:
            unit.set_modules_to_backward_prefetch([before])
        before = unit


def forget_forward(model: nn.Module) -> None:
    """After a forward pass: drop FSDP2's note of its order, which would mislead its prefetching."""
    if not isinstance(model, FSDPModule):
        return
    root = _state(model)
    root._comm_ctx.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        for group in _param_groups(state):
            group._post_forward_indices.clear()


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _param_groups(state: Any) -> list[Any]:
    """A module's groups of parameters; torch before 2.12 has one at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
