"""`phalanx bench pipeline`: schedules on real ranks with emulated compute.

Every schedule runs its steps in turn with every other and with torch's own, on ranks whose
operations sleep (`emulated.py`). What is measured stands beside what the simulator says for the
same costs, with the delays that this machine adds to an operation and to a hop, measured before.
Always gloo on this machine's processors, whatever the run's layout is.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.pipeline.delays import Delays, measure_delays
from phalanx.bench.pipeline.peer import PEERS
from phalanx.bench.pipeline.ranks import SYNCED, PipelineTurns, measure, steady
from phalanx.parallel.pipeline.graph import Schedule
from phalanx.parallel.pipeline.schedules.registry import chunks_of, make_schedule
from phalanx.parallel.pipeline.search import best_schedule
from phalanx.parallel.pipeline.simulate import Costs, simulate, steady_time
from phalanx.train.bench_config import EmulatedPipelineConfig
from phalanx.train.config import Device

NAMED = ("1f1b", "interleaved", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v")
LIMITS = {"auto_1x": 1.0, "auto_2x": 2.0}
"""`auto` by name in the table, with its memory limit as a multiple of 1F1B's."""
MEMORY = (2.0, -1.0, -1.0)
"""What F, B and W of a microbatch add on a rank; 1F1B holds as many microbatches as ranks."""
ROUNDS, STEPS = 3, 3
"""Where bench.rounds and bench.steps are empty."""
COUNTERPARTS = {
    "1f1b": ("torch_1f1b",),
    "interleaved": ("torch_interleaved_zb",),
    "zb_v": ("torch_zbv",),
    "auto_1x": ("1f1b", *PEERS),
    "auto_2x": ("1f1b", *PEERS),
}
"""Whose throughput is compared with whose."""


def bench(request: Request) -> list[Figure]:
    """Step times beside the simulator's, and throughput beside torch's.

    Raises:
        ValueError: a schedule cannot be made for the ranks and microbatches asked for.
    """
    settings = request.config.bench.pipeline
    steps = request.config.bench.steps or STEPS
    if steps < 2:
        raise ValueError(f"bench.steps={steps}: the pipeline bench chains steps; at least 2")
    if request.config.launch.nodes > 1:
        raise ValueError(
            f"launch.nodes={request.config.launch.nodes}: the pipeline bench compares clocks of "
            "one machine; use launch.nodes=1"
        )
    named(settings, Delays(0.0, 0.0, 0.0, 0.0))  # what is wrong is said before ranks start
    _note_load()
    launch = replace(
        request.config.launch,
        device=Device.cpu,
        ranks_per_node=settings.ranks,
        emulate_nodes=False,
        threads_per_rank=1,
    )
    run = {"world_size": settings.ranks, "config": launch}
    delays = request.launch(measure_delays, settings.seconds, **run)[0]
    schedules = named(settings, delays) | searched(settings, delays)
    plan = PipelineTurns(
        seconds=settings.seconds,
        num_microbatches=settings.microbatches,
        schedules=schedules,
        rounds=request.config.bench.rounds or ROUNDS,
        steps=steps,
    )
    ranks = request.launch(measure, plan, **run)
    turns = {
        name: [
            [max(ends) for ends in zip(*(rank.ends[name][number] for rank in ranks), strict=True)]
            for number in range(plan.rounds)
        ]
        for name in ranks[0].ends
    }
    predicted = {
        name: [predict(schedule, settings, delays, steps) for delays in ranks[0].delays]
        for name, schedule in schedules.items()
    }
    return list(_figures(settings, ranks[0].delays, predicted, turns))


def _note_load() -> None:
    """Say so where others compute: what sleeps here has to be woken on time."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        text = f"phalanx: note: load {load:.1f} on {cores} cores; the times will be too long"
        print(text, file=sys.stderr, flush=True)


def named(settings: EmulatedPipelineConfig, delays: Delays) -> dict[str, Schedule]:
    """Schedules with a name of the field's; those that go by costs get the machine's delays.

    Raises:
        ValueError: as `make_schedule`.
    """
    schedules = {}
    for name in NAMED:
        costs = stage_costs(settings, delays, num_stages=settings.ranks * chunks_of(name))
        schedules[name] = make_schedule(
            name, num_ranks=settings.ranks, num_microbatches=settings.microbatches, costs=costs
        )
    return schedules


def searched(settings: EmulatedPipelineConfig, delays: Delays) -> dict[str, Schedule]:
    """`auto` within each of LIMITS."""
    f, b, w = settings.seconds
    return {
        name: best_schedule(
            num_ranks=settings.ranks,
            num_microbatches=settings.microbatches,
            f=f + delays.f,
            b=b + delays.b,
            w=w + delays.w,
            hop=delays.hop,
            memory=MEMORY,
            limit=limit * settings.ranks * MEMORY[0],
        )
        for name, limit in LIMITS.items()
    }


def stage_costs(settings: EmulatedPipelineConfig, delays: Delays, *, num_stages: int) -> Costs:
    """Seconds of a stage's operations: its share of a rank's, and the delay of each."""
    chunks = num_stages // settings.ranks
    f, b, w = (
        seconds / chunks + delay
        for seconds, delay in zip(settings.seconds, (delays.f, delays.b, delays.w), strict=True)
    )
    return Costs.uniform(f, b, w, delays.hop, num_stages=num_stages)


@dataclass(frozen=True)
class Predicted:
    """What the simulator says, in seconds."""

    first: float
    """One step from a common beginning to its last operation anywhere."""
    steady: float
    """What each further step of a turn adds."""
    lasting: float
    """What one more step adds in a long run."""


def predict(
    schedule: Schedule, settings: EmulatedPipelineConfig, delays: Delays, steps: int
) -> Predicted:
    """Replay a turn of `steps` steps."""
    costs = stage_costs(settings, delays, num_stages=schedule.num_stages)
    timeline = simulate(schedule, costs, steps=steps)
    ends = [
        max(end[len(end) // steps * number - 1] for end in timeline.end)
        for number in range(1, steps + 1)
    ]
    return Predicted(ends[0], steady(ends), steady_time(schedule, costs))


def _figures(
    settings: EmulatedPipelineConfig,
    delays: list[Delays],
    predicted: dict[str, list[Predicted]],
    turns: dict[str, list[list[float]]],
) -> Iterator[Figure]:
    for kind in ("f", "b", "w", "hop"):
        values = [1000 * getattr(found, kind) for found in delays]
        yield _plain(f"pipeline.delay_{kind}", values, "ms")
    for name in predicted:
        yield from _beside_simulator(name, predicted[name], turns[name])
    rates = {name: [settings.microbatches / steady(t) for t in turns[name]] for name in turns}
    for name in PEERS:
        yield _plain(f"pipeline.{name}.throughput", rates[name], "microbatches/s")
    for name, peers in COUNTERPARTS.items():
        for peer in peers:
            yield compared(
                f"pipeline.{name}.vs_{peer}",
                "microbatches/s",
                peer,
                rates[name],
                rates[peer],
                less_is_better=False,
            )
    yield from _limits(settings, delays, predicted)
    for name in SYNCED:
        yield compared(
            f"pipeline.{name}.post_validation",
            "steps/s",
            "barrier",
            [1 / steady(turn) for turn in turns[f"{name}+post_validation"]],
            [1 / steady(turn) for turn in turns[f"{name}+barrier"]],
            less_is_better=False,
        )


def _beside_simulator(
    name: str, predicted: list[Predicted], turns: list[list[float]]
) -> Iterator[Figure]:
    """A first step and those chained to it; ratios are simulated over measured."""
    off = []
    for what, measured, simulated in (
        ("first_step_s", [turn[0] for turn in turns], [p.first for p in predicted]),
        ("step_s", [steady(turn) for turn in turns], [p.steady for p in predicted]),
    ):
        off.append(median(m / s - 1 for m, s in zip(measured, simulated, strict=True)))
        yield compared(
            f"pipeline.{name}.{what}", "s", "simulated", measured, simulated, less_is_better=True
        )
    yield Figure(name=f"pipeline.{name}.vs_simulated", value=max(off, key=abs), unit="relative")


def _limits(
    settings: EmulatedPipelineConfig, delays: list[Delays], predicted: dict[str, list[Predicted]]
) -> Iterator[Figure]:
    """What the costs allow over 1F1B: `auto` as simulated, and ranks that never wait."""
    ours = [p.lasting for p in predicted["1f1b"]]
    works = []
    for found in delays:
        costs = stage_costs(settings, found, num_stages=settings.ranks)
        works.append(settings.microbatches * (costs.f[0] + costs.b[0] + costs.w[0]))
    for name, times in (
        *((f"{auto}.simulated_gain", [p.lasting for p in predicted[auto]]) for auto in LIMITS),
        ("no_bubble_gain", works),
    ):
        gains = [one / other for one, other in zip(ours, times, strict=True)]
        yield _plain(f"pipeline.{name}", gains, "x 1f1b")


def _plain(name: str, values: list[float], unit: str) -> Figure:
    return Figure(name=name, value=median(values), unit=unit, low=min(values), high=max(values))
