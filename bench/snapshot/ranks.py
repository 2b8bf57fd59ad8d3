"""What each rank does for `phalanx bench snapshot`: the same loop for every side, in turn."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.bench.rounds import ROUNDS, rounds, synchronize, tell
from phalanx.bench.snapshot import peer_dcp, peer_torch_checkpointing
from phalanx.bench.snapshot.ours import Files as OurFiles
from phalanx.bench.snapshot.ours import Ours
from phalanx.bench.snapshot.state import KINDS, State, make_work
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config

WITHOUT, OURS, DCP = "without", "phalanx", "dcp"
STEPS = 3
"""Where bench.rounds and bench.steps are empty."""


class Saver(Protocol):
    """One way to save a state at every step; all ranks call it together."""

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Begin."""

    def gate(self) -> None:
        """Wait until the tensors may change."""

    def drain(self) -> None:
        """Wait until what was begun is complete."""

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` with what was saved last, which was `step`."""

    def forget(self) -> None:
        """Delete what was saved."""

    def close(self) -> None:
        """Called at the end."""


class Files(Protocol):
    """One way to save and load durably; all ranks call it together."""

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Until it is complete and fsync'd."""

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place."""


@dataclass(kw_only=True)
class Turn:
    """Seconds of each step of a turn, on one rank."""

    call: list[float] = field(default_factory=list)
    """Blocked when the snapshot was begun; where a side has to wait for its save before, that is
    part of it."""
    gate: list[float] = field(default_factory=list)
    """Blocked before the update."""
    step: list[float] = field(default_factory=list)
    """All of it."""


@dataclass(kw_only=True)
class SnapshotTurns:
    """What one rank found."""

    turns: dict[str, dict[str, list[Turn]]] = field(default_factory=dict)
    """By kind of step and side, round by round."""
    wrong: dict[str, int] = field(default_factory=dict)
    """Tensors of a side's last snapshot, over all ranks, that are not what they were then."""
    save: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until a checkpoint was complete and fsync'd, by side."""
    load: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until it was back."""
    copy: list[float] = field(default_factory=list)
    """Seconds until every rank had made a plain copy of its part, on its device."""
    num_bytes: int = 0
    """Of the state, over all ranks."""


def measure(ranks: Ranks, config: Config, memory: str, disk: str) -> SnapshotTurns:
    """Take turns at every kind of step, then save and load.

    Args:
        memory: a folder in memory, where the peers save their snapshots.
        disk: a folder that is on a disk.
    """
    settings = config.bench.snapshot
    count, steps = config.bench.rounds or ROUNDS, config.bench.steps or STEPS
    with process_group(ranks):
        mesh = build_mesh(
            ParallelConfig(dp_shard=ranks.world_size),
            world_size=ranks.world_size,
            device_type=ranks.device_type,
        ).axis("dp_shard")
        state = State(mesh, num_bytes=settings.state_mb << 20)
        work = make_work(ranks, step_s=settings.step_s)
        found = SnapshotTurns(num_bytes=state.num_bytes)
        ours = Ours(Path(disk) / OURS, ranks, state.tensors)
        peers = make_peers(Path(memory), ranks, state)
        sides: dict[str, Saver | None] = {WITHOUT: None, OURS: ours, **peers}
        for kind in KINDS:
            found.turns[kind] = {name: [] for name in sides}
            for number, order in enumerate(rounds(sides, count)):
                for name in order:
                    turn = take_turn(sides[name], state, work[kind], ranks, steps=steps)
                    found.turns[kind][name].append(turn)
                    if (side := sides[name]) is not None:
                        if kind == KINDS[-1] and number == count - 1:
                            found.wrong[name] = loaded_wrong(side, state)
                        side.forget()
            tell(ranks, "snapshot", f"{kind} steps are done")
        for peer in peers.values():
            peer.close()
        ways: dict[str, Files] = {
            OURS: OurFiles(ours.manager),
            DCP: peer_dcp.Files(Path(disk) / DCP),
        }
        save_and_load(found, ways, state, Path(disk), count=count)
        ours.close()
    return found


def make_peers(memory: Path, ranks: Ranks, state: State) -> dict[str, Saver]:
    """Those that can run here, by name; collective."""
    made: dict[str, Saver] = {
        staging: peer_dcp.AsyncSave(memory / staging, ranks, staging=staging)
        for staging in peer_dcp.STAGINGS
    }
    if peer_torch_checkpointing.installed():
        name = peer_torch_checkpointing.NAME
        made[name] = peer_torch_checkpointing.Saver(memory / name, state.tensors)
    return made


def take_turn(
    side: Saver | None, state: State, work: Callable[[], None], ranks: Ranks, *, steps: int
) -> Turn:
    """Steps with a snapshot each. What a step leaves to do in the background, the next one bears:
    the first is not counted, and ends like the others."""
    turn = Turn()
    dist.barrier()
    for number in range(steps + 1):
        begin = time.perf_counter()
        if side is not None:
            side.save(state.updates, state.tensors)
        called = time.perf_counter()
        work()
        dist.all_reduce(torch.zeros(1, device=ranks.device))  # as gradients keep ranks together
        synchronize(ranks)
        done = time.perf_counter()
        if side is not None:
            side.gate()
        synchronize(ranks)
        free = time.perf_counter()
        state.update()
        synchronize(ranks)
        if number:
            turn.call.append(called - begin)
            turn.gate.append(free - done)
            turn.step.append(time.perf_counter() - begin)
    if side is not None:
        side.drain()
    dist.barrier()
    return turn


def loaded_wrong(side: Saver, state: State) -> int:
    """Tensors of the last snapshot that differ; it was taken before the last update."""
    tensors = state.blank()
    side.load(state.updates - 1, tensors)
    return state.wrong(tensors, updates=state.updates - 1)


def save_and_load(
    found: SnapshotTurns, ways: Mapping[str, Files], state: State, disk: Path, *, count: int
) -> None:
    """Durable checkpoints of the same state, by turns, and plain copies of it; the first round
    only warms up.

    Args:
        disk: where they are, in a folder for each way, which is emptied after every round.
    """
    tensors = state.blank()
    for number, order in enumerate(rounds(ways, count + 1)):
        state.update()
        step = state.updates
        copy_s = _seconds(partial(state.copy_to, tensors))
        if number:
            found.copy.append(copy_s)
        for name in order:
            save_s = _seconds(partial(ways[name].save, step, state.tensors))
            load_s = _seconds(partial(ways[name].load, step, tensors))
            if number:
                found.save.setdefault(name, []).append(save_s)
                found.load.setdefault(name, []).append(load_s)
            title = f"{name}.durable"
            found.wrong.setdefault(title, 0)
            found.wrong[title] += state.wrong(tensors, updates=step)
            for tensor in tensors.values():
                tensor.to_local().zero_()
        if dist.get_rank() == 0:
            for folder in (path for way in disk.iterdir() for path in way.iterdir()):
                if folder.is_dir():
                    shutil.rmtree(folder)
        dist.barrier()


def _seconds(act: Callable[[], None]) -> float:
    """Until the last rank is done."""
    dist.barrier()
    begin = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - begin
