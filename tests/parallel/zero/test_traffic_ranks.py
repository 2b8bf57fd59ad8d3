"""Bytes by formula are the bytes that ranks are counted to send and seen to hold, exactly."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.comm_meter import Traffic
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import PartitionConfig, ZeroConfig
from phalanx.parallel.zero.cost import Formats, Shape, held, sent
from phalanx.parallel.zero.partition import POINTS
from phalanx.parallel.zero.places import place_of
from phalanx.train.config import Config, Precision, PrecisionConfig
from phalanx.train.model.shapes import unit_shapes
from phalanx.train.plan.costs import BYTES
from phalanx.train.plan.zero import moment_bytes
from tests.small_run import make_config, make_engine, rank_batch

WORLD, NODES = 4, 2
KINDS = ("params", "grads", "replicas")
INT8, INT4 = Quantization.int8, Quantization.int4
MIXED = PrecisionConfig(params=Precision.fp32, compute=Precision.bf16, reduce=Precision.fp32)
AT_EVERY_POINT = [
    ZeroConfig(
        partition=PartitionConfig(params=point.params, grads=point.grads, states=point.states)
    )
    for point in POINTS
]
QUANTIZED = [
    ZeroConfig(quantize_weights=INT8, block_size=24),
    ZeroConfig(stage=2, quantize_gradients=INT4, block_size=10),
    ZeroConfig(
        secondary_shard=2,
        quantize_weights=Quantization.fp8,
        quantize_gradients=INT8,
        error_feedback=True,
    ),
    ZeroConfig(secondary_shard=1, quantize_weights=INT4),
]


def small(zero: ZeroConfig, *, tied: bool = False, **degrees: int) -> Config:
    config = make_config(num_layers=2, tied=tied, precision=MIXED, **degrees)
    return replace(config, zero=zero)


CASES = {
    "points": [small(zero, dp_shard=4) for zero in AT_EVERY_POINT],
    "quantized": [
        *(small(zero, dp_shard=4) for zero in QUANTIZED),
        *(small(zero, tied=True, dp_shard=4) for zero in QUANTIZED[1:3]),
    ],
    "beside other axes": [
        *(small(zero, dp_shard=2, dp_replicate=2) for zero in AT_EVERY_POINT[1::5]),
        *(small(zero, dp_shard=2, tp=2) for zero in AT_EVERY_POINT[3::6]),
    ],
}


@dataclass(frozen=True)
class Counted:
    """Of one rank and one configuration."""

    sent: dict[str, Traffic]
    masters: int
    moments: int


def count(ranks: Ranks, configs: list[Config]) -> list[Counted]:
    """A step of each configuration; of the last, the second step."""
    found = []
    with process_group(ranks):
        for config in configs:
            engine = make_engine(ranks, config)
            for number in range(2 if config is configs[-1] else 1):
                engine.mesh.meter.take()
                engine.update(engine.gradients(rank_batch(engine, number=number)), lr=1e-3)
            taken = engine.mesh.meter.take()
            states = engine.optimizer.state_tensors()
            found.append(
                Counted(
                    sent={kind: taken[kind] for kind in KINDS if kind in taken},
                    masters=sum(map(_nbytes, engine.model.parameters.values())),
                    moments=sum(_nbytes(t) for n, t in states.items() if ".step." not in n),
                )
            )
    return found


def _nbytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize("name", CASES)
def test_formulas_are_what_ranks_count(name: str, run_ranks: Callable[..., list[Any]]) -> None:
    configs = CASES[name]
    by_rank: list[list[Counted]] = run_ranks(count, configs, world_size=WORLD, nodes=NODES)
    for number, config in enumerate(configs):
        for rank, found in enumerate(by_rank):
            check(config, rank, found[number])


def check(config: Config, rank: int, found: Counted) -> None:
    precision, zero = config.precision, config.zero
    formats = Formats(
        params=BYTES[precision.params],
        compute=BYTES[precision.compute],
        reduce=BYTES[precision.reduce],
    )
    degrees = config.parallel.sized(WORLD)
    place = place_of(rank, degrees, WORLD // NODES, zero)
    layers = range(config.model.num_layers)
    units = unit_shapes(config.model, layers, tp=config.parallel.tp)
    microbatches = config.num_microbatches(WORLD)
    told = (zero, config.parallel, rank)
    assert found.sent == sent(units, zero, formats, place, microbatches=microbatches), told

    def moments(shape: Shape, rows: int) -> int:
        return moment_bytes(config.optim.name, shape, rows, size=formats.params)

    kept = held(units, zero, formats, place, microbatches=microbatches, moments=moments)
    most = rank % (WORLD // degrees["dp_replicate"]) < degrees["tp"]  # has first slices
    assert (found.masters == kept.masters) if most else (found.masters <= kept.masters), told
    assert (found.moments == kept.moments) if most else (found.moments <= kept.moments), told
