"""Training outlives its holders: what was under way fails, what comes next is protected anew."""

from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.format.folders import folder_name
from phalanx.checkpoint.holder.client import HolderClient
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import Events, Run, holder_pids, step_names
from tests.checkpoint.snapshot.nodes import before, check_protected, protected_manager, state, take
from tests.killed_run import end_all, wait_until


def outlive_a_holder(
    ranks: Ranks, root: Path, parity: int, how: str, durable: tuple[int, ...]
) -> Events:
    """Snapshot on, while node 1's holder is killed at step 3."""
    with process_group(ranks):
        events: Events = []
        manager = protected_manager(ranks, root, parity, events)
        nodes = ranks.world_size // ranks.ranks_per_node
        for step in range(1, 6):
            if step == 3 and ranks.rank == 1:
                kill = partial(end_all, [holder_pids(root)[1]])
                if how == "protecting":
                    before(HolderClient, "protect", kill)
                elif how == "committing":
                    before(HolderClient, "commit", kill)
                else:
                    kill()
            dist.barrier()
            tensors = take(manager, ranks, step, durable=step in durable)
            manager.before_update()
            for tensor in tensors.values():
                tensor.zero_()
            if step == 3 and step in durable and how != "between snapshots":
                with pytest.raises(CheckpointError, match="step 3 could not be saved.*holder"):
                    manager.wait()
            else:
                manager.wait()
            dist.barrier()
            if step != 3:
                check_protected(root, nodes, step)
            dist.barrier()
        manager.close()
        return events


@pytest.mark.parametrize("how", ["between snapshots", "protecting", "committing"])
def test_training_outlives_a_holder(run_ranks: Run, root: Path, how: str) -> None:
    events, *_ = run_ranks(outlive_a_holder, root, 1, how, (2, 3, 4), world_size=3, nodes=3)
    told = [(name, facts["step"]) for name, facts in events if "step" in facts]
    failed = [("snapshot_failed", 3), ("checkpoint_failed", 3)]
    if how == "between snapshots":  # it is missed in time
        failed = [("holder_lost", 3), ("checkpoint_saved", 3)]
    assert told == [("checkpoint_saved", 2), *failed, ("checkpoint_saved", 4)]
    assert [name for name, _ in events].count("snapshot_opened") == 2
    assert all("holder" in facts["reason"] for name, facts in events if "failed" in name)
    assert not holder_pids(root)


def outlive_a_holder_that_writes(ranks: Ranks, root: Path) -> Events:
    """Node 1's holder is killed while it writes the checkpoint of step 2 to slow storage."""
    with process_group(ranks):
        events: Events = []
        storage = StorageConfig(limit_mb_s=0.05)
        manager = protected_manager(ranks, root, 1, events, storage=storage)
        manager.prepare(state(ranks.rank, 0))
        take(manager, ranks, 2, durable=True)
        manager.before_update()
        dist.barrier()
        if ranks.rank == 1:
            holder = holder_pids(root)[1]
            wait_until(lambda: (root / folder_name(2)).exists())
            end_all([holder])
        dist.barrier()
        for step in range(3, 6):
            take(manager, ranks, step)
        with pytest.raises(CheckpointError, match="rank 1: HolderGone"):
            manager.wait()
        take(manager, ranks, 6)
        manager.wait()
        check_protected(root, ranks.world_size, 6)
        dist.barrier()
        take(manager, ranks, 7, durable=True)
        manager.close()
        return events


def test_training_outlives_a_holder_that_writes(run_ranks: Run, root: Path) -> None:
    events, *_ = run_ranks(outlive_a_holder_that_writes, root, world_size=3, nodes=3)
    told = sorted((facts["step"], name) for name, facts in events if "step" in facts)
    assert (2, "checkpoint_failed") in told
    assert told[-1] == (7, "checkpoint_saved")
    assert {name for name, _ in events} == {
        "snapshot_opened",
        "holder_lost",
        "checkpoint_failed",
        "checkpoint_saved",
    }
    assert step_names(root) == [folder_name(7)]
