"""A node that cannot save is named on every rank, and the checkpoint before stays the newest."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.holder import line, start
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.snapshot import epoch
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import Events, Run, holder_pids, kill_holders, manager_of


def failed_save(manager: CheckpointManager, step: int, tensors: dict[str, torch.Tensor]) -> str:
    def save_and_wait() -> None:
        manager.save(step, tensors, {})
        manager.wait()

    with pytest.raises(CheckpointError, match=f"step {step} could not be saved") as caught:
        save_and_wait()
    return str(caught.value)


def fail_on_node_1(ranks: Ranks, root: Path, async_save: bool) -> tuple[str, Events]:
    """Files of the second node's holder may not grow over 1 MB for a while."""
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, async_save=async_save)
        tensors = {f"x{ranks.rank}": torch.full((1_000_000,), 1.0)}
        manager.save(1, tensors, {})
        manager.wait()
        holder = holder_pids(root)[1]
        limits = resource.prlimit(holder, resource.RLIMIT_FSIZE)
        if ranks.rank == 1:
            resource.prlimit(holder, resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        text = failed_save(manager, 2, tensors)
        assert manager.newest() == 2, "in memory"
        if ranks.rank == 1:
            resource.prlimit(holder, resource.RLIMIT_FSIZE, limits)
        manager.save(4, tensors, {})
        manager.close()
        return text, events


@pytest.mark.parametrize("async_save", [False, True])
def test_a_node_that_cannot_write_is_named_on_every_rank(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    results = run_ranks(fail_on_node_1, tmp_path, async_save, world_size=2, nodes=2)
    for text, _ in results:
        assert "rank 1" in text
        assert os.strerror(errno.EFBIG) in text
    names = [(name, facts["step"]) for name, facts in results[0][1] if "checkpoint" in name]
    assert names == [("checkpoint_saved", 1), ("checkpoint_failed", 2), ("checkpoint_saved", 4)]


def go_on_after_a_failure(ranks: Ranks, root: Path) -> Events:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events)
        tensors = {"x": torch.zeros(1_000_000)}
        manager.prepare(tensors)
        holder = holder_pids(root)[0]
        limits = resource.prlimit(holder, resource.RLIMIT_FSIZE)
        resource.prlimit(holder, resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        manager.save(1, tensors, {})
        while not any(name == "checkpoint_failed" for name, _ in events):
            manager.before_update()
        resource.prlimit(holder, resource.RLIMIT_FSIZE, limits)
        manager.save(2, tensors, {})
        manager.wait()
        with pytest.raises(ValueError, match="meta: only what JSON holds"):
            manager.save(3, tensors, {"x": object()})
        manager.close()
        return events


def test_training_goes_on_when_a_background_save_fails(run_ranks: Run, tmp_path: Path) -> None:
    [events] = run_ranks(go_on_after_a_failure, tmp_path, world_size=1)
    assert [name for name, _ in events] == [
        "snapshot_opened",
        "checkpoint_failed",
        "checkpoint_saved",
    ]


def go_on_past_a_holder_that_stands_still(ranks: Ranks, root: Path) -> Events:
    line.STILL_S, start.START_S = 1.5, 0.5
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events)
        tensors = {"x": torch.zeros(1000)}
        manager.save(1, tensors, {})
        manager.wait()
        holder = holder_pids(root)[0]
        os.kill(holder, signal.SIGSTOP)
        failed_save(manager, 2, tensors)
        manager.save(3, tensors, {})
        manager.wait()
        assert holder_pids(root)[0] != holder
        manager.close()
        return events


def test_a_holder_that_stands_still_is_replaced(run_ranks: Run, tmp_path: Path) -> None:
    [events] = run_ranks(go_on_past_a_holder_that_stands_still, tmp_path, world_size=1)
    told = [(name, facts.get("step")) for name, facts in events if name != "snapshot_opened"]
    assert told == [
        ("checkpoint_saved", 1),
        ("snapshot_failed", 2),
        ("checkpoint_failed", 2),
        ("checkpoint_saved", 3),
    ]


def save_where_nothing_can_be(ranks: Ranks, root: Path) -> str:
    with process_group(ranks), pytest.raises(CheckpointError) as caught:
        manager_of(ranks, root).prepare({"x": torch.zeros(1)})
    return str(caught.value)


def test_unwritable_folder(run_ranks: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for text in run_ranks(save_where_nothing_can_be, tmp_path / "file" / "c", world_size=2):
        assert "rank 0: NotADirectoryError" in text
        assert str(tmp_path / "file") in text


def prepare_too_much(ranks: Ranks, root: Path) -> str:
    """400 GB a rank, of which no byte is ever taken."""
    with process_group(ranks), pytest.raises(CheckpointError) as caught:
        manager_of(ranks, root).prepare({f"x{ranks.rank}": torch.zeros(1).expand(10**11)})
    kill_holders(root)
    return str(caught.value)


def test_too_little_host_memory_is_told_before_training(run_ranks: Run, tmp_path: Path) -> None:
    for text in run_ranks(prepare_too_much, tmp_path, world_size=2, nodes=2):
        assert "checkpoint.every=0, save_last=true: 1490.12 GiB of host memory are needed" in text
        assert "for 2 nodes on this machine (2 generations of 372.53 GiB)" in text
        assert "GiB are free" in text


def memory_of_an_earlier_start(ranks: Ranks, root: Path) -> list[int]:
    """What the second of two set-ups counts on."""
    counted: list[int] = []
    epoch.check_host_memory = lambda nbytes, *, held, **_: counted.append(held)
    with process_group(ranks):
        manager = manager_of(ranks, root)
        manager.prepare({"x": torch.zeros(1_000_000)})
        manager.prepare({"x": torch.zeros(2_000_000)})
        manager.close()
    return counted


def test_only_memory_that_was_taken_is_counted_as_freed(run_ranks: Run, tmp_path: Path) -> None:
    [[none, held]] = run_ranks(memory_of_an_earlier_start, tmp_path, world_size=1)
    assert none == 0
    assert 4_000_000 <= held < 5_000_000  # of two generations, one was populated


def save_on_a_disk_of_its_own(ranks: Ranks, root: Path, async_save: bool) -> tuple[str, Events]:
    """The second node sees another folder under the name of the shared one."""
    with process_group(ranks):
        events: Events = []
        own = root if ranks.rank == 0 else root.with_name("other_node")
        manager = manager_of(ranks, own, events=events, async_save=async_save, keep=1)
        tensors = {f"x{ranks.rank}": torch.full((1000,), float(ranks.rank))}
        text = failed_save(manager, 2, tensors)
        manager.close()
        return text, events


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_nodes_do_not_share_is_named_on_every_rank(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    root = tmp_path / "c"
    (text, events), (other, none) = run_ranks(
        save_on_a_disk_of_its_own, root, async_save, world_size=2, nodes=2
    )
    assert other == text
    assert f"checkpoint.dir={root}: not shared by all nodes: node 1's file part-00001" in text
    assert [name for name, _ in events] == ["snapshot_opened", "checkpoint_failed"]
    assert none == []
