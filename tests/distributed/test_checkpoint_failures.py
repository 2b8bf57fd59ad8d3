"""A rank that cannot save is named on every rank, and the checkpoint before stays the newest."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.checkpoint import write
from phalanx.checkpoint.folders import folder_name
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.peers import CheckpointError
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpointing import Events, Run, manager_of


def save_and_wait(manager: CheckpointManager, *args: Any) -> None:
    manager.save(*args)
    manager.wait()


def fail_on_rank_1(ranks: Ranks, root: Path, async_save: bool) -> list[str]:
    """Rank 1's files may not grow over 1 MB for a while; then it is given something unsavable."""
    with process_group(ranks):
        manager = manager_of(ranks, root, async_save=async_save)
        tensors = {f"x{ranks.rank}": torch.full((1_000_000,), 1.0)}
        manager.save(1, tensors, {})
        manager.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        texts = []
        with pytest.raises(CheckpointError, match="step 2 could not be saved") as caught:
            save_and_wait(manager, 2, tensors, {})
        texts.append(str(caught.value))
        assert caught.value.__cause__ is not None
        assert caught.value.__cause__.__traceback__ is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert manager.newest() == 1
        with pytest.raises(CheckpointError, match="step 3 could not be saved") as caught:
            save_and_wait(manager, 3, tensors, {"x": object()} if ranks.rank == 1 else {})
        texts.append(str(caught.value))
        manager.save(4, tensors, {})
        manager.close()
        assert manager.newest() == 4
        return texts


@pytest.mark.parametrize("async_save", [False, True])
def test_a_rank_that_cannot_write_is_named_on_every_rank(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    for write_text, meta_text in run_ranks(fail_on_rank_1, tmp_path, async_save, world_size=2):
        assert "rank 1" in write_text
        assert os.strerror(errno.EFBIG) in write_text
        assert "rank 1: ValueError: meta: only what JSON holds" in meta_text


def save_where_nothing_can_be(ranks: Ranks, root: Path) -> str:
    with process_group(ranks):
        manager = manager_of(ranks, root)
        manager.save(1, {"x": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError) as caught:
            manager.save(2, {"x": torch.zeros(1)}, {})
        manager.close()
        return str(caught.value)


def test_unwritable_folder(run_ranks: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for text in run_ranks(save_where_nothing_can_be, tmp_path / "file" / "c", world_size=2):
        assert "step 1 could not be saved" in text
        assert "rank 0: NotADirectoryError" in text
        assert str(tmp_path / "file") in text


def save_on_a_disk_of_its_own(ranks: Ranks, root: Path, async_save: bool) -> list[str]:
    """From step 2 on rank 1 writes to a disk of its own; of step 3, rank 0 sees the beginning."""
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, async_save=async_save, keep=1)
        tensors = {f"x{ranks.rank}": torch.full((1000,), float(ranks.rank))}
        save_and_wait(manager, 1, tensors, {})
        write_here = write.write_chunks

        def elsewhere(folder: Path, *args: Any, **kwargs: Any) -> Any:
            own = root.with_name("other_node") / folder.name
            files = write_here(own, *args, **kwargs)
            if folder.name == folder_name(3):
                for name in files:
                    (folder / name).write_bytes(b"half")
            return files

        if ranks.rank == 1:
            write.write_chunks = elsewhere
        texts = []
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=f"step {step} could not be saved") as caught:
                save_and_wait(manager, step, tensors, {})
            texts.append(str(caught.value))
            assert manager.newest() == 1
        write.write_chunks = write_here
        save_and_wait(manager, 4, tensors, {})
        assert manager.newest() == 4
        manager.close()
        saved = [facts["step"] for name, facts in events if name == "checkpoint_saved"]
        assert saved == ([1, 4] if ranks.rank == 0 else [])
        return texts


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_nodes_do_not_share_is_named_on_every_rank(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    root = tmp_path / "c"
    (missing, cut), other = run_ranks(save_on_a_disk_of_its_own, root, async_save, world_size=2)
    assert other == [missing, cut]
    assert f"checkpoint.dir={root}: not shared by all nodes: rank 1's file __1_0.dis" in missing
    assert "is not here" in missing
    assert f"checkpoint.dir={root}: rank 1's file __1_0.distcp has 4 bytes here" in cut
