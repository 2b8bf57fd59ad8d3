"""Training with quantized collectives: close to exact in every layout, and infinities reported."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import PartitionConfig, ZeroConfig
from phalanx.parallel.zero.parameter import UnitParameter
from phalanx.parallel.zero.partition import Extent, Partition
from phalanx.train.config import Precision, PrecisionConfig
from phalanx.train.engine.step import Engine
from tests.parallel.zero.layouts import Case, at, case, compared, references
from tests.small_run import make_config, make_engine, rank_batch

pytestmark = pytest.mark.zero

WORLD = 4
INT8, INT4, FP8 = Quantization.int8, Quantization.int4, Quantization.fp8
NONE, NODE, ALL = Extent
FP32 = PrecisionConfig()
BF16 = PrecisionConfig(compute=Precision.bf16)
ZERO_3 = Partition(ALL, ALL, ALL)
ZERO_PP = ZeroConfig(
    secondary_shard=2,
    quantize_weights=INT8,
    quantize_gradients=INT4,
    error_feedback=True,
    block_size=32,
)
DP: dict[str, Any] = {"dp_shard": 4}
REPLICAS: dict[str, Any] = {"dp_shard": 2, "dp_replicate": 2, "ranks_per_node": 1}
TP: dict[str, Any] = {"dp_shard": 2, "tp": 2, "num_layers": 1}
PP: dict[str, Any] = {"dp_shard": 2, "pp": 2}


def rounding(point: Partition = ZERO_3, **settings: Any) -> ZeroConfig:
    return at(point, block_size=32, **settings)


RUNS = [
    *(
        case(rounding(quantize_weights=kind), precision=FP32, **layout)
        for kind, layout in (
            (INT8, DP),
            (FP8, {**TP, "ranks_per_node": 2, "tied": True}),
            (FP8, {**PP, "ranks_per_node": 1}),
            (INT4, {**PP, "schedule": "zb_h1", "tied": True}),
            (INT4, REPLICAS),
        )
    ),
    *(
        case(rounding(quantize_gradients=kind), precision=FP32, **layout)
        for kind, layout in (
            (INT4, {**TP, "ranks_per_node": 4}),
            (INT8, {**PP, "ranks_per_node": 1, "schedule": "zb_h1"}),
            (INT4, REPLICAS),
        )
    ),
    *(
        case(rounding(point, quantize_gradients=kind), precision=FP32, **DP)
        for point, kind in (
            (Partition(NODE, NODE, ALL), INT8),
            (Partition(NONE, NONE, ALL), INT4),
        )
    ),
    case(
        rounding(Partition(NONE, NODE, ALL), quantize_weights=INT8, quantize_gradients=INT8),
        precision=FP32,
        **DP,
    ),
    case(ZERO_PP, precision=FP32, **DP),
]
EVERY_RUN = [
    case(rounding(**{f"quantize_{what}": kind}), precision=FP32, **layout, tied=tied)
    for what, kinds in (("weights", (INT8, INT4, FP8)), ("gradients", (INT8, INT4)))
    for kind in kinds
    for layout in (
        {**TP, "ranks_per_node": 2, "num_layers": 2},
        {**TP, "ranks_per_node": 4, "num_layers": 2},
        {**PP, "ranks_per_node": 1, "schedule": "zb_h1"},
        PP,
    )
    for tied in (False, True)
]
LIMITS = {
    "quantize_weights": {INT8: (2e-3, 0.03), FP8: (5e-3, 0.1), INT4: (2e-2, 0.4)},
    "quantize_gradients": {INT8: (1e-3, 0.01), INT4: (5e-3, 0.1)},
}
"""Relative errors of a loss, and of a parameter's gradient against the norm of all. Measured: 2e-5
to 3e-3, and 0.003 to 0.05 by gradients' rounding, 0.01 to 0.2 by weights'."""


@pytest.mark.parametrize(
    "runs", [RUNS, pytest.param(EVERY_RUN, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_rounded_runs_stay_close(run_ranks: Callable[..., list[Any]], runs: list[Case]) -> None:
    """To one process in fp64; twice as far off as measured is too far, and as close as without
    rounding is suspicious."""
    by_rank = run_ranks(compared, runs, references(runs), world_size=WORLD)
    for number, one in enumerate(runs):
        worst = {
            key: max(rank[number].worst[key] for rank in by_rank)
            for key in by_rank[0][number].worst
        }
        zero = one.config.zero
        digests = [rank[number].digests for rank in by_rank]
        assert digests == digests[:1] * WORLD, "all have the same masters and gradients"
        told = (zero, one.config.parallel, worst)
        limits = [
            LIMITS[what][kind]
            for what in LIMITS
            if (kind := getattr(zero, what)) is not Quantization.none
        ]
        assert limits, "nothing is rounded"
        loss, gradient = (max(column) for column in zip(*limits, strict=True))
        assert worst["loss"] < loss, told
        assert worst["evaluation"] < loss, told
        assert gradient / 50 < worst["gradient"] < gradient, told


NAME = "layers.1.feed_forward.w2.weight"
EVERY_KIND = {"quantize_gradients": INT4, "quantize_weights": INT8, "block_size": 16}


def reports(ranks: Ranks, cases: list[Case]) -> list[tuple[str, str]]:
    """What this rank says of a gradient, and of a weight, that is not finite on one rank."""
    said = []
    with process_group(ranks):
        for one in cases:
            healthy, spoiled = one.engine(ranks), one.engine(ranks)
            healthy.gradients(rank_batch(healthy))
            with pytest.MonkeyPatch.context() as patch:
                if ranks.rank == WORLD - 1:
                    patch.setattr(UnitParameter, "take_gradient", taking_infinity(spoiled))
                gradient = message(spoiled)
            with torch.no_grad():
                weight = healthy.model.parameters[NAME]
                assert isinstance(weight, DTensor)
                if ranks.rank == 0:
                    weight.to_local()[0, 0] = -inf
            said.append((gradient, message(healthy)))
    return said


def taking_infinity(engine: Engine) -> Any:
    """In place of UnitParameter.take_gradient, for one parameter."""
    take, victim = UnitParameter.take_gradient, engine.model.parameters[NAME]

    def spoiled(self: UnitParameter) -> Tensor | None:
        grad = take(self)
        if self.sharded is victim and grad is not None:
            grad.view(-1)[-1] = inf
        return grad

    return spoiled


def message(engine: Engine) -> str:
    for parameter in engine.model.parameters.values():
        parameter.grad = None
    try:
        engine.gradients(rank_batch(engine))
    except FloatingPointError as error:
        return str(error)
    return "no error"


def test_what_is_not_finite_is_reported_by_name(run_ranks: Callable[..., list[Any]]) -> None:
    """By every rank, though rounding makes an infinity NaN."""
    points = (
        PartitionConfig(),
        PartitionConfig(params=NODE, grads=NODE),
        PartitionConfig(params=NONE, grads=NONE),
    )
    cases = [
        case(ZeroConfig(partition=given, **EVERY_KIND), dp_shard=WORLD, precision=PrecisionConfig())
        for given in points
    ]
    everyone = run_ranks(reports, cases, world_size=WORLD)
    assert all(said == everyone[0] for said in everyone)
    for gradient, weight in everyone[0]:
        assert gradient.endswith(f"weights not finite in: none; gradients not finite in: {NAME}")
        assert "gradient norm=nan" in gradient
        assert "loss=nan" not in gradient
        assert f"weights not finite in: {NAME}; gradients" in weight
        assert "loss=nan" in weight


def losses_of_one_slice(ranks: Ranks) -> list[float]:
    """Of a step in bf16 by copies of the whole model, plain and with every format asked for."""
    found = []
    with process_group(ranks):
        for kind in (Quantization.none, Quantization.int4):
            zero = ZeroConfig(quantize_weights=kind, quantize_gradients=kind)
            config = replace(make_config(dp_replicate=2, dp_shard=1, precision=BF16), zero=zero)
            engine = make_engine(ranks, config)
            gradients = engine.gradients(rank_batch(engine))
            found += [gradients.loss, gradients.norm]
    return found


def test_nothing_is_rounded_where_nothing_travels(run_ranks: Callable[..., list[Any]]) -> None:
    for loss, norm, *rounded in run_ranks(losses_of_one_slice, world_size=2):
        assert rounded == [loss, norm]
