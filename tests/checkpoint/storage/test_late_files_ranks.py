"""A holder goes on writing what a run that died had asked for, and spoils nothing by it."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.checkpoint.format.folders import complete_folders, folder_name
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage
from phalanx.launch.ranks.start import RankFailed
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import Run, filled, holder_pids, manager_of
from tests.killed_run import end_all, wait_until

pytestmark = pytest.mark.storage

STEP = 5
LAST = "part-00005.safetensors"
"""More files than a holder writes at a time: this one is begun late."""


def before_layout(rank: int) -> dict[str, Tensor]:
    return {"kept": torch.full((9_000,), 7.0), f"old{rank}": torch.zeros(9_000 + 500 * rank)}


def after_layout(rank: int) -> dict[str, Tensor]:
    return {"kept": torch.zeros(9_000), f"new{rank}": torch.full((8_000,), 7.0)}


def die_while_it_is_written(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, storage=StorageConfig(limit_mb_s=0.04))
        tensors = before_layout(ranks.rank)
        manager.snapshot(STEP, lambda: tensors, {}, durable=True)
        manager.before_update()
        wait_until((root / folder_name(STEP)).exists)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def save_the_same_step_and_die(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root)
        tensors = after_layout(ranks.rank)
        resumed = manager.resume(lambda step, names, meta: {"kept": tensors["kept"]})
        assert resumed is not None
        assert (resumed.step, resumed.from_memory) == (STEP, True)
        assert not (root / folder_name(STEP) / LAST).exists()
        manager.save(STEP, tensors, {})
        manager.wait()
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def load(ranks: Ranks, root: Path) -> bool:
    with process_group(ranks):
        manager = manager_of(ranks, root)
        tensors = after_layout(ranks.rank)
        tensors[f"new{ranks.rank}"].zero_()
        manager.load(STEP, tensors)
        manager.close()
        return filled(tensors, 7.0)


@pytest.mark.slow
def test_late_files_of_a_run_that_died(run_ranks: Run, tmp_path: Path) -> None:
    root = tmp_path / "c"
    for start in (die_while_it_is_written, save_the_same_step_and_die):
        with pytest.raises(RankFailed, match="SIGKILL"):
            run_ranks(start, root, world_size=6)
    assert complete_folders(open_storage(root)) == {STEP: folder_name(STEP, revision=1)}
    wait_until((root / folder_name(STEP) / LAST).exists)
    end_all(holder_pids(root).values())
    assert run_ranks(load, root, world_size=6) == [True] * 6
