"""The one order in which parallelism is applied to a model or a pipeline stage."""

import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from phalanx.parallel.checkpointing import checkpoint_block
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.plan import ModelPlan
from phalanx.parallel.zero.shard import Dtypes, shard_model


def parallelize(
    model: nn.Module,
    plan: ModelPlan,
    mesh: Mesh,
    *,
    config: ParallelConfig,
    zero_stage: int,
    dtypes: Dtypes,
) -> None:
    """TP with SP -> activation checkpointing -> compile -> ZeRO, in place.

    The model may lie on the meta device. Cutting it into pipeline stages comes before.
    """
    if mesh.size("tp") > 1:
        parallelize_module(model, mesh.axis("tp"), plan.tensor)
        plan.tie_weights()
    for block in plan.blocks:
        checkpoint_block(block, config.activation_checkpoint)
        if config.compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    shard_model(model, plan, mesh, stage=zero_stage, dtypes=dtypes)
