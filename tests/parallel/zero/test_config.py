"""What ZeRO's settings refuse and note, which point of the partition space they name, and nodes."""

from dataclasses import replace

import pytest

from phalanx.launch.config.compose import check, compose
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.config import Offload, PartitionConfig, ZeroConfig
from phalanx.parallel.zero.partition import (
    NAMES,
    POINTS,
    STAGES,
    Extent,
    Partition,
    data_ranks_per_node,
)
from phalanx.train.config import Config, Device, LaunchConfig, Launcher, Precision, PrecisionConfig
from phalanx.train.plan.notes import notes
from tests.refusals import ZERO_MODULES, Case, check_refusal, of, unreached

INT8, INT4, FP8 = Quantization.int8, Quantization.int4, Quantization.fp8
NONE, NODE, ALL = Extent


def partition(*extents: Extent | None) -> PartitionConfig:
    params, grads, states = extents
    return PartitionConfig(params=params, grads=grads, states=states)


def on_nodes(words: tuple[str, ...], per_node: int | None, **settings: object) -> Case:
    """Settings that do not fit nodes with so many of 8 data-parallel ranks."""
    return Case(
        make=lambda: ZeroConfig(**settings).check_nodes(8, per_node),  # type: ignore[arg-type]
        words=words,
    )


def wrong_order(*extents: Extent | None, words: tuple[str, ...], stage: int = 3) -> Case:
    return Case(
        make=lambda: ZeroConfig(partition=partition(*extents), stage=stage),
        words=("zero.partition=", "params <= grads <= states", *words),
    )


CASES = [
    of(ZeroConfig, "zero", "stage", 4, "0, 1, 2 or 3"),
    of(ZeroConfig, "zero", "stage", -1, "0, 1, 2 or 3"),
    of(ZeroConfig, "zero", "secondary_shard", -2, "0 for none"),
    wrong_order(ALL, NODE, ALL, words=("params: all, grads: node, states: all",)),
    wrong_order(NODE, NONE, NODE, words=("params: node, grads: none",)),
    wrong_order(NONE, ALL, NODE, words=("grads: all, states: node",)),
    wrong_order(None, NONE, None, words=("params: all, grads: none", "zero.stage=3")),
    wrong_order(NODE, None, None, words=("params: node, grads: none", "zero.stage=1"), stage=1),
    of(ZeroConfig, "zero", "secondary_shard", 4, "zero.stage=3 (here 2)", stage=2),
    *(
        of(ZeroConfig, "zero", "secondary_shard", 4, "zero.partition", partition=partition(*given))
        for given in ((NODE, NODE, None), (ALL, None, None), (NONE, NONE, NONE))
    ),
    *(of(ZeroConfig, "zero", "block_size", block, "8", "65536") for block in (0, -8, 7, 65537)),
    *(
        of(ZeroConfig, "zero", "block_size", 129, "int4", "even", **{f"quantize_{what}": INT4})
        for what in ("weights", "gradients")
    ),
    of(ZeroConfig, "zero", "quantize_gradients", FP8, "none, int8 or int4"),
    of(ZeroConfig, "zero", "quantize_weights", INT8, "zero.stage=0", stage=0),
    of(
        ZeroConfig,
        "zero",
        "quantize_gradients",
        INT8,
        "zero.partition.states=all (here node)",
        partition=partition(NODE, NODE, NODE),
    ),
    of(ZeroConfig, "zero", "quantize_gradients", INT4, "states=all (here none)", stage=0),
    of(ZeroConfig, "zero", "error_feedback", True, "zero.quantize_gradients"),
    on_nodes(("parallel.dp_shard=8", "different numbers"), None, quantize_gradients=INT8),
    on_nodes(("parallel.dp_shard=8", "`node`"), None, partition=partition(NODE, None, None)),
    on_nodes(("zero.secondary_shard=4", "larger", "2 of", "dp_shard=8"), 2, secondary_shard=4),
    on_nodes(("zero.secondary_shard=3", "does not divide the 4"), 4, secondary_shard=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words[0])
def test_refusal_names_key_and_value(case: Case) -> None:
    check_refusal(case)


def test_every_refusal_has_a_case() -> None:
    assert unreached(ZERO_MODULES, CASES) == []


def test_the_space_has_ten_points_each_with_a_name() -> None:
    assert len(POINTS) == 10
    assert set(NAMES) == set(POINTS)
    assert len(set(NAMES.values())) == 10
    assert set(STAGES) <= set(POINTS)


@pytest.mark.parametrize("stage", range(4))
def test_a_stage_is_a_point(stage: int) -> None:
    assert ZeroConfig(stage=stage).extents == STAGES[stage]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_every_point_can_be_named_in_full(point: Partition) -> None:
    given = partition(point.params, point.grads, point.states)
    for stage in range(4):
        assert ZeroConfig(stage=stage, partition=given).extents == point


def test_what_is_not_named_comes_from_the_stage() -> None:
    assert ZeroConfig(partition=partition(NODE, None, None)).extents == Partition(NODE, ALL, ALL)
    assert ZeroConfig(stage=2, partition=partition(None, NODE, None)).extents == Partition(
        NONE, NODE, ALL
    )
    assert ZeroConfig(secondary_shard=2).extents == Partition(NODE, ALL, ALL)


@pytest.mark.parametrize(
    ("dp_shard", "tp", "ranks_per_node", "found"),
    [
        (4, 1, 8, 4),
        (8, 1, 4, 4),
        (8, 2, 4, 2),
        (2, 4, 4, 1),
        (2, 8, 4, 1),
        (3, 1, 2, None),
        (4, 3, 4, None),
        (6, 2, 8, None),
    ],
)
def test_data_ranks_of_a_node(
    dp_shard: int, tp: int, ranks_per_node: int, found: int | None
) -> None:
    assert data_ranks_per_node(dp_shard, tp, ranks_per_node) == found
    if found is not None:  # by counting: tensor-parallel ranks are neighbours
        nodes = [rank * tp // ranks_per_node for rank in range(dp_shard)]
        assert {nodes.count(node) for node in nodes} == {found}


def test_nodes_are_checked_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    layout = [
        "parallel={pp: 1, dp_shard: 8, tp: 1}",
        "training.global_batch_size=64",
        "launch={device: cpu, emulate_nodes: true, nodes: 4, ranks_per_node: 2}",
        "data.dir=nowhere",
    ]
    layout = [text for group in layout for text in _spread(group)]
    with pytest.raises(ValueError, match=r"^zero\.secondary_shard=4: larger than a node"):
        check(compose([*layout, "zero.secondary_shard=4"]))
    with pytest.raises(ValueError, match="nowhere"):  # the next check
        check(compose([*layout, "zero.secondary_shard=2"]))


def _spread(text: str) -> list[str]:
    group, _, rest = text.partition("={")
    if not rest:
        return [text]
    return [f"{group}.{item.strip().replace(': ', '=')}" for item in rest.rstrip("}").split(",")]


def noted(num_nodes: int | None = 2, dp_shard: int = 4, **settings: object) -> list[str]:
    zero = ZeroConfig(**settings)  # type: ignore[arg-type]
    config = Config(zero=zero, parallel=ParallelConfig(dp_shard=dp_shard))
    return notes(config, num_nodes=num_nodes)


def test_settings_without_ranks_to_divide_among_are_noted() -> None:
    found = noted(
        dp_shard=1,
        partition=partition(NODE, None, None),
        quantize_weights=INT8,
        quantize_gradients=INT4,
    )
    assert [note.partition(":")[0] for note in found] == [
        "zero.partition.params=node",
        "zero.quantize_weights=int8",
        "zero.quantize_gradients=int4",
    ]
    assert all("no effect with parallel.dp_shard=1" in note for note in found)
    assert noted(dp_shard=1, stage=2) == ["zero.stage=2: no effect with one data-parallel rank"]
    assert noted(quantize_weights=INT8, quantize_gradients=INT4) == []


def test_a_node_that_is_all_nodes_is_noted() -> None:
    inside = partition(NODE, NODE, None)
    assert noted(partition=inside) == noted(num_nodes=None, partition=inside) == []
    found = noted(num_nodes=1, partition=inside)
    assert [note.partition(":")[0] for note in found] == [
        "zero.partition.params=node",
        "zero.partition.grads=node",
    ]
    [secondary] = noted(num_nodes=1, secondary_shard=2)
    assert secondary.startswith("zero.secondary_shard=2: one node holds all")
    assert noted(num_nodes=1) == []


def test_a_stage_that_says_nothing_is_noted() -> None:
    full = partition(NONE, NODE, ALL)
    [note] = noted(stage=1, partition=full)
    assert note == "zero.stage=1: no effect, zero.partition says everything"
    assert noted(partition=full) == []
    assert noted(stage=1, partition=partition(NONE, NODE, None)) == []


def test_what_quantization_gains_and_costs_is_noted() -> None:
    [once] = noted(stage=2, quantize_weights=INT8)
    assert once.startswith("zero.quantize_weights=int8: weights are gathered once a step only")
    [memory] = noted(quantize_gradients=INT4, error_feedback=True)
    assert memory.startswith("zero.error_feedback=true: each rank keeps")


def test_offload_on_the_cpu_is_noted() -> None:
    config = Config(zero=ZeroConfig(offload=Offload.cpu), launch=LaunchConfig(device=Device.cpu))
    assert notes(config) == ["zero.offload=cpu: no effect with launch.device=cpu"]
    assert notes(replace(config, launch=LaunchConfig(device=Device.cuda))) == []


def test_reductions_in_bf16_are_noted_where_gradients_wait() -> None:
    bf16 = PrecisionConfig(compute=Precision.bf16, reduce=Precision.bf16)
    for stage, count in ((1, 1), (2, 0)):
        found = notes(Config(zero=ZeroConfig(stage=stage), precision=bf16))
        assert [note.partition(":")[0] for note in found] == ["precision.reduce=bf16"] * count


def test_emulated_nodes_need_a_local_launch_and_their_size() -> None:
    assert LaunchConfig(emulate_nodes=True, nodes=2, ranks_per_node=2).nodes == 2
    for settings in ({"ranks_per_node": 2, "launcher": Launcher.ray}, {"ranks_per_node": None}):
        with pytest.raises(ValueError, match=r"^launch\.emulate_nodes=true: .*ranks_per_node"):
            LaunchConfig(emulate_nodes=True, nodes=2, **settings)  # type: ignore[arg-type]
