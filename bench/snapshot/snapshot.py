"""`phalanx bench snapshot`: what a snapshot at every step costs the loop, beside torch's savers.

All sides save the same state in the same loop, in turn. Ours goes to the holder's memory; the peers
save to a file system in memory, which is the best they can have. A snapshot is *durable* once it is
complete on the disk and fsync'd: both sides do that, DCP by its default.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import psutil

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.snapshot import peer_torch_checkpointing
from phalanx.bench.snapshot.ranks import DCP, OURS, STEPS, WITHOUT, SnapshotTurns, Turn, measure
from phalanx.train.config import Config, Launcher

MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory."""
COPIES = 9
"""Of the state, held by all sides at once: the state itself, two generations of ours, one of each
peer that keeps it, one that is made anew, and what is compared; besides one file a step."""


def bench(request: Request) -> list[Figure]:
    """Milliseconds that the loop is blocked, step times with a snapshot over those without, and
    seconds of durable saves and loads.

    Raises:
        ValueError: launch is not local, or there is too little memory.
    """
    config, settings = request.config, request.config.bench.snapshot
    if config.launch.launcher is not Launcher.local:
        raise ValueError(
            f"launch.launcher={config.launch.launcher.name}: this bench's ranks share one machine; "
            "use launch=local"
        )
    _check_memory(config)
    if not peer_torch_checkpointing.installed():
        _note(
            "torch_checkpointing is not installed, so it is left out of the comparison; "
            "pip install 'phalanx-train[peers]'"
        )
    launch = replace(
        config.launch,
        nodes=1,
        ranks_per_node=settings.ranks,
        emulate_nodes=False,
        threads_per_rank=config.launch.threads_per_rank or 1,
    )
    prefix = "phalanx-bench-"
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=_memory_folder(config)) as fast,
        tempfile.TemporaryDirectory(prefix=prefix) as disk,
    ):
        found = request.launch(
            measure, config, fast, disk, world_size=settings.ranks, config=launch
        )
    return list(figures(found, step_s=settings.step_s))


def figures(found: list[SnapshotTurns], *, step_s: float) -> Iterator[Figure]:
    """All that is reported of what the ranks found."""
    first = found[0]
    yield Figure(name="snapshot.state", value=first.num_bytes / 1e9, unit="GB")
    yield Figure(name="snapshot.work", value=step_s, unit="s/step")
    here = float(peer_torch_checkpointing.NAME in first.wrong)
    yield Figure(name="snapshot.torch_checkpointing.here", value=here, unit="0 = left out")
    for kind, sides in first.turns.items():
        peers = [name for name in sides if name not in (WITHOUT, OURS)]
        parts = {name: blocked(_rounds(found, kind, name)) for name in (OURS, *peers)}
        steps = {name: step_times(_rounds(found, kind, name)) for name in sides}
        over = {
            name: [s / w for s, w in zip(steps[name], steps[WITHOUT], strict=True)]
            for name in sides
        }
        yield _alone(f"snapshot.{kind}.step", "s", steps[WITHOUT])
        for name, (call, gate) in parts.items():
            yield _alone(f"snapshot.{kind}.call.{name}", "ms", call)
            yield _alone(f"snapshot.{kind}.gate.{name}", "ms", gate)
        stalls = {
            name: [c + g for c, g in zip(call, gate, strict=True)]
            for name, (call, gate) in parts.items()
        }
        for what, unit, values in (("stall", "ms", stalls), ("overhead", "x step", over)):
            for peer in peers:
                title = f"snapshot.{kind}.{what}.vs_{peer}"
                yield compared(title, unit, peer, values[OURS], values[peer], less_is_better=True)
    yield _alone("snapshot.plain_copy", "ms", [1000 * seconds for seconds in first.copy])
    for what, seconds in (("save", first.save), ("load", first.load)):
        title = f"snapshot.durable_{what}"
        yield compared(title, "s", DCP, seconds[OURS], seconds[DCP], less_is_better=True)
    for name, count in first.wrong.items():
        yield Figure(name=f"snapshot.wrong.{name}", value=count, unit="tensors")


def blocked(rounds: list[list[Turn]]) -> tuple[list[float], list[float]]:
    """Milliseconds a step of the call and of the gate, by round: of the rank that was blocked
    longest in that step, the mean over its steps."""
    calls, gates = [], []
    for turns in rounds:
        slowest = [
            max(pair, key=sum)
            for pair in zip(*(zip(t.call, t.gate, strict=True) for t in turns), strict=True)
        ]
        calls.append(1000 * fmean(call for call, _ in slowest))
        gates.append(1000 * fmean(gate for _, gate in slowest))
    return calls, gates


def step_times(rounds: list[list[Turn]]) -> list[float]:
    """Seconds a step by round: of the slowest rank, the mean over steps."""
    return [fmean(map(max, zip(*(turn.step for turn in turns), strict=True))) for turns in rounds]


def _rounds(found: list[SnapshotTurns], kind: str, name: str) -> list[list[Turn]]:
    """A side's turns: by round, then by rank."""
    return [list(turns) for turns in zip(*(f.turns[kind][name] for f in found), strict=True)]


def _alone(name: str, unit: str, values: list[float]) -> Figure:
    return Figure(name=name, value=median(values), unit=unit, low=min(values), high=max(values))


def _memory_folder(config: Config) -> Path:
    """Where the peers save: in memory, where there is room for a turn's files."""
    room = (2 + _steps(config)) * config.bench.snapshot.state_mb << 20
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= room:
        return MEMORY
    folder = Path(tempfile.gettempdir())
    _note(f"{MEMORY} has no room for {room / 2**30:.1f} GiB: the peers save to {folder}")
    return folder


def _steps(config: Config) -> int:
    return config.bench.steps or STEPS


def _check_memory(config: Config) -> None:
    settings = config.bench.snapshot
    copies = COPIES + _steps(config)
    needed, free = copies * settings.state_mb << 20, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"bench.snapshot.state_mb={settings.state_mb}: {copies} copies need "
            f"{needed / 2**30:.1f} GiB of host memory, {free / 2**30:.1f} GiB are free; take "
            f"{int(free / copies) >> 20}, or fewer bench.steps"
        )


def _note(text: str) -> None:
    print(f"phalanx: note: {text}", file=sys.stderr, flush=True)
