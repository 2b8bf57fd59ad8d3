"""The pipeline that a run begins with, and what is refused before its ranks start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from phalanx.launch.config.compose import compose
from phalanx.parallel.config import ActivationCheckpoint, ParallelConfig
from phalanx.parallel.pipeline.config import NAMES, PipelineConfig
from phalanx.parallel.pipeline.files import save_schedule
from phalanx.parallel.pipeline.graph import loop_placement, v_placement
from phalanx.parallel.pipeline.schedules.registry import make_schedule, placement_of
from phalanx.parallel.pipeline.validate import validate
from phalanx.train.config import Config, TrainingConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.flops import flops_per_token
from phalanx.train.plan.costs import estimated_costs, estimated_memory, layer_and_head
from phalanx.train.plan.cuts import stage_cuts
from phalanx.train.plan.limits import memory_of_1f1b
from phalanx.train.plan.pipeline import auto_placements, check_pipeline, plan_pipeline

MODEL = ModelConfig(vocab_size=2560, dim=64, num_layers=9, num_heads=4, ffn_dim=172)
"""The head costs as much as several layers."""


def config_for(
    schedule: str, *, pp: int = 3, checkpointing: str = "none", **pipeline: object
) -> Config:
    return Config(
        model=MODEL,
        training=TrainingConfig(seq_len=64, global_batch_size=8),
        parallel=ParallelConfig(
            pp=pp, dp_shard=1, activation_checkpoint=ActivationCheckpoint(checkpointing)
        ),
        pipeline=PipelineConfig(schedule=schedule, **pipeline),  # type: ignore[arg-type]
    )


def refusal(config: Config, num_microbatches: int = 8) -> str:
    """What `check_pipeline` says; planning says the same."""
    with pytest.raises(ValueError, match="pipeline.") as checked:
        check_pipeline(config, num_microbatches)
    with pytest.raises(ValueError, match="pipeline.") as planned:
        plan_pipeline(config, num_microbatches)
    assert str(checked.value) == str(planned.value)
    return str(checked.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_gets_layers_and_an_order(name: str) -> None:
    config = config_for(name)
    check_pipeline(config, 8)
    plan = plan_pipeline(config, 8)
    validate(plan.schedule)
    assert plan.schedule.name == name
    assert plan.schedule.num_ranks == 3
    assert plan.schedule.num_microbatches == 8
    assert [layer for cut in plan.cuts for layer in cut] == list(range(9))
    assert len(plan.cuts) == plan.schedule.num_stages
    if name != "auto":
        assert plan.schedule.placement == placement_of(name, 3)


def test_the_head_counts_as_layers() -> None:
    layer, head = layer_and_head(config_for("1f1b"))
    assert 3 * layer < head < 4 * layer
    cuts = stage_cuts(config_for("1f1b"), loop_placement(3))
    assert [len(cut) for cut in cuts] == [4, 4, 1]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v", "interleaved"])
def test_estimated_costs_are_the_models_flops(schedule: str) -> None:
    config = config_for(schedule)
    costs = estimated_costs(config, plan_pipeline(config, 8).cuts)
    total = sum(costs.f + costs.b + costs.w)
    assert total == pytest.approx(64 * flops_per_token(MODEL, 64))


def test_recomputing_costs_time_and_saves_memory() -> None:
    found = {}
    for mode in ("none", "selective", "full"):
        config = config_for("zb_h1", checkpointing=mode)
        cuts = stage_cuts(config, loop_placement(3))
        costs, memory = estimated_costs(config, cuts), estimated_memory(config, cuts)
        found[mode] = (sum(costs.b), -sum(memory.f))
        for kinds in zip(memory.f, memory.b, memory.w, strict=True):
            assert sum(kinds) == pytest.approx(0)
    assert found["none"] < found["selective"] < found["full"]
    full = estimated_costs(config_for("zb_h1", checkpointing="full"), [range(0, 5), range(5, 9)])
    plain = estimated_costs(config_for("zb_h1"), [range(0, 5), range(5, 9)])
    assert full.b[0] == pytest.approx(plain.b[0] + plain.f[0])


def test_layers_set_by_hand() -> None:
    config = config_for("1f1b", layers_per_stage=[2, 3, 4])
    assert plan_pipeline(config, 8).cuts == [range(0, 2), range(2, 5), range(5, 9)]
    config = config_for("auto", layers_per_stage=[1, 2, 2, 2, 1, 1])
    plan = plan_pipeline(config, 8)
    assert plan.schedule.placement == v_placement(3)
    assert [len(cut) for cut in plan.cuts] == [1, 2, 2, 2, 1, 1]


def test_placements_that_auto_chooses_from() -> None:
    both = [loop_placement(3), v_placement(3)]
    assert auto_placements(config_for("auto")) == both
    assert auto_placements(config_for("auto", stages_per_rank=1)) == both[:1]
    assert auto_placements(config_for("auto", stages_per_rank=2)) == both[1:]
    assert auto_placements(config_for("auto", pp=5)) == [loop_placement(5)]


def test_auto_holds_what_1f1b_would_by_default() -> None:
    for stages_per_rank in (1, 2):
        config = config_for("auto", stages_per_rank=stages_per_rank)
        plan = plan_pipeline(config, 8)
        held = estimated_memory(config, plan.cuts).peak(plan.schedule)
        cuts = stage_cuts(config, loop_placement(3))
        assert held <= memory_of_1f1b(3, 8, estimated_memory(config, cuts)) * (1 + 1e-9)


def test_auto_keeps_to_its_limit_or_says_the_least_that_would_do() -> None:
    message = refusal(config_for("auto", memory_limit="1000"))
    assert message.startswith("pipeline.memory_limit=1000: ")
    assert "by estimate" in message
    least = int(message.split("the least that would do is ")[1].split()[0])
    enough = config_for("auto", memory_limit=str(least + 1))
    check_pipeline(enough, 8)
    plan = plan_pipeline(enough, 8)
    assert estimated_memory(enough, plan.cuts).peak(plan.schedule) <= least + 1
    assert str(least) in refusal(config_for("auto", memory_limit=str(least - 1)))


def test_a_schedule_file(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    schedule = make_schedule("zb_v", num_ranks=3, num_microbatches=8)
    save_schedule(schedule, path)
    config = config_for(str(path))
    check_pipeline(config, 8)
    plan = plan_pipeline(config, 8)
    assert plan.schedule.orders == schedule.orders
    assert plan.cuts == stage_cuts(config, v_placement(3))


def test_wrong_schedule_files(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    config = config_for(str(path))
    assert refusal(config) == f"pipeline.schedule={path}: no such file"
    save_schedule(make_schedule("zb_v", num_ranks=3, num_microbatches=8), path)
    shown = f"pipeline.schedule={path}: "

    message = refusal(config, 6)
    assert message.startswith(f"{shown}made for 8 microbatches")
    assert "has 6" in message
    message = refusal(config_for(str(path), pp=4))
    assert message.startswith(f"{shown}made for 3 pipeline ranks; use parallel.pp=3 instead of 4")
    message = refusal(replace(config, model=replace(MODEL, num_layers=5)))
    assert f"pipeline.schedule={path}: 6 stages, more than model.num_layers=5" in message
    message = refusal(config_for(str(path), layers_per_stage=[3, 3, 3]))
    assert "3 stages" in message
    assert "has 6" in message


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        (["0F0 0F1 0BW0 0BW1", "1F0 1F1 1BW0"], "1B1 is missing"),
        (["0F0 0BW0 0F1 0BW1", "1F0 1F1 1BW0 1BW1"], "wait for each other in a circle"),
        (["0F0 0F1 0BW0 0BW1", "1F0 1BW0 1BX1"], "1BX1"),
    ],
    ids=["incomplete", "cyclic", "no operation"],
)
def test_schedule_files_that_cannot_run(tmp_path: Path, orders: list[str], words: str) -> None:
    path = tmp_path / "order.json"
    save_schedule(make_schedule("1f1b", num_ranks=2, num_microbatches=2), path)
    config = config_for(str(path), pp=2)
    check_pipeline(config, 2)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"orders": orders}))
    message = refusal(config, 2)
    assert message.startswith(f"pipeline.schedule={path}: ")
    assert message.count(str(path)) == 1
    assert words in message
    path.write_text("{not json")
    assert refusal(config, 2).startswith(f"pipeline.schedule={path}: ")


def test_the_command_line_refuses_before_ranks_start(tmp_path: Path) -> None:
    from phalanx.launch.config.compose import check

    layout = ["parallel.pp=2", "parallel.dp_shard=1", "launch.device=cpu"]
    with pytest.raises(ValueError, match=r"pipeline.schedule=\S+: no such file"):
        check(compose([*layout, f"pipeline.schedule={tmp_path / 'none.json'}"]))
    with pytest.raises(ValueError, match="pipeline.memory_limit=1KiB: no schedule keeps to it"):
        check(compose([*layout, "pipeline=auto", "pipeline.memory_limit=1KiB"]))
