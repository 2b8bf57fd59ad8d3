"""kill -9 at any moment of a save leaves a state to resume from: in memory while the holder lives,
else in storage."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.checkpoint.format.folders import folder_name
from phalanx.checkpoint.snapshot import durable, snapshots
from phalanx.launch.ranks.start import RankFailed
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import (
    Events,
    Run,
    filled,
    kill_holders,
    manager_of,
    resume_and_save,
    step_names,
)


def die(*_args: Any, **_kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str) -> None:
    setattr(owner, name, die)


def after(owner: Any, name: str) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        die()

    setattr(owner, name, called)


MOMENTS: dict[str, tuple[Callable[[], None], int, int]] = {
    "before copying": (lambda: before(snapshots.Snapshots, "_copy"), 2, 2),
    "copied": (lambda: after(snapshots.Snapshots, "_copy"), 2, 2),
    "before the commit": (lambda: before(snapshots.Snapshots, "_commit"), 2, 2),
    "in memory": (lambda: after(snapshots.Snapshots, "_commit"), 3, 2),
    "before writing": (lambda: before(durable, "prepare_folder"), 3, 2),
    "after data": (lambda: before(durable, "new_manifest"), 3, 2),
    "before manifest": (lambda: before(durable, "write_manifest"), 3, 2),
    "before deleting": (lambda: before(durable, "prune"), 3, 3),
}
"""Moment of a save of step 3, to the steps that must be found in memory and in storage."""


def save_and_die(ranks: Ranks, root: Path, moment: str, who: int, async_save: bool) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2, async_save=async_save)
        for step in (1, 2, 3):
            if step == 3 and ranks.rank == who:
                MOMENTS[moment][0]()
            tensors = {
                f"{name}{ranks.rank}": torch.full((1000,), float(step)) for name in ("x", "y")
            }
            manager.save(step, tensors, {})
            manager.wait()
        manager.close()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("holders", ["live", "die"])
def test_kill_in_the_middle_of_a_save(
    run_ranks: Run, tmp_path: Path, moment: str, holders: str
) -> None:
    _, memory, storage = MOMENTS[moment]
    asynchronous = moment in ("before writing", "before manifest")
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_and_die, tmp_path / "c", moment, 0, asynchronous, world_size=2)
    assert caught.value.rank == 0
    assert "SIGKILL" in str(caught.value)
    if holders == "die":
        kill_holders(tmp_path / "c")
    expected = memory if holders == "live" else storage
    for step, value, events in run_ranks(resume_and_save, tmp_path / "c", 4, world_size=2):
        assert (step, value) == (expected, float(expected))
        assert {name for name, _ in events} <= {"snapshot_opened", "checkpoint_saved"}
    assert step_names(tmp_path / "c") == [folder_name(4)]


def test_kill_of_another_rank_leaves_the_one_before(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_and_die, tmp_path / "c", "copied", 1, True, world_size=2)
    assert caught.value.rank == 1
    for step, value, _ in run_ranks(resume_and_save, tmp_path / "c", 3, world_size=2):
        assert (step, value) == (2, 2.0)


def save_until_killed(ranks: Ranks, root: Path, delay_s: float) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2)
        tensors = {"x": torch.zeros(200_000)}
        resumed = manager.resume(lambda step, names, meta: tensors)
        start = (resumed.step if resumed else 0) + 1
        manager.prepare(tensors)
        timer = threading.Timer(delay_s, die)
        timer.daemon = True
        timer.start()
        for step in range(start, start + 10_000):
            manager.before_update()
            tensors["x"].fill_(step)
            manager.snapshot(step, lambda: tensors, {"step": step}, durable=step % 3 == 0)


def check_newest(ranks: Ranks, root: Path) -> tuple[int, bool, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events)
        tensors = {"x": torch.zeros(200_000)}
        resumed = manager.resume(lambda step, names, meta: tensors)
        if resumed is None:
            return 0, False, events
        assert resumed.meta == {"step": resumed.step}
        assert filled(tensors, resumed.step)
        return resumed.step, resumed.from_memory, events


def test_kill_at_any_time(run_ranks: Run, tmp_path: Path) -> None:
    before = 0
    found_in_memory = []
    for delay_s in (0.1, 0.13, 0.17, 0.22):
        with pytest.raises(RankFailed, match="SIGKILL"):
            run_ranks(save_until_killed, tmp_path / "c", delay_s, world_size=1)
        [(step, from_memory, events)] = run_ranks(check_newest, tmp_path / "c", world_size=1)
        assert events == []
        assert step >= before
        before = step
        found_in_memory.append(from_memory)
    assert before > 0
    assert any(found_in_memory)
    kill_holders(tmp_path / "c")
