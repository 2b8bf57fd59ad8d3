"""The pipeline that a run begins with: its schedule, and the layers of each stage.

A pure function of the configuration, so that every rank comes to the same one. Costs and memory
are estimates (costs.py); `auto` plans again from measured ones (replan.py). Torch-free.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from phalanx.parallel.pipeline.files import load_schedule
from phalanx.parallel.pipeline.graph import Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.schedules.registry import make_schedule, placement_of
from phalanx.parallel.pipeline.search import best_order, least_memory
from phalanx.parallel.pipeline.simulate import Costs, simulate, steady_time
from phalanx.train.config import Config
from phalanx.train.plan.costs import estimated_costs, estimated_memory
from phalanx.train.plan.cuts import stage_cuts
from phalanx.train.plan.limits import memory_limit, over_limit


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """What the ranks of a pipeline do, and with which layers."""

    schedule: Schedule
    cuts: list[range]
    """Layers of each stage."""


def plan_pipeline(config: Config, num_microbatches: int) -> PipelinePlan:
    """The schedule and stages of a run with parallel.pp > 1.

    Raises:
        ValueError: as `check_pipeline`.
    """
    wanted = config.pipeline
    if wanted.is_file:
        schedule = _from_file(config, num_microbatches)
        return PipelinePlan(schedule=schedule, cuts=stage_cuts(config, schedule.placement))
    if wanted.schedule == "auto":
        return _search(config, num_microbatches)
    pp = config.parallel.pp
    placement = placement_of(wanted.schedule, pp, wanted.chunks)
    cuts = stage_cuts(config, placement)
    schedule = make_schedule(
        wanted.schedule,
        num_ranks=pp,
        num_microbatches=num_microbatches,
        chunks=wanted.chunks,
        costs=estimated_costs(config, cuts),
    )
    return PipelinePlan(schedule=schedule, cuts=cuts)


def check_pipeline(config: Config, num_microbatches: int) -> None:
    """What `plan_pipeline` would refuse, without its search; nothing at parallel.pp=1.

    Raises:
        ValueError: the schedule file is missing, wrong or for another pipeline; the layers do not
            fit the stages; or no schedule keeps to the memory limit, by estimate.
    """
    if config.parallel.pp == 1:
        return
    if config.pipeline.schedule != "auto":
        plan_pipeline(config, num_microbatches)
        return
    limit = config.pipeline.memory_limit_bytes
    if limit is None:
        return
    least = min(
        least_memory(
            placement,
            num_microbatches=num_microbatches,
            memory=estimated_memory(config, stage_cuts(config, placement)),
        )
        for placement in auto_placements(config)
    )
    if least > limit:
        raise ValueError(over_limit(config, least, "by estimate from the model's shape"))


def auto_placements(config: Config) -> list[tuple[int, ...]]:
    """The placements that `auto` chooses from: one stage a rank, and a V where layers allow it."""
    pp, wanted = config.parallel.pp, config.pipeline
    given = wanted.layers_per_stage
    return [
        placement
        for chunks, placement in ((1, loop_placement(pp)), (2, v_placement(pp)))
        if chunks * pp <= config.model.num_layers
        and wanted.stages_per_rank in (None, chunks)
        and (given is None or len(given) == chunks * pp)
    ]


def step_time(schedule: Schedule, costs: Costs, *, barrier: bool) -> float:
    """Predicted time of one step in a run; `barrier`: all ranks wait for each other after it."""
    return simulate(schedule, costs).makespan if barrier else steady_time(schedule, costs)


def _search(config: Config, num_microbatches: int) -> PipelinePlan:
    """The faster of the placements, each with its best order under the limit, by estimate."""
    limit = memory_limit(config, num_microbatches)
    barrier = not config.pipeline.post_validation
    found: list[tuple[float, PipelinePlan]] = []
    least = float("inf")
    for placement in auto_placements(config):
        cuts = stage_cuts(config, placement)
        costs, memory = estimated_costs(config, cuts), estimated_memory(config, cuts)
        needed = least_memory(placement, num_microbatches=num_microbatches, memory=memory)
        least = min(least, needed)
        if needed > limit:
            continue
        schedule = best_order(
            placement, num_microbatches=num_microbatches, costs=costs, memory=memory, limit=limit
        )
        plan = PipelinePlan(schedule=replace(schedule, name="auto"), cuts=cuts)
        found.append((step_time(schedule, costs, barrier=barrier), plan))
    if not found:
        raise ValueError(over_limit(config, least, "by estimate from the model's shape"))
    return min(found, key=lambda item: item[0])[1]


def _from_file(config: Config, num_microbatches: int) -> Schedule:
    path, pp = config.pipeline.schedule, config.parallel.pp
    if not Path(path).is_file():
        raise ValueError(f"pipeline.schedule={path}: no such file")
    try:
        schedule = load_schedule(Path(path))
    except ValueError as error:  # it begins with the path
        raise ValueError(f"pipeline.schedule={error}") from error
    if schedule.num_ranks != pp:
        raise ValueError(
            f"pipeline.schedule={path}: made for {schedule.num_ranks} pipeline ranks; use "
            f"parallel.pp={schedule.num_ranks} instead of {pp}, or another file"
        )
    if schedule.num_microbatches != num_microbatches:
        raise ValueError(
            f"pipeline.schedule={path}: made for {schedule.num_microbatches} microbatches a rank, "
            f"but this run has {num_microbatches}; change training.global_batch_size or "
            "training.microbatch_size, or use another file"
        )
    return schedule
