"""Whole runs under post-validation: every step logged once, around saves, evaluations, stops."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phalanx.launch.ranks.failure import RankFailed
from phalanx.launch.ranks.start import launch
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config, Precision, PrecisionConfig, VerifyConfig
from phalanx.train.data.config import DataConfig
from phalanx.train.optim.config import OptimConfig
from phalanx.train.verify import verify
from tests.train.resume.test_resume_ranks import config_for, metrics, train, train_stopped_at

STEPS = 9
FP64 = PrecisionConfig(params=Precision.fp64, compute=Precision.fp64, reduce=Precision.fp64)


def run_config(data: DataConfig, run_dir: Path, *, post: bool, **layout: int) -> Config:
    """STEPS steps that clip, with a checkpoint every 4 and an evaluation every 3."""
    config = config_for(data, run_dir, {"pp": 2, **layout}, precision=FP64)
    return replace(
        config,
        pipeline=PipelineConfig(schedule="zb_h1", post_validation=post, profile_steps=0),
        training=replace(config.training, steps=STEPS, microbatch_size=4, eval_every=3),
        checkpoint=replace(config.checkpoint, every=4),
        optim=replace(config.optim, max_grad_norm=0.9),
    )


@pytest.fixture(scope="module")
def whole(demo_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that nothing interrupted."""
    config = run_config(demo_data, tmp_path_factory.mktemp("whole"), post=True)
    train(config)
    return config


def lines(config: Config, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


def events(config: Config, name: str) -> list[dict[str, Any]]:
    return [event for event in lines(config, "events.jsonl") if event["event"] == name]


def test_logs_what_a_run_with_a_barrier_logs(demo_data: DataConfig, tmp_path: Path) -> None:
    barrier = run_config(demo_data, tmp_path / "barrier", post=False)
    post = run_config(demo_data, tmp_path / "post", post=True)
    results = [train(config) for config in (barrier, post)]
    assert [step for step, _, _ in metrics(post)] == list(range(STEPS))
    norms = [norm for _, _, norm in metrics(barrier)]
    assert min(norms) < barrier.optim.max_grad_norm < max(norms), "some steps clip"
    for found, expected in zip(metrics(post), metrics(barrier), strict=True):
        assert found == pytest.approx(expected, rel=1e-11)
    assert [result["stopped"] for result in results] == [None, None]
    assert results[1]["loss"] == metrics(post)[-1][1]
    assert [line["step"] for line in lines(post, "eval.jsonl")] == [2, 5, 8]
    for found, expected in zip(
        lines(post, "eval.jsonl"), lines(barrier, "eval.jsonl"), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-11)
    for found, expected in zip(lines(post), lines(barrier), strict=True):
        assert found["lr"] == expected["lr"]
        assert found["seconds"] > 0


def test_resumes_bit_for_bit(demo_data: DataConfig, tmp_path: Path, whole: Config) -> None:
    broken = run_config(demo_data, tmp_path / "broken", post=True)
    with pytest.raises(RankFailed, match="SIGKILL"):
        train(broken, kill_at=6)
    assert [step for step, _, _ in metrics(broken)] in ([*range(5)], [*range(6)])
    assert train(broken)["steps"] == STEPS
    assert metrics(broken) == metrics(whole)
    assert lines(broken, "eval.jsonl") == lines(whole, "eval.jsonl")


def test_a_stop_comes_one_step_later(demo_data: DataConfig, tmp_path: Path, whole: Config) -> None:
    stopped = run_config(demo_data, tmp_path / "stopped", post=True)
    result = launch(train_stopped_at, stopped, 4, world_size=2, config=stopped.launch)
    assert [(each["steps"], each["stopped"]) for each in result] == [(6, "test")] * 2
    assert metrics(stopped) == metrics(whole)[:6]
    assert result[0]["loss"] == metrics(whole)[5][1]
    assert train(stopped)["stopped"] is None
    assert metrics(stopped) == metrics(whole)


def train_spoiled(ranks: Ranks, config: Config, step: int) -> None:
    """The trainer, with an infinite gradient on the last rank in one step."""
    from phalanx.train import trainer
    from phalanx.train.engine.step import Engine
    from tests.train.engine.test_nonfinite_ranks import poison_last_row

    gradients = Engine.gradients
    calls = 0

    def spoil(self: Engine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        executor, number = self.model.executor, calls
        calls += 1
        backward = executor.backward

        def and_spoil(*inputs: Any) -> Any:
            loss = backward(*inputs)
            if number == step and ranks.rank == ranks.world_size - 1:
                grad = next(p.grad for p in self.model.parameters.values() if p.dim() == 2)
                assert grad is not None
                poison_last_row(grad, float("inf"))
            return loss

        executor.backward = and_spoil  # type: ignore[method-assign]
        try:
            return gradients(self, *args, **kwargs)
        finally:
            executor.backward = backward  # type: ignore[method-assign]

    Engine.gradients = spoil  # type: ignore[method-assign]
    trainer.train(ranks, config)


@pytest.mark.parametrize("bad", [1, 3], ids=["found in the next step", "found before a save"])
def test_the_error_names_the_step(demo_data: DataConfig, tmp_path: Path, bad: int) -> None:
    config = run_config(demo_data, tmp_path / "run", post=True)
    with pytest.raises(RankFailed, match=f"step {bad}: loss=.* gradients not finite in: "):
        launch(train_spoiled, config, bad, world_size=2, config=config.launch)
    assert [line["step"] for line in lines(config)] == list(range(bad))
    assert [event["step"] for event in events(config, "not_finite")] == [bad]


@pytest.mark.parametrize("resume_in", [{}, {"pp": 2}], ids=["one process", "pipeline"])
def test_verify_settles(demo_data: DataConfig, tmp_path: Path, resume_in: dict[str, int]) -> None:
    config = run_config(demo_data, tmp_path / "run", post=True)
    config = replace(
        config,
        optim=replace(config.optim, max_grad_norm=0.6),
        verify=VerifyConfig(steps=4, dtype=Precision.fp64, resume_in=resume_in),
    )
    report = verify(config, launch, world_size=2)
    assert report.passed, (report.findings, report.worst)


def test_a_pipeline_is_needed() -> None:
    with pytest.raises(ValueError, match=r"pipeline.post_validation=true: parallel.pp=1 has no"):
        Config(pipeline=PipelineConfig(post_validation=True))
    with pytest.raises(ValueError, match=r"optim.beta1=0: with pipeline.post_validation"):
        Config(
            parallel=ParallelConfig(pp=2),
            pipeline=PipelineConfig(post_validation=True),
            optim=OptimConfig(beta1=0.0),
        )
