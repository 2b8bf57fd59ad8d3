"""What measurements of operations become, and what `auto` decides from them."""

from dataclasses import replace

import pytest
import torch

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.profile import (
    OpRecorder,
    RankProfile,
    StageProfile,
    allocated_bytes,
    measured_timeline,
    merged,
    stage_profiles,
)
from phalanx.parallel.pipeline.schedules.registry import make_schedule
from phalanx.parallel.pipeline.search import best_order
from phalanx.parallel.pipeline.simulate import Costs, Memory, simulate
from phalanx.train.config import Config, TrainingConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.plan.replan import decide

CPU = torch.device("cpu")
NO_MEMORY = Memory((0.0,) * 2, (0.0,) * 2, (0.0,) * 2)


def recorder_of(
    steps: list[dict[str, tuple[float, float]]], deltas: list[dict[str, int]] | None = None
) -> OpRecorder:
    """A recorder that measured these operations."""
    recorder = OpRecorder(CPU)
    recorder.steps = [{Op.parse(op): times for op, times in step.items()} for step in steps]
    recorder.deltas = [{Op.parse(op): d for op, d in step.items()} for step in deltas or []]
    return recorder


def profiles_of(
    placement: tuple[int, ...], costs: Costs, *, held: float, put_off: float
) -> list[tuple[int, RankProfile]]:
    """All ranks' measurements, where every microbatch took exactly these costs."""
    ranks = range(max(placement) + 1)
    return [
        (
            rank,
            RankProfile(
                stages={
                    stage: StageProfile(
                        costs.f[stage], costs.b[stage], costs.w[stage], held, put_off
                    )
                    for stage, owner in enumerate(placement)
                    if owner == rank
                },
                hop=costs.hop if rank < ranks[-1] else None,
                clock=0.0 if rank < ranks[-1] else None,
            ),
        )
        for rank in ranks
    ]


def config_for(pp: int, **pipeline: object) -> Config:
    return Config(
        model=ModelConfig(num_layers=8),
        training=TrainingConfig(seq_len=64, global_batch_size=8),
        parallel=ParallelConfig(pp=pp, dp_shard=1),
        pipeline=PipelineConfig(schedule="auto", **pipeline),  # type: ignore[arg-type]
    )


def test_the_first_step_is_left_out() -> None:
    recorder = OpRecorder(CPU)
    for step in range(3):
        kept = []
        for op in (Op(0, Kind.F, 0), Op(0, Kind.BW, 0)):
            with recorder(op):
                kept.append(torch.empty(2**20 if step else 2**10))
        recorder.end_step()
        del kept
    assert [set(times) for times in recorder.steps] == [{Op(0, Kind.F, 0), Op(0, Kind.BW, 0)}] * 2
    for times in recorder.steps:
        (f_begin, f_end), (b_begin, b_end) = times.values()
        assert f_begin <= f_end <= b_begin <= b_end
    if allocated_bytes(CPU) is None:
        pytest.skip("nobody counts allocations here: no glibc 2.33 or later")
    for deltas in recorder.deltas:
        assert list(deltas.values()) == pytest.approx([2**22] * 2, rel=0.01)


def test_medians_over_microbatches_and_steps() -> None:
    step = {"0F0": (0.0, 2.0), "0F1": (2.0, 5.0), "0B0": (5.0, 6.0), "0W0": (6.0, 6.5)}
    slow = {op: (10 * begin, 10 * end) for op, (begin, end) in step.items()}
    [(stage, found)] = stage_profiles(recorder_of([step, step, slow]), boundary_bytes=0).items()
    assert (stage, found.f, found.b, found.w) == (0, 3.0, 1.0, 0.5)
    assert (found.held, found.put_off) == (None, None)


def test_memory_without_the_microbatch_that_makes_the_gradients() -> None:
    times = dict.fromkeys(("1F0", "1F1", "1B0", "1B1", "1W0", "1W1"), (0.0, 1.0))
    deltas = {"1F0": 900, "1F1": 100, "1B0": -60, "1B1": -60, "1W0": 800, "1W1": -40}
    found = stage_profiles(recorder_of([times], [deltas]), boundary_bytes=8)[1]
    assert found.held == 108, "and its input, which came from another rank"
    assert found.put_off == 40


def test_a_combined_backward_puts_nothing_off() -> None:
    times = {"0F0": (0.0, 1.0), "0BW0": (1.0, 4.0)}
    found = stage_profiles(recorder_of([times], [{"0F0": 50, "0BW0": -50}]), boundary_bytes=8)[0]
    assert found == StageProfile(f=1.0, b=3.0, w=0.0, held=50, put_off=0.0)


def test_ranks_are_put_together() -> None:
    def rank(stage: int, seconds: float, held: float | None, hop: float | None) -> RankProfile:
        return RankProfile({stage: StageProfile(seconds, 1.0, 1.0, held, 5.0)}, hop, None)

    ranks = [
        (0, rank(0, 2.0, 10, 0.5)),
        (0, rank(0, 4.0, 30, 0.7)),
        (1, rank(1, 1.0, 20, None)),
    ]
    costs, memory, measured = merged(ranks, 2, NO_MEMORY)
    assert costs == Costs((3.0, 1.0), (1.0, 1.0), (1.0, 1.0), pytest.approx(0.6))
    assert memory == Memory((30, 20), (-25, -15), (-5, -5))
    assert measured
    ranks[2] = (1, rank(1, 1.0, None, None))
    assert merged(ranks, 2, NO_MEMORY)[1:] == (NO_MEMORY, False)


def test_a_measured_timeline_is_on_one_clock() -> None:
    """The second rank's clock shows 100 s more, the third's 60 less than that."""
    schedule = make_schedule("1f1b", num_ranks=3, num_microbatches=3)
    expected = simulate(schedule, Costs.uniform(1, 1, 1, 0.25, num_stages=3))
    ranks = []
    for order, start, end, shift in zip(
        schedule.orders, expected.start, expected.end, (7.0, 107.0, 47.0), strict=True
    ):
        times = zip(order, start, end, strict=True)
        step = {op: (begin + shift, finish + shift) for op, begin, finish in times}
        clock = {7.0: 100.0, 107.0: -60.0, 47.0: None}[shift]
        ranks.append(RankProfile({}, None, clock, step))
    found = measured_timeline(schedule, ranks)
    for row, wanted in zip(found.start + found.end, expected.start + expected.end, strict=True):
        assert row == pytest.approx(wanted)


@pytest.mark.parametrize("placement", [loop_placement(2), v_placement(2)], ids=["loop", "V"])
def test_auto_gets_the_better_order_for_measured_costs(placement: tuple[int, ...]) -> None:
    num_stages = len(placement)
    costs = Costs((0.03,) * num_stages, (0.02,) * num_stages, (0.05,) * num_stages, 0.01)
    start = first_order(placement, costs)
    profiles = profiles_of(placement, costs, held=2e6, put_off=1e6)
    found = decide(config_for(2, memory_limit="20MB"), start, profiles)
    assert found == decide(config_for(2, memory_limit="20MB"), start, list(profiles))
    assert found.costs == costs
    assert found.schedule.placement == placement
    assert found.predicted_s < found.before_s
    assert found.predicted_s == pytest.approx(simulate(found.schedule, costs).makespan)
    assert found.memory.peak(found.schedule) <= 20e6
    assert found.work_s == pytest.approx(8 * 0.1 * num_stages / 2)


def first_order(placement: tuple[int, ...], costs: Costs) -> Schedule:
    """What `auto` would begin with if it took every microbatch by itself."""
    memory = Memory((1.0,) * len(placement), (0.0,) * len(placement), (-1.0,) * len(placement))
    limit = len(placement) / 2
    order = best_order(placement, num_microbatches=8, costs=costs, memory=memory, limit=limit)
    return replace(order, name="auto")


def test_auto_keeps_its_limit_by_measured_memory_or_says_what_would_do() -> None:
    costs = Costs((0.03,) * 2, (0.02,) * 2, (0.05,) * 2, 0.01)
    start = first_order(loop_placement(2), costs)
    profiles = profiles_of(start.placement, costs, held=2e6, put_off=1e6)
    with pytest.raises(
        ValueError, match=r"pipeline.memory_limit=1MB: .* 2000000 bytes .* measured"
    ):
        decide(config_for(2, memory_limit="1MB"), start, profiles)
    tight = decide(config_for(2, memory_limit="2MB"), start, profiles)
    assert tight.memory.peak(tight.schedule) <= 2e6
    free = decide(config_for(2), start, profiles)
    assert free.memory.peak(free.schedule) <= 4e6, "what 1F1B would hold"


def test_a_fixed_schedule_stays() -> None:
    costs = Costs((0.03,) * 2, (0.07,) * 2, (0.0,) * 2, 0.01)
    start = make_schedule("1f1b", num_ranks=2, num_microbatches=8)
    config = replace(config_for(2), pipeline=PipelineConfig())
    found = decide(config, start, profiles_of(start.placement, costs, held=2e6, put_off=0))
    assert found.schedule is start
    assert found.predicted_s == found.before_s == pytest.approx(simulate(start, costs).makespan)


def test_post_validation_predicts_steps_without_a_barrier() -> None:
    costs = Costs((0.03,) * 2, (0.02,) * 2, (0.05,) * 2, 0.01)
    start = make_schedule("zb_h1", num_ranks=2, num_microbatches=8)
    profiles = profiles_of(start.placement, costs, held=2e6, put_off=1e6)
    config = replace(config_for(2), pipeline=PipelineConfig(schedule="zb_h1"))
    free = replace(config, pipeline=replace(config.pipeline, post_validation=True))

    assert decide(free, start, profiles).predicted_s < decide(config, start, profiles).predicted_s
