"""What each rank does for `phalanx bench snapshot`: the same loop for every side, in turn."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.bench import peer_dcp, peer_torch_checkpointing
from phalanx.bench.snapshot_state import KINDS, State, make_work, synchronize
from phalanx.checkpoint.config import CheckpointConfig, SnapshotConfig
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config

WITHOUT, OURS, DCP = "without", "phalanx", "dcp"
ROUNDS, STEPS = 5, 3
"""Where bench.rounds and bench.steps are empty."""
LINGER_S = 60.0
"""Seconds that a holder stays when the bench is killed."""


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
class Found:
    """What one rank found."""

    turns: dict[str, dict[str, list[Turn]]] = field(default_factory=dict)
    """By kind of step and side, round by round."""
    wrong: dict[str, int] = field(default_factory=dict)
    """Tensors of a side's last snapshot, over all ranks, that are not what they were then."""
    save: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until a checkpoint was complete and fsync'd, by side."""
    load: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until it was back."""
    num_bytes: int = 0
    """Of the state, over all ranks."""


class Ours:
    """The checkpoint manager, as the trainer uses it."""

    def __init__(self, folder: Path, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        self._ranks = ranks
        self.config = CheckpointConfig(
            dir=str(folder),
            save_last=False,
            keep=0,
            async_save=False,
            snapshot=SnapshotConfig(every=1, linger_s=LINGER_S),
        )
        self.manager = self._manager()
        self.manager.prepare(tensors)

    def _manager(self) -> CheckpointManager:
        return CheckpointManager(self.config, ranks=self._ranks, on_event=_no_failure)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Saver`."""
        self.manager.snapshot(step, tensors, {})

    def gate(self) -> None:
        """See `Saver`."""
        self.manager.before_update()

    def drain(self) -> None:
        """See `Saver`."""
        self.manager.wait()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """From the holder's memory, as a successor of this process would."""
        successor = self._manager()
        resumed = successor.resume(lambda *_: tensors)
        successor.close()
        if resumed is None or not resumed.from_memory or resumed.step != step:
            raise RuntimeError(f"the snapshot of step {step} is not in memory: {resumed}")

    def forget(self) -> None:
        """Nothing: memory is used again."""

    def close(self) -> None:
        """End the holder."""
        self.manager.close()


def measure(ranks: Ranks, config: Config, memory: str, disk: str) -> Found:
    """Take turns at every kind of step, then save and load.

    Args:
        memory: a folder in memory, where the peers save their snapshots.
        disk: a folder that is on a disk.
    """
    settings = config.bench.snapshot
    with process_group(ranks):
        mesh = build_mesh(
            ParallelConfig(dp_shard=ranks.world_size),
            world_size=ranks.world_size,
            device_type=ranks.device_type,
        ).axis("dp_shard")
        state = State(mesh, num_bytes=settings.state_mb << 20)
        work = make_work(ranks, step_s=settings.step_s)
        found = Found(num_bytes=state.num_bytes)
        ours = Ours(Path(disk) / OURS, ranks, state.tensors)
        sides: dict[str, Saver | None] = {WITHOUT: None, OURS: ours}
        for staging in peer_dcp.STAGINGS:
            sides[staging] = peer_dcp.AsyncSave(Path(memory) / staging, ranks, staging=staging)
        if peer_torch_checkpointing.installed():
            name = peer_torch_checkpointing.NAME
            sides[name] = peer_torch_checkpointing.Saver(Path(memory) / name, state.tensors)
        rounds, steps = config.bench.rounds or ROUNDS, config.bench.steps or STEPS
        for kind in KINDS:
            found.turns[kind] = {name: [] for name in sides}
            for number in range(rounds):
                for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                    side = sides[name]
                    turn = take_turn(side, state, work[kind], ranks, steps=steps)
                    found.turns[kind][name].append(turn)
                    if side is None:
                        continue
                    if kind == KINDS[-1] and number == rounds - 1:
                        found.wrong[name] = _loaded_wrong(side, state)
                    side.forget()
            _note(ranks, f"{kind} steps are done")
        for side in sides.values():
            if side is not None and side is not ours:
                side.close()
        _save_and_load(found, ours, state, Path(disk), rounds=rounds)
        ours.close()
    return found


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


def _loaded_wrong(side: Saver, state: State) -> int:
    """Tensors of the last snapshot that differ; it was taken before the last update."""
    tensors = state.blank()
    side.load(state.updates - 1, tensors)
    return state.wrong(tensors, updates=state.updates - 1)


def _save_and_load(found: Found, ours: Ours, state: State, disk: Path, *, rounds: int) -> None:
    """Durable checkpoints of the same state, by turns; the first round only warms up."""
    tensors = state.blank()
    found.save, found.load = ({OURS: [], DCP: []} for _ in range(2))
    for number in range(rounds + 1):
        state.update()
        step, folder = state.updates, disk / DCP / str(number)
        ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            OURS: (
                lambda: ours.manager.save(step, state.tensors, {}),  # noqa: B023
                lambda: ours.manager.load(step, tensors),  # noqa: B023
            ),
            DCP: (
                lambda: peer_dcp.save(folder, state.tensors),  # noqa: B023
                lambda: peer_dcp.load(folder, tensors),  # noqa: B023
            ),
        }
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            save_s, load_s = (_seconds(act) for act in ways[name])
            if number:
                found.save[name].append(save_s)
                found.load[name].append(load_s)
            wrong = state.wrong(tensors, updates=step)
            found.wrong[f"{name}.durable"] = found.wrong.get(f"{name}.durable", 0) + wrong
            for tensor in tensors.values():
                tensor.zero_()
        _empty(disk / DCP, Path(ours.config.dir))


def _seconds(act: Callable[[], object]) -> float:
    """Of all ranks together."""
    dist.barrier()
    begin = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - begin


def _empty(*folders: Path) -> None:
    """Delete the checkpoints in them; collective."""
    if dist.get_rank() == 0:
        for folder in folders:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
    dist.barrier()


def _no_failure(name: str, facts: dict[str, object]) -> None:
    if name.endswith(("_failed", "_rejected", "_lost")):
        raise RuntimeError(f"{name}: {facts}")


def _note(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(f"phalanx: bench snapshot: {text}", file=sys.stderr, flush=True)
