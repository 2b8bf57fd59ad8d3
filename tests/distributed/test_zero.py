"""Every point of ZeRO's space computes what one process computes, alone and beside other axes."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import POINTS, Extent, Partition
from phalanx.train.config import Precision, PrecisionConfig
from tests.small import rank_batch
from tests.zero import LR, STEPS, Case, at, case, errors, reference, references

NONE, NODE, ALL = Extent
FULL = ActivationCheckpoint.full
TOLERANCE = 1e-12
FP32 = PrecisionConfig()
BF16 = PrecisionConfig(params=Precision.fp32, compute=Precision.bf16, reduce=Precision.fp32)
SECONDARY = ZeroConfig(secondary_shard=2)
EVERYWHERE = [*(at(point) for point in POINTS), SECONDARY]
GRADS = [Partition(NONE, grads, ALL) for grads in Extent]
"""Points that reduce gradients at different times."""
slow = pytest.mark.slow

ALONE = [
    *(case(zero, dp_shard=4) for zero in EVERYWHERE),
    case(ZeroConfig(secondary_shard=1), dp_shard=4),
    # One node, and nodes of one rank.
    case(at(Partition(NODE, NODE, ALL)), dp_shard=4, ranks_per_node=4),
    case(at(Partition(NODE, NODE, ALL)), dp_shard=4, ranks_per_node=1),
    *(case(zero, dp_shard=4, tied=True) for zero in (at(POINTS[0]), at(GRADS[1]), SECONDARY)),
]
BESIDE = [
    # Replicas: nodes of one model, of half a model, of all.
    *(
        case(zero, dp_replicate=2, dp_shard=2, ranks_per_node=per_node)
        for zero, per_node in (
            (at(Partition(NODE, NODE, NODE)), 2),
            (at(Partition(NONE, NODE, ALL)), 1),
            (at(Partition(ALL, ALL, ALL)), 4),
        )
    ),
    # Tensor parallelism: nodes of one data-parallel rank, and of two.
    *(
        case(zero, tp=2, dp_shard=2, ranks_per_node=per_node, tied=tied, num_layers=1)
        for zero, per_node, tied in (
            (at(POINTS[0]), 2, False),
            (at(Partition(NODE, NODE, ALL)), 2, False),
            (at(Partition(NODE, NODE, ALL)), 4, True),
        )
    ),
    # Pipelines: whole backward passes, and split ones, whose weight gradients come later.
    *(
        case(
            at(point),
            pp=2,
            dp_shard=2,
            schedule=schedule,
            tied=point.grads is NODE,
            ranks_per_node=per_node,
        )
        for point in GRADS
        for schedule, per_node in (("1f1b", 1), ("zb_h1", 2))
    ),
    *(
        case(at(point), dp_shard=4, activation_checkpoint=FULL)
        for point in (Partition(ALL, ALL, ALL), POINTS[0])
    ),
]


def check_exact(run_ranks: Callable[..., list[Any]], cases: list[Case], **launch: int) -> None:
    expected = references(cases)
    wrong = [
        (rank, worst, str(one.config.zero.extents), one.ranks_per_node, one.config.parallel)
        for rank, found in enumerate(run_ranks(errors, cases, expected, **launch))
        for one, worst in zip(cases, found, strict=True)
        if not all(error <= TOLERANCE for error in worst.values())
    ]
    assert wrong == []


def test_every_point_equals_one_process(run_ranks: Callable[..., list[Any]]) -> None:
    check_exact(run_ranks, ALONE, world_size=4)


def test_points_beside_other_axes_equal_one_process(run_ranks: Callable[..., list[Any]]) -> None:
    check_exact(run_ranks, BESIDE, world_size=4)


@slow
def test_every_point_on_nodes_of_four(run_ranks: Callable[..., list[Any]]) -> None:
    cases = [
        case(zero, dp_shard=8, ranks_per_node=4, tied=tied, num_layers=3)
        for zero in (*EVERYWHERE, ZeroConfig(secondary_shard=4))
        for tied in (False, True)
    ]
    check_exact(run_ranks, cases, world_size=8)


@slow
@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_replicate": 2, "dp_shard": 4},
        {"dp_shard": 4, "tp": 2},
        {"pp": 2, "dp_shard": 4},
        {"pp": 2, "dp_shard": 4, "schedule": "zb_h1"},
        {"pp": 2, "dp_shard": 2, "tp": 2},
    ],
    ids=str,
)
def test_every_point_beside_other_axes(
    run_ranks: Callable[..., list[Any]], degrees: dict[str, Any]
) -> None:
    model_ranks = 8 // degrees.get("pp", 1) // degrees.get("dp_replicate", 1)
    cases = [
        case(zero, ranks_per_node=model_ranks // 2, tied=tied, **degrees)
        for zero in map(at, POINTS)
        for tied in (False, True)
    ]
    check_exact(run_ranks, cases, world_size=8)


def trained(ranks: Ranks, cases: list[Case]) -> list[list[dict[str, Any]]]:
    """By case and step: loss, norm, and all gradients, whole."""
    found = []
    with process_group(ranks):
        for one in cases:
            engine = one.engine(ranks)
            steps = []
            for number in range(STEPS):
                gradients = engine.gradients(rank_batch(engine, number=number))
                grads = {n: whole(p.grad) for n, p in engine.model.parameters.items()}
                steps.append({"loss": gradients.loss, "norm": gradients.norm})
                steps[-1]["digest"] = digest(grads)
                if ranks.rank == 0:
                    steps[-1]["grads"] = grads
                engine.update(gradients, LR)
            found.append(steps)
    return found


def whole(gradient: Tensor | None) -> Tensor:
    """A copy: that of a replicated gradient would be a view, which clipping scales."""
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def digest(tensors: dict[str, Tensor]) -> str:
    joined = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(joined).hexdigest()


def test_points_agree_to_the_bit(run_ranks: Callable[..., list[Any]]) -> None:
    """Where masters and whole parameters lie changes no number: what a step computes follows from
    the order of its sums, and that from the extent of gradients alone. `none` adds up microbatches,
    then the ranks of a node, then nodes; `node` and `all` sum over ranks before. States at `node`
    leave the sum over nodes to an all-reduce, which for two nodes is the same. States at `none`
    leave all ranks to one all-reduce, in the backend's order: that point stands alone.
    """
    cases = [unclipped(zero, precision) for precision in (FP32, BF16) for zero in EVERYWHERE]
    everyone = run_ranks(trained, cases, world_size=4)
    digests = [[[step["digest"] for step in steps] for steps in rank] for rank in everyone]
    assert all(rank == digests[0] for rank in digests)
    fp32, bf16 = everyone[0][: len(EVERYWHERE)], everyone[0][len(EVERYWHERE) :]
    for found in (fp32, bf16):
        assert len({steps[0]["loss"] for steps in found}) == 1
        by_order: dict[Any, set[Any]] = {}
        for zero, steps in zip(EVERYWHERE, found, strict=True):
            order = (zero.extents.grads, zero.extents.states is NONE)
            seen = tuple((step["loss"], step["digest"]) for step in steps)
            by_order.setdefault(order, set()).add(seen)
        assert [len(kinds) for kinds in by_order.values()] == [1] * 4
        if found is fp32:  # bf16's 8 bits seldom fill the 24 of a sum
            assert len(set.union(*by_order.values())) >= 3, "other orders round otherwise"
    check_close(cases[0].config, bf16)


def unclipped(zero: ZeroConfig, precision: PrecisionConfig) -> Case:
    """Norms are sums over what ranks hold, so that clipping rounds as states are divided."""
    one = case(zero, dp_shard=4, num_layers=1, precision=precision)
    optim = replace(one.config.optim, max_grad_norm=0.0)
    return replace(one, config=replace(one.config, optim=optim))


def check_close(config: Any, found: list[list[dict[str, Any]]]) -> None:
    """bf16 keeps 8 bits: 1% of the loss and 5% of the gradient are generous."""
    exact = reference(replace(config, optim=replace(config.optim, max_grad_norm=1e9)))
    for steps in found:
        for step, expected in zip(steps, exact.steps, strict=True):
            assert step["loss"] == pytest.approx(expected.loss, rel=0.01)
            assert step["norm"] == pytest.approx(expected.norm, rel=0.05)
            assert {grad.dtype for grad in step["grads"].values()} == {torch.float32}
            for name, grad in step["grads"].items():
                off = float((grad - expected.grads[name]).norm())
                assert off < 0.05 * expected.norm, name
