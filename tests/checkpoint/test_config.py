"""What the settings of snapshots and storage refuse, note and mean."""

import pytest

from phalanx.checkpoint.config import CheckpointConfig, SnapshotConfig
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.train.config import Config, LaunchConfig
from phalanx.train.plan.notes import notes
from tests.refusals import CHECKPOINT_MODULES, INF, NAN, Case, check_refusal, of, unreached


def protected(parity: str, *, every: int = 1, group_size: int = 8, **parts: object) -> Config:
    snapshot = SnapshotConfig(every=every, parity=parity, group_size=group_size)
    return Config(checkpoint=CheckpointConfig(snapshot=snapshot), **parts)  # type: ignore[arg-type]


def on_nodes(parity: str, *words: str, nodes: int) -> Case:
    """Protection that so many nodes of one rank cannot give."""
    config = protected(parity, parallel=ParallelConfig(dp_shard=nodes))
    return Case(make=lambda: config.check_nodes(nodes, 1), words=words)


SNAPSHOT, STORAGE = "checkpoint.snapshot", "checkpoint.storage"
CASES = [
    *(of(CheckpointConfig, "checkpoint", key, -1, "0 or more") for key in ("every", "keep")),
    of(CheckpointConfig, "checkpoint", "keep_every", -3, "0 or more"),
    of(CheckpointConfig, "checkpoint", "dir", "", "folder", "URL"),
    of(SnapshotConfig, SNAPSHOT, "every", -1, "0 or more"),
    of(SnapshotConfig, SNAPSHOT, "group_size", 1, "at least 2"),
    *(of(SnapshotConfig, SNAPSHOT, "linger_s", value, "finite") for value in (-1.0, NAN, INF)),
    *(of(SnapshotConfig, SNAPSHOT, "node_mtbf_h", value, "above 0") for value in (0.0, NAN, INF)),
    *(
        of(SnapshotConfig, SNAPSHOT, "parity", value, "none, xor, or rs(m)", "rs(2)")
        for value in ("raid", "rs", "rs(0)", "rs(-1)", "rs(2", "2", "")
    ),
    of(SnapshotConfig, SNAPSHOT, "parity", "rs(8)", "group_size=8", "rs(7)"),
    of(SnapshotConfig, SNAPSHOT, "parity", "rs(3)", "group_size=3", "rs(2)", group_size=3),
    of(StorageConfig, STORAGE, "retries", -1, "0 or more"),
    *(of(StorageConfig, STORAGE, "limit_mb_s", value, "finite") for value in (-1.0, NAN, INF)),
    *(of(StorageConfig, STORAGE, "piece_mb", value, "5", "1024") for value in (4, 1025)),
]
NODE_CASES = [
    on_nodes("xor", "checkpoint.snapshot.parity", "1", nodes=1),
    on_nodes("rs(2)", "checkpoint.snapshot.parity", "2", nodes=2),
]


@pytest.mark.parametrize("case", [*CASES, *NODE_CASES], ids=lambda case: " ".join(case.words)[:60])
def test_refusals_name_key_value_and_what_would_be_right(case: Case) -> None:
    check_refusal(case)


def test_every_refusal_has_a_case() -> None:
    assert unreached(CHECKPOINT_MODULES, CASES) == []


@pytest.mark.parametrize(
    ("parity", "lost"), [("none", 0), ("xor", 1), ("rs(1)", 1), ("rs(2)", 2), ("rs( 3 )", 3)]
)
def test_parity_is_the_number_of_nodes_that_may_be_lost(parity: str, lost: int) -> None:
    assert SnapshotConfig(parity=parity).num_parity == lost


def test_what_has_no_effect_is_noted() -> None:
    alone = notes(protected("xor", every=0))
    assert any(
        note.startswith(
            "checkpoint.snapshot.parity=xor: no effect with checkpoint.snapshot.every=0"
        )
        for note in alone
    )
    racks = notes(protected("none", launch=LaunchConfig(racks=["a"])))
    assert any(note.startswith("launch.racks=['a']: no effect") for note in racks)
    waits = notes(
        protected(
            "none",
            parallel=ParallelConfig(pp=2, dp_shard=1),
            pipeline=PipelineConfig(post_validation=True),
        )
    )
    assert any("checkpoint.snapshot.every=1: with pipeline.post_validation" in n for n in waits)
    assert not any("checkpoint" in note for note in notes(Config()))


def test_enough_nodes_are_fine() -> None:
    for nodes, parity in ((2, "xor"), (3, "rs(2)"), (6, "rs(2)"), (11, "rs(2)")):
        config = protected(parity, parallel=ParallelConfig(dp_shard=nodes))
        config.check_nodes(nodes, 1)
