"""Pipelines measured in a run's first steps: one plan on every rank, and the same losses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phalanx.checkpoint.config import CheckpointConfig
from phalanx.fault.events import read_lines
from phalanx.launch.ranks.start import launch
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
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

pytestmark = pytest.mark.pipeline

CURVES = ("step_s_measured", "step_s_predicted", "bubble_measured", "bubble_predicted")


def config_for(data: DataConfig, run_dir: Path, *, steps: int = 6, **pipeline: Any) -> Config:
    """Two ranks, 6 microbatches a step, two steps measured."""
    return Config(
        run=RunConfig(dir=str(run_dir)),
        model=ModelConfig(vocab_size=300, dim=32, num_layers=5, num_heads=4, ffn_dim=52),
        data=data,
        parallel=ParallelConfig(pp=2, dp_shard=1),
        pipeline=PipelineConfig(**{"profile_steps": 2, **pipeline}),
        training=TrainingConfig(steps=steps, seq_len=32, global_batch_size=6, eval_batches=0),
        checkpoint=CheckpointConfig(dir=str(run_dir / "checkpoints"), every=2),
        launch=LaunchConfig(device=Device.cpu, threads_per_rank=1, timeout_s=60),
        monitor=MonitorConfig(progress=False),
    )


def train_rank(ranks: Ranks, config: Config) -> dict[str, Any]:
    """The trainer, telling what each rank planned."""
    from phalanx.train import trainer

    seen: dict[str, Any] = {}
    plan = trainer.PipelineWatch._plan

    def watched(self: Any, step: int) -> Any:
        result = plan(self, step)
        seen.update(step=step, found=self._found)
        return result

    trainer.PipelineWatch._plan = watched  # type: ignore[method-assign]
    return trainer.train(ranks, config) | seen


def train(config: Config) -> list[dict[str, Any]]:
    return launch(train_rank, config, world_size=2, config=config.launch)


def lines_of(config: Config) -> list[dict[str, Any]]:
    return list(read_lines(Path(config.run.dir) / "metrics.jsonl"))


def losses(config: Config) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines_of(config)]


def test_auto_plans_again_alike_on_every_rank_and_computes_what_1f1b_does(
    demo_data: DataConfig, tmp_path: Path
) -> None:
    plain = config_for(demo_data, tmp_path / "1f1b", schedule="1f1b")
    train(plain)
    auto = config_for(demo_data, tmp_path / "auto", schedule="auto", stages_per_rank=1)
    first, second = train(auto)

    assert first["step"] == 2, "one step to warm up, two measured"
    assert first["found"] == second["found"]
    found = first["found"]
    assert found.memory_is_measured
    assert all(seconds > 0 for seconds in found.costs.f + found.costs.b + found.costs.w)
    assert found.costs.hop > 0
    assert all(size > 0 for size in found.memory.f)
    assert all(size < 0 for size in found.memory.w)
    assert 0 < found.work_s <= found.predicted_s <= found.before_s

    assert len(losses(auto)) == 6
    assert losses(auto) == losses(plain)
    [event] = [e for e in read_lines(tmp_path / "auto/events.jsonl") if "pipeline" in e["event"]]
    assert event["event"] == "pipeline_replanned"
    assert event["predicted_s"] == found.predicted_s
    [event] = [e for e in read_lines(tmp_path / "1f1b/events.jsonl") if "pipeline" in e["event"]]
    assert event["event"] == "pipeline_profiled"

    for config in (plain, auto):
        check_curves(config, first_step=3)
        # An activation one way or a gradient the other, but not what was sent to measure a hop.
        training = config.training
        activations = training.global_batch_size * training.seq_len * config.model.dim * 4
        assert {line["comm_pipeline_inside_bytes"] for line in lines_of(config)} == {activations}
        trace = json.loads((Path(config.run.dir) / "pipeline_timeline.json").read_text())
        assert len([e for e in trace["traceEvents"] if e["ph"] == "X"]) >= 2 * 6 * 2


def check_curves(config: Config, *, first_step: int) -> None:
    """Predicted and measured from `first_step` on, in both logs, and the timeline."""
    board = EventAccumulator(str(Path(config.run.dir) / "tensorboard"))
    board.Reload()
    for line in lines_of(config):
        assert [f"pipeline_{name}" in line for name in CURVES] == [line["step"] >= first_step] * 4
    for name in CURVES:
        points = {point.step: point.value for point in board.Scalars(f"pipeline/{name}")}
        logged = {
            line["step"]: line[f"pipeline_{name}"]
            for line in lines_of(config)
            if line["step"] >= first_step
        }
        assert points == pytest.approx(logged)
        assert min(logged) == first_step
    assert board.Images("pipeline/timeline")


@pytest.mark.slow
def test_a_v_of_stages_and_a_resumed_run(demo_data: DataConfig, tmp_path: Path) -> None:
    """The resumed run measures and plans once more; no loss tells it from 1F1B in one go."""
    plain = config_for(demo_data, tmp_path / "1f1b", steps=8)
    train(plain)
    short = config_for(demo_data, tmp_path / "run", steps=4, schedule="auto", stages_per_rank=2)
    train(short)
    resumed = replace(short, training=replace(short.training, steps=8))
    first, second = train(resumed)
    assert first["step"] == 6
    assert first["found"] == second["found"]
    assert losses(resumed) == losses(plain)
    events = [e["event"] for e in read_lines(tmp_path / "run/events.jsonl")]
    assert events.count("pipeline_replanned") == 2


@pytest.mark.slow
def test_post_validation_is_settled_before_ranks_plan(
    demo_data: DataConfig, tmp_path: Path
) -> None:
    config = config_for(demo_data, tmp_path / "run", schedule="auto", post_validation=True)
    first, second = train(config)
    assert first["found"] == second["found"]
    assert len(losses(config)) == 6
    check_curves(config, first_step=3)


def test_nothing_is_measured_where_nothing_is_asked_for(
    demo_data: DataConfig, tmp_path: Path
) -> None:
    config = config_for(demo_data, tmp_path / "run", steps=2, schedule="auto", profile_steps=0)
    assert all("found" not in rank for rank in train(config))
    assert not any(key.startswith("pipeline") for line in lines_of(config) for key in line)


def test_recorded_memory_is_what_the_stages_hold(
    run_ranks: Callable[..., list[Any]],
) -> None:
    """At least what the model's shape says, which knows of no masks and QK-norms; in fp64 twice."""
    for rank in run_ranks(recorded_bytes, world_size=2):
        for (fp32, expected), (fp64, _) in rank.values():
            assert 1.0 < fp32.held / expected[0] < 2.5
            assert 1.0 < fp32.put_off / expected[1] < 1.5
            assert fp64.held == pytest.approx(2 * fp32.held, rel=0.2)
            assert fp64.put_off == pytest.approx(2 * fp32.put_off, rel=0.2)


def recorded_bytes(ranks: Ranks) -> dict[int, Any]:
    """By stage: what was measured, and the estimate of it, in fp32 and in fp64."""
    from phalanx.parallel.pipeline.profile import OpRecorder, stage_profiles
    from phalanx.parallel.ranks import process_group
    from phalanx.train.config import PrecisionConfig
    from phalanx.train.plan.costs import estimated_memory
    from phalanx.train.plan.pipeline import plan_pipeline
    from tests.small_run import FP64, make_config, make_engine, rank_batch

    found: dict[int, list[Any]] = {}
    with process_group(ranks):
        for precision in (PrecisionConfig(), FP64):
            config = make_config(pp=2, dp_shard=1, schedule="zb_h1", precision=precision)
            config = replace(config, training=replace(config.training, seq_len=256))
            estimate = estimated_memory(config, plan_pipeline(config, 8).cuts)
            engine = make_engine(ranks, config)
            executor: Any = engine.model.executor
            recorder = executor.recorder = OpRecorder(ranks.device)
            for _ in range(2):
                engine.gradients(rank_batch(engine))
                recorder.end_step()
            size = executor.boundary.numel() * executor.boundary.element_size()
            for stage, profile in stage_profiles(recorder, boundary_bytes=size).items():
                expected = (estimate.f[stage], -estimate.w[stage])
                found.setdefault(stage, []).append((profile, expected))
    return found
