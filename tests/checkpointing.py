"""What tests of checkpoints share: a manager for this rank, and a run that resumes and saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.parallel.ranks import Ranks, process_group

Run = Callable[..., list[Any]]
Events = list[tuple[str, dict[str, Any]]]


def manager_of(
    ranks: Ranks, root: Path, *, events: Events | None = None, **config: Any
) -> CheckpointManager:
    found: Events = [] if events is None else events
    return CheckpointManager(
        CheckpointConfig(dir=str(root), **config),
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_event=lambda name, facts: found.append((name, facts)),
    )


def resume_and_save(ranks: Ranks, root: Path, next_step: int) -> tuple[int | None, float, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, keep=1)
        tensors = {f"x{ranks.rank}": torch.zeros(1000)}
        step = manager.newest()
        if step is not None:
            manager.load(step, tensors)
        value = float(tensors[f"x{ranks.rank}"][0])
        manager.save(next_step, tensors, {})
        manager.close()
        assert manager_of(ranks, root).newest() == next_step
        return step, value, events
