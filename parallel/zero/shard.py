"""ZeRO stages 0 to 3 over FSDP2.

A stage is three settings of `fully_shard`: what mesh it shards over, whether a block's parameters
are freed between forward and backward, and after which microbatches gradients are reduced.
Gradients are summed, never averaged: the loss is already divided by the global number of tokens.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from phalanx.parallel.mesh import Mesh
from phalanx.parallel.plan import ModelPlan


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Number formats of one run."""

    params: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


def shard_model(
    model: nn.Module, plan: ModelPlan, mesh: Mesh, *, stage: int, dtypes: Dtypes
) -> None:
    """Shard a model's parameters over the data-parallel axes, in place.

    Applied also to a single data-parallel rank where compute and master formats differ, since the
    casting is done here. Left out where it would change nothing.
    """
    if mesh.dp_size * mesh.size("cp") == 1 and dtypes.params == dtypes.compute:
        return
    options: dict[str, Any] = {
        "mesh": _shard_mesh(mesh, stage),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtypes.compute, reduce_dtype=dtypes.reduce, cast_forward_inputs=False
        ),
        "reshard_after_forward": stage == 3,
    }
    # Said of every output that tensor parallelism makes; the models have no in-place operation.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in plan.blocks:
        fully_shard(block, **options)
    for unit in plan.shard_units:
        kept = options | ({"reshard_after_forward": False} if unit.keep_gathered else {})
        sharded = fully_shard(unit.modules, **kept)[0]
        assert isinstance(sharded, FSDPModule)
        sharded.set_unshard_in_backward(not unit.unused_in_backward)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo knows no scaled reduction, and a sum needs none.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_mesh(mesh: Mesh, stage: int) -> DeviceMesh:
    """(replicate, shard) mesh of a stage; stage 0 replicates over every data-parallel rank."""
    world = mesh.world
    if stage == 0:
        flat = world["dp_replicate", "dp_shard", "cp"]._flatten("dp_all")
        return flat._unflatten(0, (flat.size(), 1), ("dp_all_replicate", "dp_all_shard"))
    if mesh.size("cp") > 1:
        world["dp_shard", "cp"]._flatten("dp_shard_cp")
        shard = "dp_shard_cp"
    else:
        shard = "dp_shard"
    if mesh.size("dp_replicate") > 1:
        return world["dp_replicate", shard]
    return world[shard]


def before_backward(model: nn.Module, *, stage: int, last: bool) -> None:
    """Say which microbatch of a step comes: only stages 2 and 3 reduce gradients at each."""
    if not isinstance(model, FSDPModule):
        return
    sync = last or stage >= 2
    model.set_requires_gradient_sync(sync)
    # Replicas (HSDP) need each other's gradients once a step only.
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)
    # Stages 0 and 1 keep gathered parameters until the step's last backward.
    model.set_reshard_after_backward(last or stage == 3)


def free_gathered(models: list[nn.Module]) -> None:
    """Drop gathered parameters, for instance after an evaluation, which has no backward pass."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
