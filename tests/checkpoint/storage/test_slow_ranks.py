"""Storage that is slower than checkpoints are due: they are left out, training waits for none."""

from pathlib import Path

import pytest
import torch

from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.format.folders import folder_name
from phalanx.checkpoint.format.manifest import NAME
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import LINGER_S, Events, Run, committed_steps, filled, manager_of
from tests.killed_run import wait_until

STEPS = range(1, 9)
SLOW_MB_S = 0.3
"""Each node's file of 0.4 MB takes more than a second."""


def slow_manager(ranks: Ranks, root: Path, every: int, events: Events) -> CheckpointManager:
    """All checkpoints are kept; `every`: steps between snapshots."""
    return manager_of(
        ranks,
        root,
        events=events,
        every=1,
        keep=0,
        snapshot=SnapshotConfig(every=every, linger_s=LINGER_S),
        storage=StorageConfig(limit_mb_s=SLOW_MB_S),
    )


def save_every_step(ranks: Ranks, root: Path, every: int) -> tuple[int, Events]:
    """The step that is resumed, and what was told."""
    with process_group(ranks):
        events: Events = []
        manager = slow_manager(ranks, root, every, events)
        tensors = {f"x{ranks.rank}": torch.zeros(100_000)}
        manager.prepare(tensors)
        for step in STEPS:
            tensors[f"x{ranks.rank}"].fill_(step)
            may_skip = step != STEPS[-1]
            manager.snapshot(step, lambda: tensors, {}, durable=True, may_skip=may_skip)
            manager.before_update()
        wait_until(lambda: STEPS[-1] in committed_steps(root))
        assert not (root / folder_name(STEPS[-1]) / NAME).exists(), "it waited for storage"
        manager.wait()
        resumed = manager.resume(lambda step, names, meta: tensors)
        manager.close()
        assert resumed is not None
        assert filled(tensors, resumed.step)
        return resumed.step, events


@pytest.mark.parametrize("every", [0, 1])
def test_training_never_waits_for_storage(run_ranks: Run, tmp_path: Path, every: int) -> None:
    results = run_ranks(save_every_step, tmp_path, every, world_size=2, nodes=2)
    told = [(name, facts["step"]) for name, facts in results[0][1] if "step" in facts]
    saved = [step for name, step in told if name == "checkpoint_saved"]
    skipped = [step for name, step in told if name == "checkpoint_skipped"]
    assert saved[0] == STEPS[0]
    assert saved[-1] == STEPS[-1], "the last one is never left out"
    assert skipped, "storage was fast enough"
    assert sorted(saved + skipped) == list(STEPS), "each is told once, and nothing failed"
    assert told.index(("checkpoint_skipped", skipped[0])) < told.index(("checkpoint_saved", 1)), (
        "training waited for the first one"
    )
    assert [step for step, _ in results] == [STEPS[-1]] * 2


def save_a_step_twice(ranks: Ranks, root: Path, may_skip: bool) -> Events:
    """The snapshot of step 2 stands in memory, step 1 is on its way to storage: save step 2."""
    with process_group(ranks):
        events: Events = []
        manager = slow_manager(ranks, root, 1, events)
        tensors = {f"x{ranks.rank}": torch.zeros(100_000)}
        for step, durable, skippable in ((1, True, False), (2, False, False), (2, True, may_skip)):
            manager.snapshot(step, lambda: tensors, {}, durable=durable, may_skip=skippable)
            manager.before_update()
        manager.close()
        return events


@pytest.mark.parametrize("may_skip", [False, True])
def test_a_snapshot_that_stands_is_saved_or_left_out(
    run_ranks: Run, tmp_path: Path, may_skip: bool
) -> None:
    events, _ = run_ranks(save_a_step_twice, tmp_path, may_skip, world_size=2, nodes=2)
    told = sorted((facts["step"], name) for name, facts in events if "step" in facts)
    assert told == [
        (1, "checkpoint_saved"),
        (2, f"checkpoint_{'skipped' if may_skip else 'saved'}"),
    ]
    assert [name for name, _ in events].count("snapshot_opened") == 1, "nothing was copied anew"
