"""What `phalanx schedule` shows: a schedule made, searched or loaded, with costs and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phalanx.launch.bad_input import BadInput
from phalanx.launch.config.compose import world_size
from phalanx.launch.verbs.schedule.flags import Flags, Setting
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.pipeline.draw.layout import Panel, amount
from phalanx.parallel.pipeline.files import load_schedule
from phalanx.parallel.pipeline.graph import Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.schedules.registry import make_schedule, placement_of
from phalanx.parallel.pipeline.search import best_order, best_schedule, least_memory
from phalanx.parallel.pipeline.simulate import Costs, Memory, simulate
from phalanx.parallel.pipeline.validate import validate
from phalanx.train.config import Config


@dataclass(frozen=True, kw_only=True)
class Case:
    """A schedule, and what it is replayed with."""

    schedule: Schedule
    costs: Costs
    memory: Memory
    """In any unit."""
    limit: float | None
    """In the memory's unit."""
    multiple: float
    """p x what a microbatch's F adds to a rank, in the memory's unit."""
    estimated: bool = False
    """Whether times are FLOPs and memory is bytes, from the model's shape."""

    def memory_text(self, held: float) -> str:
        """An amount of memory for people."""
        return amount(held, "B") if self.estimated else f"{held / self.multiple:.4g}"

    def panel(self) -> Panel:
        """What is drawn."""
        return Panel(
            title=self.schedule.name,
            schedule=self.schedule,
            timeline=simulate(self.schedule, self.costs),
            memory=self.memory,
            limit=self.limit,
            memory_text=self.memory_text,
            memory_unit="" if self.estimated else "p x mem_F",
            time_text=partial(amount, unit="FLOP" if self.estimated else ""),
        )


def configured(config: Config) -> Case:
    """The schedule of a configured layout.

    Raises:
        BadInput: there is no pipeline.
        ValueError: the schedule cannot be made for it.
    """
    from phalanx.train.plan.costs import estimated_costs, estimated_memory
    from phalanx.train.plan.limits import memory_limit
    from phalanx.train.plan.pipeline import plan_pipeline

    if config.parallel.pp == 1:
        raise BadInput(
            "parallel.pp=1: no pipeline; set parallel.pp=2 or more, or give --p, --m and --costs"
        )
    count = config.num_microbatches(world_size(config))
    plan = plan_pipeline(config, count)
    memory = estimated_memory(config, plan.cuts)
    ranks = range(plan.schedule.num_ranks)
    most = max(sum(memory.f[s] for s in plan.schedule.stages_of(rank)) for rank in ranks)
    return Case(
        schedule=plan.schedule,
        costs=estimated_costs(config, plan.cuts),
        memory=memory,
        limit=memory_limit(config, count) if config.pipeline.schedule == "auto" else None,
        multiple=most * plan.schedule.num_ranks,
        estimated=True,
    )


def given(setting: Setting, flags: Flags) -> Case:
    """The schedule that the flags ask for.

    Raises:
        ValueError: it cannot be made, read, or kept within the limit.
    """
    made = _make(setting, str(flags.schedule), flags.chunks)
    share = [1 / len(made.stages_of(rank)) for rank in made.placement]
    multiple = setting.multiple
    f, b, w, hop = setting.costs
    memory = Memory(*_by_stage(setting.memory, share))
    multiples = _by_stage([x / multiple for x in setting.memory], share)
    needed = Memory(*multiples).peak(made)
    try:
        validate(made, memory=Memory(*multiples), limit=setting.limit)
    except ValueError as error:
        raise BadInput(
            f"--memory {setting.limit:g}: {error}; it needs {needed:.6g}, or take --schedule auto"
        ) from error
    return Case(
        schedule=made,
        costs=Costs(*_by_stage((f, b, w), share), hop),
        memory=memory,
        limit=None if setting.limit is None else setting.limit * multiple,
        multiple=multiple,
    )


def _by_stage(
    amounts: Sequence[float], share: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """A rank's F, B and W, each shared out to its stages."""
    f, b, w = (tuple(x * part for part in share) for x in amounts)
    return f, b, w


def _make(setting: Setting, name: str, chunks: int | None) -> Schedule:
    if PipelineConfig(schedule=name).is_file:
        return _load(setting, name)
    if name == "auto":
        return _search(setting, chunks)
    f, b, w, hop = setting.costs
    num_stages = len(placement_of(name, setting.num_ranks, chunks))
    per_rank = num_stages // setting.num_ranks
    return make_schedule(
        name,
        num_ranks=setting.num_ranks,
        num_microbatches=setting.num_microbatches,
        chunks=chunks,
        costs=Costs.uniform(f, b, w, hop, num_stages=num_stages, chunks=per_rank),
    )


def _load(setting: Setting, name: str) -> Schedule:
    try:
        loaded = load_schedule(Path(name))
    except OSError as error:
        raise BadInput(f"--schedule {name}: {error.strerror or error}") from error
    except ValueError as error:  # it begins with the path
        raise BadInput(f"--schedule {error}") from error
    for flag, has, wanted in (
        ("--p", loaded.num_ranks, setting.num_ranks),
        ("--m", loaded.num_microbatches, setting.num_microbatches),
    ):
        if has != wanted:
            raise BadInput(f"{flag} {wanted}: the schedule in {name} is for {has}")
    return loaded


def _search(setting: Setting, chunks: int | None) -> Schedule:
    p, m = setting.num_ranks, setting.num_microbatches
    placements = {1: loop_placement(p), 2: v_placement(p)}
    memory = {
        n: Memory.uniform(*setting.memory, num_stages=len(placement), chunks=n)
        for n, placement in placements.items()
    }
    wanted = [chunks] if chunks is not None else list(placements)
    limit = None if setting.limit is None else setting.limit * setting.multiple
    least = min(least_memory(placements[n], num_microbatches=m, memory=memory[n]) for n in wanted)
    if limit is not None and limit < least * (1 - 1e-9):
        raise BadInput(
            f"--memory {setting.limit:g}: no schedule keeps to it; the least that would do is "
            f"{least / setting.multiple:.6g}"
        )
    f, b, w, hop = setting.costs
    if chunks is None:
        return best_schedule(
            num_ranks=p,
            num_microbatches=m,
            f=f,
            b=b,
            w=w,
            hop=hop,
            memory=setting.memory,
            limit=limit,
        )
    return best_order(
        placements[chunks],
        num_microbatches=m,
        costs=Costs.uniform(f, b, w, hop, num_stages=p * chunks, chunks=chunks),
        memory=memory[chunks],
        limit=limit,
    )
