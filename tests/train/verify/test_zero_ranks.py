"""`phalanx verify` at every point of ZeRO's space, on nodes that one machine plays."""

import pytest

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import POINTS, Extent, Partition
from phalanx.train.config import (
    Config,
    Device,
    LaunchConfig,
    Precision,
    TrainingConfig,
    VerifyConfig,
)
from phalanx.train.data.config import DataConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.verify import VerifyReport
from tests.parallel.zero.layouts import at
from tests.train.verify.verifier import Verifier

pytestmark = [pytest.mark.verify, pytest.mark.zero]

MODEL = ModelConfig(
    vocab_size=300,
    dim=36,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    ffn_dim=52,
    qk_norm=True,
    attention_bias=True,
)
NONE, NODE, ALL = Extent
TWO_BY_TWO = {"dp_shard": 4}
NODES_OF_RANKS: dict[str, tuple[dict[str, int], int, int]] = {
    "2 x 2": (TWO_BY_TWO, 2, 2),
    "2 x 4": ({"dp_shard": 8}, 2, 4),
    "2 x 2 of tp": ({"dp_shard": 4, "tp": 2}, 2, 4),
    "pp, each 2 x 2": ({"dp_shard": 4, "pp": 2}, 4, 2),
    "replicas, each 2 x 2": ({"dp_shard": 4, "dp_replicate": 2}, 4, 2),
}
EVERYWHERE = {**{str(point): at(point) for point in POINTS}, "hpZ": ZeroConfig(secondary_shard=2)}
ALIKE = {
    **{extent.name: at(Partition(extent, extent, extent)) for extent in Extent},
    "hpZ": EVERYWHERE["hpZ"],
}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(tmp_path_factory.mktemp("references"))


def run(
    verifier: Verifier,
    data: DataConfig,
    zero: ZeroConfig,
    degrees: dict[str, int],
    *,
    nodes: int,
    ranks_per_node: int,
    schedule: str = "1f1b",
    resume_in: dict[str, int] | None = None,
) -> VerifyReport:
    """Verify a small model on the test corpus: two microbatches a step, or four where only four
    data-parallel ranks are."""
    parallel = ParallelConfig(**degrees)
    microbatch = 2 if parallel.tp * parallel.pp > 1 else 1
    config = Config(
        model=MODEL,
        data=data,
        parallel=parallel,
        pipeline=PipelineConfig(schedule=schedule),
        zero=zero,
        training=TrainingConfig(seq_len=32, global_batch_size=16, microbatch_size=microbatch),
        launch=LaunchConfig(
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            emulate_nodes=True,
            device=Device.cpu,
            threads_per_rank=1,
            timeout_s=120,
        ),
        verify=VerifyConfig(dtype=Precision.fp64, steps=2, resume_in=resume_in or {}),
    )
    return verifier(config, world_size=nodes * ranks_per_node)


@pytest.mark.slow
@pytest.mark.parametrize("place", NODES_OF_RANKS.values(), ids=NODES_OF_RANKS.keys())
@pytest.mark.parametrize("zero", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_every_point_equals_one_process(
    verifier: Verifier,
    demo_data: DataConfig,
    zero: ZeroConfig,
    place: tuple[dict[str, int], int, int],
) -> None:
    """Pipelines with split backward passes, whose weight gradients come later."""
    degrees, nodes, ranks_per_node = place
    report = run(
        verifier,
        demo_data,
        zero,
        degrees,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        schedule="zb_h1" if "pp" in degrees else "1f1b",
    )
    assert report.passed, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ALIKE.values(), ids=ALIKE.keys())
def test_whole_backward_passes_equal_one_process(
    verifier: Verifier, demo_data: DataConfig, zero: ZeroConfig
) -> None:
    """Where all is divided alike, and with a secondary shard; test_shard_ranks.py has them at every
    point."""
    degrees, nodes, ranks_per_node = NODES_OF_RANKS["pp, each 2 x 2"]
    report = run(verifier, demo_data, zero, degrees, nodes=nodes, ranks_per_node=ranks_per_node)
    assert report.passed, report.table()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "after"),
    [
        (Partition(NODE, NODE, NODE), {"tp": 2, "dp_shard": 2}),
        (Partition(NODE, NODE, ALL), {"pp": 2, "dp_shard": 2}),
    ],
    ids=str,
)
def test_states_of_nodes_resume_in_another_layout(
    verifier: Verifier, demo_data: DataConfig, point: Partition, after: dict[str, int]
) -> None:
    report = run(
        verifier, demo_data, at(point), TWO_BY_TWO, nodes=2, ranks_per_node=2, resume_in=after
    )
    assert report.passed, report.table()
