"""The one order in which parallelism is applied to a model or a pipeline stage."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor.parallel import parallelize_module

from phalanx.parallel.config import ActivationCheckpoint, ParallelConfig
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.wgrad import WeightGradientStore, defer_weight_gradients
from phalanx.parallel.plan import ModelPlan
from phalanx.parallel.recompute import checkpointed
from phalanx.parallel.zero.shard import Sharder, Sharding


def parallelize(
    model: nn.Module,
    plan: ModelPlan,
    mesh: Mesh,
    *,
    config: ParallelConfig,
    sharder: Sharder,
    store: WeightGradientStore | None = None,
) -> Sharding:
    """TP with SP -> weight gradients' store -> activation checkpointing -> compile -> ZeRO.

    In place; the model may lie on the meta device, and then belongs on `sharder.master_device`.
    Cutting it into pipeline stages comes before.
    With a `store`, weight gradients can be deferred; without, autograd computes them.
    """
    if mesh.size("tp") > 1:
        parallelize_module(model, mesh.axis("tp"), plan.tensor)
        plan.tie_weights()
    if store is not None:
        store.undeferred = _undeferred(config)
        defer_weight_gradients(model, store, leave=plan.blocks if store.undeferred else ())
    if config.compile or config.activation_checkpoint is not ActivationCheckpoint.none:
        for block in plan.blocks:
            block.forward = _block_forward(block, config)  # type: ignore[method-assign]
    return sharder.shard(model, plan)


def _undeferred(config: ParallelConfig) -> str:
    """What keeps compiled blocks from deferring weight gradients; "" where nothing does.

    A store is a side effect, at which dynamo cuts a block's graph. torch 2.13 computes wrong
    gradients where the cut lies between a tensor-parallel module's hooks, and compiles nothing of a
    selective checkpoint that holds one. Those blocks stay whole and leave weights to autograd.
    """
    if config.compile and config.tp > 1:
        return f"parallel.compile=true with parallel.tp={config.tp}"
    if config.compile and config.activation_checkpoint is ActivationCheckpoint.selective:
        return "parallel.compile=true with parallel.activation_checkpoint=selective"
    return ""


def _block_forward(block: nn.Module, config: ParallelConfig) -> Callable[..., Tensor]:
    """A block's forward pass, checkpointed and compiled.

    `selective` chooses among a block's operators, so it goes into what is compiled; `full` goes
    around it (inside, torch 2.13 cannot save a tensor-parallel block's mesh for backward).
    """
    mode = config.activation_checkpoint
    forward: Callable[..., Tensor] = block.forward
    if config.compile and mode is ActivationCheckpoint.full:
        return checkpointed(_compiled(forward), mode)
    forward = checkpointed(forward, mode)
    return _compiled(forward) if config.compile else forward


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled forward pass, whose input has arrived.

    AOTAutograd does not take the pending output of a collective for the tensor that it becomes
    (pytorch issue 184980). Only the first block's input is one, so the copy is cheap.
    """
    compiled = torch.compile(forward)

    def run(x: Tensor, *args: Tensor | None) -> Tensor:
        return compiled(x.clone() if isinstance(x, AsyncCollectiveTensor) else x, *args)

    return run
