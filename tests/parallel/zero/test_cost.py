"""Sizes by formula are those of the engine's layouts and of the papers."""

from math import prod

import pytest
import torch
from torch import nn

from phalanx.parallel.comm_meter import Traffic
from phalanx.parallel.kernels.block_format import BlockFormat, Quantization
from phalanx.parallel.zero.config import Offload, PartitionConfig, ZeroConfig
from phalanx.parallel.zero.cost import Formats, Held, Shape, UnitShapes, held, sent
from phalanx.parallel.zero.layout import SliceLayout
from phalanx.parallel.zero.partition import Extent, Partition
from phalanx.parallel.zero.places import place_of
from phalanx.parallel.zero.slices import Slices, wire_bytes
from phalanx.parallel.zero.wire import Wire
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.plan import plan_for
from phalanx.train.model.shapes import unit_shapes
from phalanx.train.model.transformer import Transformer
from tests.small_run import model_config

NONE, NODE, ALL = Extent
BF16 = Formats(params=4, compute=2, reduce=2)


def fp32_moments(shape: Shape, rows: int) -> int:
    return 8 * rows * prod(shape[1:])


def at(params: Extent, grads: Extent, states: Extent, **settings: object) -> ZeroConfig:
    given = PartitionConfig(params=params, grads=grads, states=states)
    return ZeroConfig(partition=given, **settings)  # type: ignore[arg-type]


def cluster(ranks: int, **degrees: int) -> dict[str, int]:
    return {"dp_replicate": 1, "dp_shard": ranks, "tp": 1} | degrees


def cost(
    zero: ZeroConfig, billions: float, *, ranks: int, per_node: int, formats: Formats = BF16
) -> tuple[Held, dict[str, Traffic]]:
    """Of a model that is one vector."""
    units = [UnitShapes(shapes=((int(billions * 1e9),),))]
    place = place_of(0, cluster(ranks), per_node, zero)
    kept = held(units, zero, formats, place, microbatches=2, moments=fp32_moments)
    return kept, sent(units, zero, formats, place, microbatches=1)


@pytest.mark.parametrize(
    ("billions", "extents", "ranks", "per_node", "gigabytes"),
    [
        (7, (NONE, NONE, NODE), 8, 8, 38.5),
        (13, (NODE, NODE, ALL), 8, 4, 32.5),
        (30, (NODE, NODE, ALL), 32, 8, 26.25),
        (7, (NONE, NONE, ALL), 1024, 8, 28.082),
        (30, (ALL, ALL, ALL), 1024, 8, 0.469),
        (30, (NODE, NODE, NODE), 1024, 16, 30.0),
    ],
)
def test_model_states_of_amsp(
    billions: float,
    extents: tuple[Extent, Extent, Extent],
    ranks: int,
    per_node: int,
    gigabytes: float,
) -> None:
    """2 P / s_p + 2 P / s_g + 12 P / s_os (Chen et al., 2023); the layouts that it chooses for its
    models, ZeRO 1, ZeRO 3 and MiCS. Sums of gradients are in fp32 here, where theirs are in bf16.
    """
    divisors = {NONE: 1, NODE: per_node, ALL: ranks}
    s_p, s_g, s_os = (divisors[extent] for extent in extents)
    assert 2 * billions / s_p + 2 * billions / s_g + 12 * billions / s_os == pytest.approx(
        gigabytes, rel=1e-3
    )
    kept, _ = cost(at(*extents), billions, ranks=ranks, per_node=per_node)
    assert kept.params / 1e9 == pytest.approx(2 * billions / s_p)
    grad_bytes = 2 if extents[1] is NONE else 4
    assert kept.grads / 1e9 == pytest.approx(grad_bytes * billions / s_g)
    assert (kept.masters + kept.moments) / 1e9 == pytest.approx(12 * billions / s_os)


@pytest.mark.parametrize(
    ("extents", "between", "inside"),
    [  # of 1e9 parameters in bf16 over 4 nodes of 4, in GB
        ((NONE, NONE, NONE), 0.0, 3.75),  # rank 0's next in the ring is in its node
        ((NONE, NONE, ALL), 0.375 * 2, 1.5 * 2),
        ((ALL, ALL, ALL), 0.375 * 3, 1.5 * 3),
        ((NODE, ALL, ALL), 0.375 * 2, 1.5 * 3),
        ((NODE, NODE, NODE), 0.5 * 1.5, 1.5 * 3),
    ],
)
def test_what_is_sent_follows_the_documented_formulas(
    extents: tuple[Extent, Extent, Extent], between: float, inside: float
) -> None:
    """A gather or a sum sends (R - 1) / S of the whole between nodes, (L - 1) / L inside."""
    _, traffic = cost(at(*extents), 1, ranks=16, per_node=4)
    assert sum(t.between for t in traffic.values()) / 1e9 == pytest.approx(between, rel=1e-6)
    assert sum(t.inside for t in traffic.values()) / 1e9 == pytest.approx(inside, rel=1e-6)


SHAPES = [
    [(37,), (298, 37), (24, 37), (6,)],
    [(1, 5), (7, 3), (2, 2, 3)],
    [(13,)],
    [(64, 64), (64,), (17, 31)],
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("across", "local"), [(1, 1), (2, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize("block", [1, 8, 30, 256])
def test_wire_bytes_are_those_packed(
    shapes: list[Shape], across: int, local: int, block: int
) -> None:
    layout = SliceLayout(shapes, across=across, local=local, block=block)
    sizes = Slices(shapes, num_slices=across * local, block=block)
    for kind in Quantization:
        fmt = None
        if kind is not Quantization.none:
            if block == 1:
                continue
            fmt = BlockFormat(kind=kind, block=block)
        for dtype in (torch.float32, torch.bfloat16):
            wire = Wire(layout, dtype, fmt)
            packed = wire.pack(torch.zeros(1, layout.numel, dtype=dtype))
            assert wire_bytes(sizes, fmt, dtype.itemsize) == packed.numel(), kind


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [range(0, 5), range(0, 2), range(2, 4), range(4, 5)])
def test_shapes_are_the_models(tied: bool, layers: range) -> None:
    check_shapes(model_config(tied=tied), layers)


def test_shapes_without_extras_are_the_models() -> None:
    check_shapes(ModelConfig(dim=48, num_heads=4, num_kv_heads=2), range(0, 4))


def check_shapes(config: ModelConfig, layers: range) -> None:
    with torch.device("meta"):
        model = Transformer(config, layers=layers)
    plan, taken = plan_for(model), set[int]()

    def unit(*modules: nn.Module) -> list[Shape]:
        found = []
        for module in modules:
            for parameter in module.parameters():
                if id(parameter) not in taken:
                    taken.add(id(parameter))
                    found.append(tuple(parameter.shape))
        return sorted(found)

    real = [(unit(block), 2) for block in plan.blocks]
    for group in plan.shard_units:
        gathers = 1 if group.keep_gathered or group.unused_in_backward else 2
        real.append((unit(*group.modules), gathers))
    if rest := unit(model):
        real.append((rest, 1))
    by_formula = [
        (sorted(unit.shapes), unit.gathers)
        for unit in unit_shapes(config, layers)
        for _ in range(unit.count)
    ]
    assert by_formula == real


def test_quantized_wires_send_a_quarter_between_nodes() -> None:
    """ZeRO++ (Wang et al., 2023): 3 P to 0.75 P between nodes, and what scales add."""
    units = [UnitShapes(shapes=((8192, 8192),), count=4)]
    bf16 = Formats(params=4, compute=2, reduce=2)

    def between(**settings: object) -> float:
        zero = ZeroConfig(**settings)  # type: ignore[arg-type]
        place = place_of(5, cluster(16), 4, zero)
        kinds = sent(units, zero, bf16, place, microbatches=1).values()
        return sum(kind.between for kind in kinds)

    plain = between()
    together = between(
        secondary_shard=4,
        quantize_weights=Quantization.int8,
        quantize_gradients=Quantization.int4,
    )
    assert between(secondary_shard=4) / plain == pytest.approx(2 / 3)
    assert between(quantize_weights=Quantization.int8) / plain == pytest.approx(
        (1 + 2 * (0.5 + 2 / 256)) / 3
    )
    assert 0.25 < together / plain <= 0.27


def test_a_secondary_shard_smaller_than_a_node_also_sends_its_first_hop_inside() -> None:
    zero = ZeroConfig(secondary_shard=2)
    place = place_of(5, cluster(8), 4, zero)
    assert (place.across, place.local) == ((1, 3, 5, 7), (4, 5))
    units = [UnitShapes(shapes=((32, 16),), gathers=2)]
    traffic = sent(units, zero, Formats(params=4, compute=4, reduce=4), place, microbatches=3)
    part = 32 * 16 * 4 // 8
    assert traffic["params"] == Traffic(inside=part + 4 * part * 6, between=2 * part)


@pytest.mark.parametrize(
    ("rank", "states", "across", "local", "copies"),
    [
        (13, ALL, (9, 13), (13, 15), (5, 13)),
        (13, NODE, (13,), (13, 15), (1, 5, 9, 13)),
        (13, NONE, (13,), (13,), (1, 3, 5, 7, 9, 11, 13, 15)),
        (18, ALL, (18, 22), (16, 18), (18, 26)),
    ],
)
def test_whom_a_rank_talks_to(
    rank: int,
    states: Extent,
    across: tuple[int, ...],
    local: tuple[int, ...],
    copies: tuple[int, ...],
) -> None:
    """Two pipeline stages x two replicas x four shards x two tensor-parallel ranks, nodes of 4."""
    degrees = cluster(4, dp_replicate=2, tp=2)
    place = place_of(rank, degrees, 4, at(NONE, NONE, states))
    assert (place.across, place.local, place.copies) == (across, local, copies)


def test_what_is_kept_by_each_extent() -> None:
    """One matrix of 64 x 16 over 2 nodes of 2, fp32 masters, bf16 computing, fp32 sums."""
    units = [UnitShapes(shapes=((64, 16),))]
    formats = Formats(params=4, compute=2, reduce=4)

    def kept(*extents: Extent, microbatches: int = 4, **settings: object) -> Held:
        zero = at(*extents, **settings)
        place = place_of(0, cluster(4), 2, zero)
        return held(units, zero, formats, place, microbatches=microbatches, moments=fp32_moments)

    numel = 64 * 16
    replicated = kept(NONE, NONE, NONE)
    assert (replicated.masters, replicated.moments) == (4 * numel, 8 * numel)
    assert (replicated.params, replicated.grads) == (2 * numel, 4 * numel)
    inside = kept(NODE, NODE, ALL)
    assert (inside.masters, inside.moments) == (numel, 2 * numel)
    assert (inside.params, inside.grads) == (numel, 2 * numel)
    divided = kept(ALL, ALL, ALL)
    assert (divided.params, divided.grads) == (numel / 2, numel)
    assert kept(NONE, NONE, ALL, microbatches=1).grads == numel
    assert divided.feedback == 0
    rounded = kept(
        ALL,
        ALL,
        ALL,
        quantize_gradients=Quantization.int4,
        error_feedback=True,
        block_size=64,
    )
    assert rounded.feedback == 4 * numel + 2 * numel
    offloaded = kept(ALL, ALL, ALL, offload=Offload.cpu)
    assert offloaded.on_device == divided.on_device - divided.masters - divided.moments


def test_a_lone_rank_computes_with_its_masters() -> None:
    units = [UnitShapes(shapes=((64, 16),))]
    zero, same = ZeroConfig(stage=0), Formats(params=4, compute=4, reduce=4)
    place = place_of(0, cluster(1), 1, zero)
    found = held(units, zero, same, place, microbatches=2, moments=fp32_moments)
    assert found.params == 0
    assert sent(units, zero, same, place, microbatches=2) == {}


def test_points_are_what_partition_says() -> None:
    assert at(NODE, ALL, ALL).extents == Partition(NODE, ALL, ALL)
