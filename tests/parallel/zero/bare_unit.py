"""A module whose gradients are whatever it is given, divided by ZeRO: for tests of collectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.plan import ModelPlan
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.settings import Dtypes
from phalanx.parallel.zero.shard import Sharder

FP32 = torch.float32


@dataclass(frozen=True, kw_only=True)
class Job:
    """One launch's part: what is gathered and reduced how often, and on which nodes."""

    zero: ZeroConfig
    ranks_per_node: int
    weights: list[Tensor]
    targets: list[list[list[Tensor]]]
    """Gradients by step, rank and parameter."""
    compute: torch.dtype = FP32
    microbatches: int = 1


@dataclass(frozen=True, kw_only=True)
class StepSeen:
    """What one rank saw of one step."""

    weights: list[Tensor]
    """That it computed with."""
    grads: list[Tensor]
    """Of the masters, whole."""
    masters_kept: bool
    """Whether the masters are what they were, to the bit."""
    residuals: dict[str, Tensor]


class Bare(nn.Module):
    """Parameters whose gradients are whatever comes in."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_parameter(f"w{number}", nn.Parameter(weight.clone()))
        self.seen: list[Tensor] = []

    def forward(self, grads: list[Tensor]) -> Tensor:
        params = list(self.parameters())
        self.seen = [p.detach().clone() for p in params]
        return torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True)]).sum()


def work(ranks: Ranks, jobs: list[Job]) -> list[list[StepSeen]]:
    """By job and step."""
    with process_group(ranks):
        return [steps(ranks, job) for job in jobs]


def steps(ranks: Ranks, job: Job) -> list[StepSeen]:
    mesh = build_mesh(
        ParallelConfig(dp_shard=ranks.world_size),
        world_size=ranks.world_size,
        device_type="cpu",
        ranks_per_node=job.ranks_per_node,
    )
    model = Bare(job.weights)
    sharder = Sharder(mesh, job.zero, Dtypes(params=FP32, compute=job.compute, reduce=FP32))
    sharding = sharder.shard(model, ModelPlan(blocks=[]))
    masters = list(model.parameters())
    before = [local(master).clone() for master in masters]
    [unit] = sharding.units
    found = []
    for targets in job.targets:
        mine = [target.to(job.compute) for target in targets[ranks.rank]]
        for number in range(job.microbatches):
            sharding.before_backward(last=number + 1 == job.microbatches)
            model(mine).backward()
        found.append(
            StepSeen(
                weights=model.seen,
                grads=[whole(master.grad) for master in masters],
                masters_kept=all(map(same, before, map(local, masters))),
                residuals={n: t.clone() for n, t in unit.reduced.residuals().items()},
            )
        )
        for master in masters:
            master.grad = None
    return found


def local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.detach().to_local()


def whole(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor().clone()


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but that any NaN is like any other."""
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(nan=0.0, posinf=inf, neginf=-inf),
        other.nan_to_num(nan=0.0, posinf=inf, neginf=-inf),
    )
