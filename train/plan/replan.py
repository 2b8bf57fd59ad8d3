"""What `auto` does with a pipeline's measured costs: the best order for them, within memory."""

from dataclasses import dataclass, replace

from phalanx.parallel.pipeline.graph import Schedule
from phalanx.parallel.pipeline.profile import RankProfile, merged
from phalanx.parallel.pipeline.search import best_order, least_memory
from phalanx.parallel.pipeline.simulate import Costs, Memory
from phalanx.train.config import Config
from phalanx.train.plan.costs import estimated_memory
from phalanx.train.plan.cuts import stage_cuts
from phalanx.train.plan.limits import estimated_memory_of_1f1b, memory_of_1f1b, over_limit
from phalanx.train.plan.pipeline import step_time


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the ranks found out together, and what follows from it."""

    schedule: Schedule
    """To go on with."""
    costs: Costs
    """In seconds."""
    memory: Memory
    """In bytes."""
    memory_is_measured: bool
    predicted_s: float
    """Of a step's pipeline, by the schedule."""
    work_s: float
    """Computing time of a rank in a step, their mean."""
    before_s: float
    """Predicted for the schedule that was measured."""


def decide(config: Config, schedule: Schedule, profiles: list[tuple[int, RankProfile]]) -> Measured:
    """What follows from all ranks' measurements of `schedule`; `auto` may get another order.

    Raises:
        ValueError: no schedule keeps to pipeline.memory_limit.
    """
    estimate = estimated_memory(config, stage_cuts(config, schedule.placement))
    costs, memory, memory_is_measured = merged(profiles, schedule.num_stages, estimate)
    barrier = not config.pipeline.post_validation
    before = step_time(schedule, costs, barrier=barrier)
    chosen, predicted = schedule, before
    if config.pipeline.schedule == "auto":
        limit = _limit(config, schedule, memory, estimate)
        order = best_order(
            schedule.placement,
            num_microbatches=schedule.num_microbatches,
            costs=costs,
            memory=memory,
            limit=limit,
        )
        after = step_time(order, costs, barrier=barrier)
        if after < before or memory.peak(schedule) > limit:
            chosen, predicted = replace(order, name="auto"), after
    work = sum(costs.work(chosen, rank) for rank in range(chosen.num_ranks)) / chosen.num_ranks
    return Measured(
        schedule=chosen,
        costs=costs,
        memory=memory,
        memory_is_measured=memory_is_measured,
        predicted_s=predicted,
        work_s=work,
        before_s=before,
    )


def _limit(config: Config, schedule: Schedule, memory: Memory, estimate: Memory) -> float:
    """Bytes that a rank may hold: the configured, or what 1F1B would hold.

    1F1B has one stage a rank. Where these stages lie in a V, its memory is estimated, on the scale
    that measured memory has to estimated one; never less than some order can do with.
    """
    count, pp = schedule.num_microbatches, config.parallel.pp
    least = least_memory(schedule.placement, num_microbatches=count, memory=memory)
    given = config.pipeline.memory_limit_bytes
    if given is not None:
        if least > given:
            raise ValueError(over_limit(config, least, "as measured"))
        return given
    if schedule.num_stages == pp:
        return memory_of_1f1b(pp, count, memory)
    plain = estimated_memory_of_1f1b(config, count)
    return max(least, plain * sum(memory.f) / sum(estimate.f))
