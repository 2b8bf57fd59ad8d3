"""kill -9 at any moment of a save leaves a checkpoint to resume from."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.checkpoint import folders, manifest, write
from phalanx.checkpoint.folders import folder_name
from phalanx.launch.start import RankFailed
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpointing import Events, Run, manager_of, resume_and_save


def die(*_args: Any, **_kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            die()
        return function(*args, **kwargs)

    return called


def arm(moment: str) -> None:
    """Let this process die by SIGKILL at a moment of the next save."""
    if moment == "before data":
        write.write_chunks = die
    elif moment == "between two tensors":
        torch.save = die_at_call(2, torch.save)
    elif moment == "after data":
        write.new_manifest = die
    elif moment == "before manifest":
        write.write_manifest = die
    elif moment == "before the manifest's rename":
        manifest.fsync_folder = die
    elif moment == "before deleting":
        write.prune = die
    elif moment == "while deleting":
        folders.shutil.rmtree = die  # type: ignore[assignment]
    else:
        raise ValueError(moment)


MOMENTS = {
    "before data": 2,
    "between two tensors": 2,
    "after data": 2,
    "before manifest": 2,
    "before the manifest's rename": 2,
    "before deleting": 3,
    "while deleting": 3,
}
"""Moment of a save of step 3, to the step that must be chosen afterwards."""


def save_and_die(ranks: Ranks, root: Path, moment: str, who: int, async_save: bool) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2, async_save=async_save)
        for step in (1, 2, 3):
            if step == 3 and ranks.rank == who:
                arm(moment)
            tensors = {
                f"{name}{ranks.rank}": torch.full((1000,), float(step)) for name in ("x", "y")
            }
            manager.save(step, tensors, {})
            manager.wait()
        manager.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_in_the_middle_of_a_save(run_ranks: Run, tmp_path: Path, moment: str) -> None:
    expected = MOMENTS[moment]
    asynchronous = moment in ("before data", "before manifest")
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_and_die, tmp_path / "c", moment, 0, asynchronous, world_size=2)
    assert caught.value.rank == 0
    assert "SIGKILL" in str(caught.value)
    for step, value, events in run_ranks(resume_and_save, tmp_path / "c", 3, world_size=2):
        assert (step, value) == (expected, float(expected))
        assert all(name == "checkpoint_saved" for name, _ in events)
    assert [path.name for path in (tmp_path / "c").iterdir()] == [folder_name(3)]


def test_kill_of_another_rank_leaves_the_one_before(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_and_die, tmp_path / "c", "between two tensors", 1, True, world_size=2)
    assert caught.value.rank == 1
    for step, value, _ in run_ranks(resume_and_save, tmp_path / "c", 3, world_size=2):
        assert (step, value) == (2, 2.0)


def save_until_killed(ranks: Ranks, root: Path, delay_s: float) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2)
        start = (manager.newest() or 0) + 1
        timer = threading.Timer(delay_s, die)
        timer.daemon = True
        timer.start()
        for step in range(start, start + 10_000):
            manager.save(step, {"x": torch.full((200_000,), float(step))}, {"step": step})


def check_newest(ranks: Ranks, root: Path) -> tuple[int | None, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events)
        step = manager.newest()
        if step is not None:
            tensors = {"x": torch.zeros(200_000)}
            assert manager.load(step, tensors) == {"step": step}
            assert bool((tensors["x"] == step).all())
        manager.close()
        return step, events


def test_kill_at_any_time(run_ranks: Run, tmp_path: Path) -> None:
    before = 0
    for delay_s in (0.1, 0.13, 0.17, 0.22):
        with pytest.raises(RankFailed, match="SIGKILL"):
            run_ranks(save_until_killed, tmp_path / "c", delay_s, world_size=1)
        [(step, events)] = run_ranks(check_newest, tmp_path / "c", world_size=1)
        assert events == []
        assert (step or 0) >= before
        before = step or 0
    assert before > 0
