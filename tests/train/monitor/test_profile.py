"""The profiler traces the window of steps that was asked for."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config, MonitorConfig, ProfileConfig, TrainingConfig
from phalanx.train.monitor.profile import ProfileWindow


def run(folder: Path, config: ProfileConfig, *, steps: range, rank: int = 0) -> list[str]:
    """Run a loop whose step multiplies matrices, and name the traces written."""
    ranks = Ranks(rank=rank, world_size=2)
    with ProfileWindow(config, folder, ranks=ranks, first_step=steps.start) as window:
        for _ in steps:
            torch.ones(4, 4) @ torch.ones(4, 4)
            window.step()
    return sorted(path.name for path in folder.glob("profile/*"))


def num_matmuls(path: Path) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == "aten::matmul" for event in events)


@pytest.mark.parametrize(
    ("steps", "first", "traced"),
    [
        (range(6), 2, 3),
        (range(3, 6), 3, 2),  # resumed inside the window
        (range(3), 2, 1),  # ended inside it
    ],
)
def test_traces_the_window(tmp_path: Path, steps: range, first: int, traced: int) -> None:
    names = run(tmp_path, ProfileConfig(start=2, steps=3), steps=steps)
    assert names == [f"step_{first:04d}.json"]
    assert num_matmuls(tmp_path / "profile" / names[0]) == traced


def test_nothing_unasked_on_other_ranks_and_past_the_window(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path, ProfileConfig(start=0, steps=0), steps=range(3)) == []
        assert run(tmp_path, ProfileConfig(start=0, steps=2), steps=range(3), rank=1) == []
        assert run(tmp_path, ProfileConfig(start=0, steps=2), steps=range(5, 7)) == []


def test_a_run_that_stops_before_the_window_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"monitor\.profile\.start=9: nothing traced"):
        run(tmp_path, ProfileConfig(start=9, steps=1), steps=range(3))


def test_a_window_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"monitor\.profile\.start=5"):
        Config(
            training=TrainingConfig(steps=5),
            monitor=MonitorConfig(profile=ProfileConfig(start=5, steps=1)),
        )
