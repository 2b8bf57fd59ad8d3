"""Fixtures that tests of several parts share."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.launch.ranks.start import launch
from phalanx.train.config import Device, LaunchConfig
from phalanx.train.data.config import DataConfig, TextSource

WORDS = (
    "the a of and to in is that it was for on as with his they at be this from I have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find"
).split()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A prepared corpus of 400 made-up documents of uneven length and its 300-token tokenizer."""
    from phalanx.train.data.prepare import prepare

    folder = tmp_path_factory.mktemp("demo_data")
    (folder / "text.txt").write_text("\n\n\n".join(_documents(count=400)))
    config = DataConfig(
        dir=str(folder / "prepared"),
        source=TextSource.files,
        text=[str(folder / "text.txt")],
        vocab_size=300,
        eval_fraction=0.1,
    )
    prepare(config)
    return config


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`run_ranks(fn, *args, world_size=4, nodes=1)`: each rank's result of fn(ranks, *args), on the
    CPU, as on so many nodes."""

    def run(fn: Callable[..., Any], *args: Any, world_size: int = 4, nodes: int = 1) -> list[Any]:
        config = LaunchConfig(
            nodes=nodes,
            ranks_per_node=world_size // nodes,
            emulate_nodes=True,
            device=Device.cpu,
            threads_per_rank=1,
            timeout_s=60.0,
        )
        return launch(fn, *args, world_size=world_size, config=config, log_dir=tmp_path / "logs")

    return run


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where a run saves; its holders end with the test."""
    from tests.checkpoint.ranks import holder_pids
    from tests.killed_run import end_all

    folder = tmp_path / "checkpoints"
    yield folder
    if folder.exists():
        end_all(holder_pids(folder).values())


def _documents(*, count: int) -> list[str]:
    """Sentences of common words; the same on every machine."""
    rng = random.Random(0)
    return [
        " ".join(
            " ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "."
            for _ in range(rng.randint(1, 25))
        )
        for _ in range(count)
    ]
