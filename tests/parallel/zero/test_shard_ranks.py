"""Every point of ZeRO's space computes what one process computes, alone and beside other axes."""

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import POINTS, Extent, Partition
from phalanx.train.config import Precision, PrecisionConfig
from tests.parallel.zero.layouts import (
    STEPS,
    Case,
    CaseErrors,
    Step,
    at,
    case,
    compared,
    gradient_error,
    references,
)
from tests.small_run import rank_batch

pytestmark = pytest.mark.zero

NONE, NODE, ALL = Extent
FULL = ActivationCheckpoint.full
TOLERANCE = 1e-12
BF16 = PrecisionConfig(params=Precision.fp32, compute=Precision.bf16, reduce=Precision.fp32)
SECONDARY = ZeroConfig(secondary_shard=2)
EVERYWHERE = [*(at(point) for point in POINTS), SECONDARY]
GRADS = [Partition(NONE, grads, ALL) for grads in Extent]
"""Points that reduce gradients at different times."""
slow = pytest.mark.slow

POINTS_ALONE = [case(zero, dp_shard=4, max_grad_norm=0.0) for zero in EVERYWHERE]
"""Unclipped: a norm is a sum over what each rank holds, and rounds as states are divided."""
ALONE = [
    *POINTS_ALONE,
    case(ZeroConfig(secondary_shard=1), dp_shard=4, tied=True),
    *(case(zero, dp_shard=4, tied=True) for zero in (at(POINTS[0]), at(GRADS[1]))),
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
        case(
            zero,
            tp=2,
            dp_shard=2,
            ranks_per_node=per_node,
            tied=tied,
            num_layers=1,
            microbatch=2,
        )
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
        for point, schedule, per_node in (
            (GRADS[0], "zb_h1", 2),
            (GRADS[1], "zb_h1", 1),
            (GRADS[1], "1f1b", 2),
            (GRADS[2], "zb_h1", 1),
        )
    ),
    *(
        case(at(point), dp_shard=4, activation_checkpoint=FULL)
        for point in (Partition(ALL, ALL, ALL), POINTS[0])
    ),
]


def check_exact(
    run_ranks: Callable[..., list[Any]], cases: list[Case], *, world_size: int = 4
) -> list[CaseErrors]:
    """Rank 0's findings."""
    by_rank = run_ranks(compared, cases, references(cases), world_size=world_size)
    wrong = [
        (rank, one.worst, str(run.config.zero.extents), run.ranks_per_node, run.config.parallel)
        for rank, found in enumerate(by_rank)
        for run, one in zip(cases, found, strict=True)
        if not all(error <= TOLERANCE for error in one.worst.values())
    ]
    assert wrong == []
    for found in by_rank:
        assert [one.digests for one in found] == [one.digests for one in by_rank[0]]
    return by_rank[0]


def orders(cases: list[Case], found: list[CaseErrors]) -> dict[Any, set[Any]]:
    """Losses and gradients of points, which are to be the same to the bit where sums have one
    order.

    Where masters and whole parameters lie changes no number: all follows from the order of sums,
    and that from the extent of gradients. `none` adds up microbatches, then the ranks of a node,
    then nodes; `node` and `all` sum over ranks before. States at `node` leave the sum over nodes to
    an all-reduce, for two nodes the same. States at `none` leave all ranks to one all-reduce, in
    the backend's order: that point stands alone.
    """
    by_order: dict[Any, set[Any]] = {}
    for run, one in zip(cases, found, strict=True):
        point = run.config.zero.extents
        assert len(one.digests) == STEPS
        by_order.setdefault((point.grads, point.states is NONE), set()).add(tuple(one.digests))
    return by_order


def test_every_point_equals_one_process(run_ranks: Callable[..., list[Any]]) -> None:
    found = check_exact(run_ranks, ALONE)[: len(POINTS_ALONE)]
    by_order = orders(POINTS_ALONE, found)
    assert [len(seen) for seen in by_order.values()] == [1] * 4
    assert len(set.union(*by_order.values())) >= 3, "other orders round otherwise"
    assert len({one.digests[0][0] for one in found}) == 1


def test_bf16_points_stay_close(run_ranks: Callable[..., list[Any]]) -> None:
    """To one process in fp64: 8 bits give 1% of the loss and 5% of the gradient, generously. And
    to each other to the bit; their fp32 sums of 8-bit numbers seldom round, whatever the order."""
    cases = [
        case(zero, dp_shard=4, num_layers=1, max_grad_norm=0.0, precision=BF16)
        for zero in EVERYWHERE
    ]
    by_rank = run_ranks(compared, cases, references(cases), world_size=4)
    for found in by_rank:
        assert [one.digests for one in found] == [one.digests for one in by_rank[0]]
        for one in found:
            assert max(one.worst["loss"], one.worst["evaluation"]) < 0.01, one.worst
            assert 1e-4 < one.worst["gradient"] < 0.05, one.worst
    assert [len(seen) for seen in orders(cases, by_rank[0]).values()] == [1] * 4


def test_points_beside_other_axes_equal_one_process(run_ranks: Callable[..., list[Any]]) -> None:
    check_exact(run_ranks, BESIDE)


def evaluated_first(ranks: Ranks, cases: list[Case], expected: Step) -> list[list[float]]:
    """By case: relative errors of two evaluations and then of a step."""
    found = []
    with process_group(ranks):
        for one in cases:
            engine = one.engine(ranks)
            batch = rank_batch(engine)
            losses = [engine.evaluate([batch]) for _ in range(2)]
            gradients = engine.gradients(batch)
            found.append(
                [
                    *(abs(loss / expected.loss - 1) for loss in (*losses, gradients.loss)),
                    gradient_error(engine, expected.grads) / expected.norm,
                ]
            )
    return found


def test_evaluation_may_come_first(run_ranks: Callable[..., list[Any]]) -> None:
    """Whole parameters that no gradient was asked of are those that are trained then."""
    cases = [case(zero, dp_shard=2) for zero in (at(POINTS[0]), at(POINTS[2]), at(POINTS[-1]))]
    [expected, *_] = references(cases)[0].steps
    for found in run_ranks(evaluated_first, cases, expected, world_size=2):
        assert max(map(max, found)) <= TOLERANCE, found


@slow
@pytest.mark.parametrize("per_node", [1, 4])
def test_every_point_on_nodes_of_one_rank_and_on_one(
    run_ranks: Callable[..., list[Any]], per_node: int
) -> None:
    check_exact(run_ranks, [case(at(p), dp_shard=4, ranks_per_node=per_node) for p in POINTS])


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
        {"pp": 2, "dp_shard": 2, "tp": 2, "microbatch": 2},
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
