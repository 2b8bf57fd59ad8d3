"""What tests of checkpoints share: a manager for this rank, a run that resumes and saves, and the
holders of a folder's run."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phalanx.checkpoint.config import CheckpointConfig, SnapshotConfig
from phalanx.checkpoint.format.job import read_job
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.holder.client import HolderClient, HolderGone
from phalanx.checkpoint.holder.sockets import all_sockets
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.storage.open import open_storage
from phalanx.parallel.ranks import Ranks, process_group

Run = Callable[..., list[Any]]
Events = list[tuple[str, dict[str, Any]]]
LINGER_S = 60.0
"""Holders of killed tests do not stay for ten minutes."""


def manager_of(
    ranks: Ranks, root: Path, *, events: Events | None = None, **config: Any
) -> CheckpointManager:
    found: Events = [] if events is None else events
    config.setdefault("snapshot", SnapshotConfig(linger_s=LINGER_S))
    return CheckpointManager(
        CheckpointConfig(dir=str(root), **config),
        ranks=ranks,
        on_event=lambda name, facts: found.append((name, facts)),
    )


def resume_and_save(ranks: Ranks, root: Path, next_step: int) -> tuple[int | None, float, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, keep=1)
        tensors = {f"x{ranks.rank}": torch.zeros(1000)}
        resumed = manager.resume(lambda step, names, meta: tensors)
        value = float(tensors[f"x{ranks.rank}"][0])
        manager.save(next_step, tensors, {})
        manager.close()
        manager = manager_of(ranks, root)
        assert manager.newest() == next_step
        manager.close()
        return None if resumed is None else resumed.step, value, events


def step_names(root: Path) -> list[str]:
    """What stands in a folder of checkpoints, besides the run's name."""
    return sorted(path.name for path in root.iterdir() if path.name != "job.json")


def stored_names(root: Path, folder: str) -> set[str]:
    """Names of the tensors of a checkpoint."""
    manifest = read_manifest(open_storage(root), folder)
    return {entry.name for part in manifest.parts for entry in part.table.entries}


def holder_pids(root: Path) -> dict[int, int]:
    """Process of each holder of the run that saves to `root`, by its place on this machine."""
    job = read_job(open_storage(root))
    pids: dict[int, int] = {}
    for name, node in all_sockets():
        if name == job:  # of another run, nothing is asked
            with suppress(HolderGone):  # it just ended
                client = HolderClient.connect(name, node)
                pids[node] = client.inventory().pid
                client.close()
    return pids


def committed_steps(root: Path) -> set[int]:
    """Steps whose snapshots are committed in memory, by every holder of the run."""
    job = read_job(open_storage(root))
    steps = []
    for name, node in all_sockets():
        if name == job:
            with HolderClient.connect(name, node) as client:
                epochs = client.inventory().epochs
            slots = [slot for epoch in epochs for held in epoch.members.values() for slot in held]
            steps.append({slot.step for slot in slots if slot.state == "committed"})
    return set.intersection(*steps) if steps else set()


def kill_holders(root: Path, nodes: set[int] | None = None) -> None:
    """kill -9 the run's holders, all or those of `nodes`, and wait until they are gone."""
    for node, pid in holder_pids(root).items():
        if nodes is None or node in nodes:
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}").exists():
                if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                    break
                time.sleep(0.005)


def filled(tensors: dict[str, Tensor], value: float) -> bool:
    """Whether every element of every tensor is `value`."""
    return all(bool((tensor == value).all()) for tensor in tensors.values())
