"""A run that was interrupted goes on as if it had not been: the same losses, bit for bit."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoint.config import CheckpointConfig, SnapshotConfig
from phalanx.checkpoint.format.folders import folder_name
from phalanx.launch.ranks.failure import RankFailed
from phalanx.launch.ranks.start import launch
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import (
    Config,
    Device,
    LaunchConfig,
    MonitorConfig,
    RunConfig,
    TrainingConfig,
)
from phalanx.train.data.config import DataConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.optim.config import LrConfig, OptimConfig
from tests.checkpoint.ranks import LINGER_S, kill_holders

pytestmark = pytest.mark.storage

STEPS = 28
"""A run resumed from its checkpoint of step 6 still has more than 20 to compare."""
Metrics = list[tuple[int, float, float]]
Whole = Callable[[dict[str, int]], Metrics]
LAYOUTS = [
    {"dp_shard": 4},
    {"tp": 2, "dp_shard": 2},
    {"pp": 2, "dp_shard": 2},
]


def config_for(data: DataConfig, run_dir: Path, layout: dict[str, int], **changes: Any) -> Config:
    """A small run of STEPS steps with a checkpoint every 6, of few and large microbatches."""
    parallel = ParallelConfig(**{"dp_shard": 1, **layout})
    config = Config(
        run=RunConfig(dir=str(run_dir)),
        model=ModelConfig(
            vocab_size=300,
            dim=36,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=10,
            ffn_dim=52,
        ),
        data=data,
        parallel=parallel,
        training=TrainingConfig(
            steps=STEPS,
            seq_len=32,
            global_batch_size=16,
            microbatch_size=min(8, 16 // (parallel.dp_shard * parallel.pp)),
            eval_batches=1,
        ),
        optim=OptimConfig(lr=LrConfig(warmup_steps=4, peak=3e-3)),
        checkpoint=CheckpointConfig(
            dir=str(run_dir / "checkpoints"),
            every=6,
            keep=2,
            snapshot=SnapshotConfig(linger_s=LINGER_S),
        ),
        launch=LaunchConfig(device=Device.cpu, threads_per_rank=1, timeout_s=60),
        monitor=MonitorConfig(tensorboard=False, progress=False),
    )
    return replace(config, **changes)


def train_rank(ranks: Ranks, config: Config, kill_at: int | None = None) -> dict[str, Any]:
    """The trainer, on a rank that may kill itself when it begins a step."""
    from phalanx.train import trainer

    if kill_at is not None and ranks.rank == ranks.world_size - 1:
        step_as_before = trainer.Trainer.step

        def step(self: Any, number: int, *args: Any) -> Any:
            if number == kill_at:
                every = config.checkpoint.every
                saved = folder_name(kill_at // every * every)
                while (
                    kill_at >= every
                    and not (Path(config.checkpoint.dir) / saved / "manifest.json").exists()
                ):
                    time.sleep(0.002)
                os.kill(os.getpid(), signal.SIGKILL)
            return step_as_before(self, number, *args)

        trainer.Trainer.step = step  # type: ignore[method-assign]
    return trainer.train(ranks, config)


def train(config: Config, *, kill_at: int | None = None) -> dict[str, Any]:
    """Run to the end, or to the kill."""
    size = config.parallel.fixed_degree * config.parallel.dp_shard
    return launch(train_rank, config, kill_at, world_size=size, config=config.launch)[0]


def metrics(config: Config) -> Metrics:
    """(step, loss, norm) of every line of metrics.jsonl."""
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"], m["grad_norm"]) for m in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(demo_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`whole(layout)`: what a run in it logs that nothing interrupts; each is run once."""
    known: dict[str, Metrics] = {}

    def logged(layout: dict[str, int]) -> Metrics:
        if str(layout) not in known:
            config = config_for(demo_data, tmp_path_factory.mktemp("whole"), layout)
            train(config)
            known[str(layout)] = metrics(config)
        return known[str(layout)]

    return logged


@pytest.mark.parametrize("layout", LAYOUTS, ids=["dp", "tp-dp", "pp-dp"])
def test_resumes_twice_bit_for_bit(
    demo_data: DataConfig, tmp_path: Path, whole: Whole, layout: dict[str, int]
) -> None:
    broken = config_for(demo_data, tmp_path / "broken", layout)
    for kill_at, source in ((9, "storage"), (16, "memory")):
        with pytest.raises(RankFailed, match="SIGKILL"):
            train(broken, kill_at=kill_at)
        if source == "storage":
            kill_holders(Path(broken.checkpoint.dir))
    assert train(broken)["steps"] == STEPS
    assert metrics(broken) == whole(layout)
    assert [step for step, _, _ in whole(layout)] == list(range(STEPS))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(LAYOUTS[0], id="dp", marks=pytest.mark.slow),
        pytest.param(LAYOUTS[1], id="tp-dp", marks=pytest.mark.slow),
        pytest.param(LAYOUTS[2], id="pp-dp"),
    ],
)
def test_sigterm_saves_and_the_next_run_goes_on(
    demo_data: DataConfig, tmp_path: Path, whole: Whole, layout: dict[str, int]
) -> None:
    stopped = config_for(demo_data, tmp_path / "stopped", layout)
    path = tmp_path / "stopped" / "metrics.jsonl"

    def ask_to_stop() -> None:
        while not path.exists() or len(path.read_text().splitlines()) < 3:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    result = train(stopped)
    thread.join()
    assert result["stopped"] == "SIGTERM"
    assert 3 <= result["steps"] < STEPS
    assert train(stopped)["stopped"] is None
    assert metrics(stopped) == whole(layout)


def test_goes_on_in_another_layout(demo_data: DataConfig, tmp_path: Path, whole: Whole) -> None:
    moved = config_for(demo_data, tmp_path / "moved", {"dp_shard": 2})
    with pytest.raises(RankFailed):
        train(moved, kill_at=9)
    train(config_for(demo_data, tmp_path / "moved", {"pp": 2, "tp": 2}))
    for (step, loss, norm), (same, other, other_norm) in zip(
        whole({"dp_shard": 2}), metrics(moved), strict=True
    ):
        # fp32 sums in another order: rounding of 1e-7 that 22 optimizer steps amplify.
        assert step == same
        assert loss == pytest.approx(other, rel=1e-4)
        assert norm == pytest.approx(other_norm, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "training.seed=2: the checkpoint was made with 1"),
        ({"global_batch_size": 8}, "training.global_batch_size=8: the checkpoint was made with 16"),
        ({"seq_len": 16}, "training.seq_len=16: the checkpoint was made with 32"),
    ],
)
def test_refuses_to_go_on_with_other_samples(
    demo_data: DataConfig, tmp_path: Path, changes: dict[str, int], named: str
) -> None:
    config = config_for(demo_data, tmp_path / "run", {"dp_shard": 1})
    train(replace(config, training=replace(config.training, steps=2)))
    with pytest.raises(RankFailed, match=named):
        train(replace(config, training=replace(config.training, **changes)))


def test_a_longer_run_tells_what_changed(demo_data: DataConfig, tmp_path: Path) -> None:
    config = config_for(demo_data, tmp_path / "run", {"dp_shard": 1})
    train(replace(config, training=replace(config.training, steps=2)))
    assert train(replace(config, training=replace(config.training, steps=4)))["steps"] == 4
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    resumed = [e for e in map(json.loads, events) if e["event"] == "resumed"]
    assert resumed[0]["step"] == 2
    assert resumed[0]["changed"] == ["training.steps: 2 -> 4"]


def test_a_kill_between_save_and_log_loses_no_line(demo_data: DataConfig, tmp_path: Path) -> None:
    config = config_for(demo_data, tmp_path / "run", {"dp_shard": 2})
    with pytest.raises(RankFailed, match="SIGKILL"):
        launch(train_killed_after_save, config, world_size=2, config=config.launch)
    assert train(config)["steps"] == STEPS
    assert [step for step, _, _ in metrics(config)] == list(range(STEPS))


def train_killed_after_save(ranks: Ranks, config: Config) -> None:
    """The trainer, with rank 0 killed as soon as a checkpoint is complete."""
    from phalanx.train import trainer

    save = trainer.Trainer._save

    def save_and_die(self: Any, done: int, **kwargs: Any) -> None:
        save(self, done, **kwargs)
        self.checkpoints.wait()
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.Trainer._save = save_and_die  # type: ignore[method-assign]
    trainer.train(ranks, config)


def test_an_evaluation_that_a_stop_prevented_is_made_up(
    demo_data: DataConfig, tmp_path: Path
) -> None:
    config = config_for(demo_data, tmp_path / "run", {"dp_shard": 2})
    config = replace(config, training=replace(config.training, steps=6, eval_every=2))
    launch(train_stopped_at, config, 3, world_size=2, config=config.launch)
    path = tmp_path / "run" / "eval.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    train(config)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 5]


def test_a_stop_in_the_last_step_is_the_end(demo_data: DataConfig, tmp_path: Path) -> None:
    config = config_for(demo_data, tmp_path / "run", {"dp_shard": 1})
    config = replace(config, training=replace(config.training, steps=4))
    result = launch(train_stopped_at, config, 3, world_size=1, config=config.launch)[0]
    assert result["stopped"] is None
    lines = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]


def train_stopped_at(ranks: Ranks, config: Config, step: int) -> dict[str, Any]:
    """The trainer, with every rank asked to stop when it begins a step."""
    from phalanx.train import trainer

    step_as_before = trainer.Trainer.step

    def step_and_stop(self: Any, number: int, batch: Any, stop: Any) -> Any:
        if number == step:
            stop.request("test")
        return step_as_before(self, number, batch, stop)

    trainer.Trainer.step = step_and_stop  # type: ignore[method-assign]
    return trainer.train(ranks, config)


def test_a_run_of_which_nothing_is_left_begins_anew_and_says_so(
    demo_data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_for(demo_data, tmp_path / "run", {"dp_shard": 1})
    config = replace(
        config,
        training=replace(config.training, steps=2),
        checkpoint=replace(config.checkpoint, save_last=False),
    )
    train(config)
    assert "beginning anew" not in capfd.readouterr().out
    train(config)
    said = f"phalanx: nothing is left of the run that was in {config.run.dir}, in memory or in "
    assert said in capfd.readouterr().out
    assert [step for step, _, _ in metrics(config)] == [0, 1]
    assert '"begun_anew"' in (Path(config.run.dir) / "events.jsonl").read_text()
