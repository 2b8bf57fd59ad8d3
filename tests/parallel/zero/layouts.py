"""Runs of the small model at points of ZeRO's space, and what one process computes of them."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phalanx.checkpoint.chunks import chunk_of
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import PartitionConfig, ZeroConfig
from phalanx.parallel.zero.partition import Partition
from phalanx.train.config import Config
from phalanx.train.engine.step import Engine
from tests.small_run import make_batch, make_config, rank_batch, reference_loss, reference_model

LR = 1e-2
EPS = 1e-3
"""AdamW's: an update of a gradient that is zero but for rounding stays small."""
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration, on nodes of so many ranks."""

    config: Config
    ranks_per_node: int

    def engine(self, ranks: Ranks) -> Engine:
        """This rank's part; collective, in a process group."""
        mesh = build_mesh(
            self.config.parallel,
            world_size=ranks.world_size,
            device_type="cpu",
            ranks_per_node=self.ranks_per_node,
        )
        return Engine(self.config, mesh, ranks.device)


def at(point: Partition, **settings: object) -> ZeroConfig:
    """ZeRO's settings for a point of its space."""
    given = PartitionConfig(params=point.params, grads=point.grads, states=point.states)
    return ZeroConfig(partition=given, **settings)  # type: ignore[arg-type]


def case(
    zero: ZeroConfig,
    *,
    ranks_per_node: int = 2,
    num_layers: int = 2,
    max_grad_norm: float = 1.0,
    **settings: object,
) -> Case:
    """The small model, with an optimizer that shows mistakes; settings as make_config's."""
    config = make_config(num_layers=num_layers, **settings)  # type: ignore[arg-type]
    optim = replace(config.optim, eps=EPS, weight_decay=0.1, max_grad_norm=max_grad_norm)
    return Case(config=replace(config, zero=zero, optim=optim), ranks_per_node=ranks_per_node)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one process computes in one step."""

    loss: float
    norm: float
    grads: dict[str, Tensor]
    """Before clipping."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Steps of one process, and the loss of one more batch after them."""

    steps: list[Step]
    evaluation: float


def reference(config: Config, dtype: torch.dtype = torch.float64) -> Reference:
    """STEPS steps, each of its own batch, with torch's AdamW."""
    model = reference_model(config, dtype)
    optim = config.optim
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    steps = []
    for number in range(STEPS):
        loss = reference_loss(model, make_batch(config, number=number))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = float(nn.utils.get_total_norm(grads.values()))
        steps.append(Step(loss=float(loss.detach()), norm=norm, grads=grads))
        if 0 < optim.max_grad_norm < norm:  # torch's clipping has 1e-6 more in the denominator
            for parameter in model.parameters():
                parameter.grad.mul_(optim.max_grad_norm / norm)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        evaluation = float(reference_loss(model, make_batch(config, number=STEPS)))
    return Reference(steps=steps, evaluation=evaluation)


def references(cases: list[Case]) -> list[Reference]:
    """What one process computes of each; the same for all that differ in layout only."""
    known: dict[str, Reference] = {}
    keys = [f"{one.config.model} {one.config.optim}" for one in cases]
    for key, one in zip(keys, cases, strict=True):
        if key not in known:
            known[key] = reference(one.config)
    return [known[key] for key in keys]


@dataclass(frozen=True, kw_only=True)
class CaseErrors:
    """What one rank found of one case."""

    worst: dict[str, float]
    """Largest relative errors: loss, norm, gradient (against the norm of all), evaluation."""
    digests: list[tuple[float, str]]
    """Loss, and hash of all gradients' bits, by step; empty under model parallelism."""


def compared(ranks: Ranks, cases: list[Case], references: list[Reference]) -> list[CaseErrors]:
    """Each case's steps beside one process's.

    Each rank compares its own part; that the parts make the whole is what the norm tells.
    """
    found = []
    with process_group(ranks):
        for one, expected in zip(cases, references, strict=True):
            engine = one.engine(ranks)
            worst, digests = dict.fromkeys(("loss", "norm", "gradient"), 0.0), []
            for number, step in enumerate(expected.steps):
                gradients = engine.gradients(rank_batch(engine, number=number))
                worst["loss"] = max(worst["loss"], abs(gradients.loss / step.loss - 1))
                worst["norm"] = max(worst["norm"], abs(gradients.norm / step.norm - 1))
                off = gradient_error(engine, step.grads) / step.norm
                worst["gradient"] = max(worst["gradient"], off)
                if one.config.parallel.tp == one.config.parallel.pp == 1:
                    digests.append((gradients.loss, digest(engine)))
                engine.update(gradients, LR)
            evaluation = engine.evaluate([rank_batch(engine, number=STEPS)])
            worst["evaluation"] = abs(evaluation / expected.evaluation - 1)
            found.append(CaseErrors(worst=worst, digests=digests))
    return found


def gradient_error(engine: Engine, expected: dict[str, Tensor]) -> float:
    """The largest norm of the difference of a parameter's gradient, of this rank's part."""
    worst = 0.0
    for name, parameter in engine.model.parameters.items():
        assert parameter.grad is not None, name
        part = chunk_of(name, parameter.grad)
        if part is None:
            continue
        box = tuple(
            slice(begin, begin + size)
            for begin, size in zip(part.offsets, part.local.shape, strict=True)
        )
        assert part.size == expected[name].shape
        worst = max(worst, float((part.local - expected[name][box]).norm()))
    return worst


def digest(engine: Engine) -> str:
    """Of all gradients, whole; collective."""
    found = hashlib.sha256()
    for _, parameter in sorted(engine.model.parameters.items()):
        assert isinstance(parameter.grad, DTensor)
        found.update(parameter.grad.full_tensor().numpy().tobytes())
    return found.hexdigest()
