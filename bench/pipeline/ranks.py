"""What each rank does for `phalanx bench pipeline`: every schedule's steps, in turn."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from phalanx.bench.pipeline import emulated
from phalanx.bench.pipeline.delays import Delays, delays_now, no_collection
from phalanx.bench.pipeline.emulated import EmulatedStage, OpSeconds
from phalanx.bench.pipeline.peer import PEERS, PeerPipeline
from phalanx.bench.rounds import rounds
from phalanx.parallel.comm_meter import CommMeter
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.executor import Inputs
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.pipeline.graph import Schedule
from phalanx.parallel.pipeline.prefix import PrefixSums
from phalanx.parallel.pipeline.runtime import PipelineExecutor
from phalanx.parallel.pipeline.wgrad import WeightGradientStore
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.shard import Sharding

SYNCED = ("auto_2x",)
"""Schedules that also run with the ranks meeting after each step: `NAME+barrier`, where all wait
for all as a global gradient norm makes them, and `NAME+post_validation`."""

NUMBERS = (1.0, 1.0, 0.0)
"""What ranks tell each other after a step: loss, squared norm, and whether to stop."""

LEAD_S = 0.02
"""From the moment that the ranks agree on to begin to that beginning."""


@dataclass(frozen=True, kw_only=True)
class PipelineTurns:
    """What is to be run."""

    seconds: tuple[float, float, float]
    """F, B and W of all that a rank holds, for one microbatch."""
    num_microbatches: int
    schedules: dict[str, Schedule]
    """Ours, by the name in the table; the peers run too."""
    rounds: int
    steps: int
    """Steps of one turn, without a barrier between them."""


@dataclass(frozen=True)
class Measured:
    """What one rank found."""

    ends: dict[str, list[list[float]]]
    """By side and round: seconds from a common beginning to this rank's end of each step."""
    delays: list[Delays]
    """By round, at its beginning; the same on every rank."""


def measure(ranks: Ranks, plan: PipelineTurns) -> Measured:
    """Run every side in every round.

    Raises:
        RuntimeError: a side left out work, seen in its gradients.
    """
    with process_group(ranks):
        sides = {**_ours(plan), **_peers(plan)}
        for name, side in sides.items():  # connections are made, lazily filled state is filled
            side.seconds.awake = False
            side.turn(ranks, name, plan.num_microbatches, 1)
            side.seconds.awake = True
        found = Measured({name: [] for name in sides}, [])
        for number, order in enumerate(rounds(sides, plan.rounds)):
            found.delays.append(delays_now(ranks, plan.seconds))
            for place, name in enumerate(order):
                ends = sides[name].turn(ranks, name, plan.num_microbatches, plan.steps)
                found.ends[name].append(ends)
                if ranks.rank == 0:
                    when = f"round {number + 1}/{plan.rounds}"
                    _progress(when, place + 1, len(order), name, ends)
        return found


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to run steps, on this rank."""

    seconds: OpSeconds
    weights: list[nn.Parameter]
    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    """Called before a turn's clock starts."""
    finish: Callable[[], object] = lambda: None
    """Called after it has stopped."""

    def turn(self, ranks: Ranks, name: str, num_microbatches: int, steps: int) -> list[float]:
        """Run `steps` steps; seconds at the end of each, from a beginning common to all ranks.

        Raises:
            RuntimeError: as `emulated.check_gradient`.
        """
        self.prepare()
        for weight in self.weights:
            weight.grad = None
        with no_collection():
            begin = _common_beginning(ranks)
            ends = []
            for _ in range(steps):
                self.step()
                ends.append(time.monotonic() - begin)
        self.finish()
        for weight in self.weights:
            emulated.check_gradient(
                weight, num_microbatches=num_microbatches, steps=steps, who=name
            )
        return ends


def _ours(plan: PipelineTurns) -> dict[str, Side]:
    """One executor a placement; schedules take turns in it."""
    executors: dict[tuple[int, ...], tuple[PipelineExecutor, OpSeconds]] = {}
    sides = {}
    for name, schedule in plan.schedules.items():
        if schedule.placement not in executors:
            executors[schedule.placement] = _executor(plan, schedule)
        executor, seconds = executors[schedule.placement]
        make = partial(_side, plan, executor, seconds, schedule)
        sides[name] = make()
        if name in SYNCED:
            sides[f"{name}+barrier"] = make(_Barrier())
            sides[f"{name}+post_validation"] = make(_PostValidation())
    return sides


def _executor(plan: PipelineTurns, schedule: Schedule) -> tuple[PipelineExecutor, OpSeconds]:
    assert dist.group.WORLD is not None
    seconds = OpSeconds.share(plan.seconds, chunks=schedule.chunks)
    store = WeightGradientStore()
    stages: dict[int, nn.Module] = {
        index: EmulatedStage(seconds, store, first=index == 0)
        for index in schedule.stages_of(dist.get_rank())
    }
    executor = PipelineExecutor(
        stages,
        shardings={index: Sharding([]) for index in stages},
        schedule=schedule,
        store=store,
        group=dist.group.WORLD,
        meter=CommMeter(rank=dist.get_rank(), ranks_per_node=dist.get_world_size()),
        device=torch.device("cpu"),
        tokens=emulated.tokens(1).to("meta"),
        boundary=emulated.boundary(),
        output=emulated.boundary(),
    )
    return executor, seconds


def _side(
    plan: PipelineTurns,
    executor: PipelineExecutor,
    seconds: OpSeconds,
    schedule: Schedule,
    meeting: "_Meeting | None" = None,
) -> Side:
    tokens = emulated.tokens(plan.num_microbatches)
    inputs = Inputs(tokens, tokens, {})

    def prepare() -> None:
        executor.schedule = schedule
        executor.before_backward = meeting.before_backward if meeting else None
        assert executor.forwards_before_backward  # found now, not on the clock

    def step() -> None:
        executor.backward(inputs, emulated.loss)
        if meeting is not None:
            meeting.after_step()

    return Side(
        seconds=seconds,
        weights=[p for stage in executor.stages.values() for p in stage.parameters()],
        step=step,
        prepare=prepare,
        finish=meeting.before_backward if meeting else lambda: None,
    )


class _Meeting(Protocol):
    """How ranks agree on a step."""

    def after_step(self) -> None:
        """Called after every step's last operation."""

    def before_backward(self) -> bool:
        """As `PipelineExecutor.before_backward`; also called after the last step."""


class _Barrier:
    """Every rank waits for every other, as for the norm of all gradients."""

    def after_step(self) -> None:
        dist.all_reduce(torch.zeros(len(NUMBERS), dtype=torch.float64))

    def before_backward(self) -> bool:
        return False


class _PostValidation:
    """Each rank waits for the ranks before it, and before the next backward for the last one.

    The sums that training uses, around an optimizer that takes no time and is always right.
    """

    def __init__(self) -> None:
        size = dist.get_world_size()
        mesh = build_mesh(ParallelConfig(pp=size), world_size=size, device_type="cpu")
        self.sums = PrefixSums(mesh, timeout=timedelta(minutes=10))
        self.pending = False

    def after_step(self) -> None:
        self.sums.prefix(list(NUMBERS))
        self.pending = True

    def before_backward(self) -> bool:
        if self.pending:
            self.sums.whole()
            self.pending = False
        return False


def steady(ends: list[float]) -> float:
    """What each step after the first added to a turn, in seconds."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def _peers(plan: PipelineTurns) -> dict[str, Side]:
    assert dist.group.WORLD is not None
    sides = {}
    for name, (_, chunks, _) in PEERS.items():
        seconds = OpSeconds.share(plan.seconds, chunks=chunks)
        peer = PeerPipeline(
            name, seconds, num_microbatches=plan.num_microbatches, group=dist.group.WORLD
        )
        sides[name] = Side(seconds=seconds, weights=peer.weights(), step=peer.step)
    return sides


def _common_beginning(ranks: Ranks) -> float:
    """A moment of this machine's monotonic clock, the same on every rank, that has just come."""
    moment = torch.zeros(1, dtype=torch.float64)
    dist.barrier()
    if ranks.rank == 0:
        moment[0] = time.monotonic() + LEAD_S
    dist.broadcast(moment, 0)
    begin = float(moment)
    time.sleep(max(0.0, begin - time.monotonic()))
    return begin


def _progress(when: str, place: int, count: int, name: str, ends: list[float]) -> None:
    seconds = ends[-1] / len(ends)
    text = f"phalanx: bench pipeline: {when}, {place}/{count} {name}: {seconds:.2f} s a step"
    print(text, file=sys.stderr, flush=True)
