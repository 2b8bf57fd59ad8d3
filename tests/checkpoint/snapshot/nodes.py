"""What tests of protected snapshots share: a state, its manager, what holders have of it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.format.job import read_job
from phalanx.checkpoint.holder.client import HolderClient
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.storage.open import open_storage
from phalanx.parallel.ranks import Ranks
from tests.checkpoint.ranks import Events, manager_of

PARITY = {1: "xor", 2: "rs(2)"}


def state(rank: int, step: int) -> dict[str, Tensor]:
    """What a rank holds after `step` steps: of uneven sizes, and one tensor that all hold."""
    numbers = torch.Generator().manual_seed(1000 * step + rank)
    same = torch.Generator().manual_seed(step)
    return {
        f"own{rank}": torch.randn(9_000 + 1_001 * rank, generator=numbers),
        f"bytes{rank}": torch.randint(0, 256, (333,), generator=numbers, dtype=torch.uint8),
        "shared": torch.randn(70, 71, generator=same),
    }


def protected_manager(
    ranks: Ranks, root: Path, parity: int, events: Events, **config: Any
) -> CheckpointManager:
    """No checkpoints but those that are asked for."""
    config.setdefault("save_last", False)
    snapshot = SnapshotConfig(every=1, parity=PARITY[parity], linger_s=60)
    return manager_of(ranks, root, events=events, snapshot=snapshot, **config)


def take(
    manager: CheckpointManager, ranks: Ranks, step: int, *, durable: bool = False
) -> dict[str, Tensor]:
    """Begin a snapshot of a step."""
    tensors = state(ranks.rank, step)
    manager.snapshot(step, lambda: tensors, {"step": step, "text": f"of {step}"}, durable=durable)
    return tensors


def goes_on(manager: CheckpointManager, ranks: Ranks) -> tuple[int, bool]:
    """The step of what is loaded (0 = nothing) and whether it was in memory; it is all right."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in state(ranks.rank, 0).items()}
    resumed = manager.resume(lambda step, names, meta: tensors)
    if resumed is None:
        return 0, False
    assert resumed.meta == {"step": resumed.step, "text": f"of {resumed.step}"}
    for name, tensor in state(ranks.rank, resumed.step).items():
        assert torch.equal(tensors[name], tensor), name
    return resumed.step, resumed.from_memory


def check_protected(root: Path, nodes: int, step: int) -> None:
    """Every holder has its own member of one epoch, with the step committed, and nothing else."""
    job = read_job(open_storage(root))
    assert job is not None
    names = set()
    for node in range(nodes):
        client = HolderClient.connect(job, node)
        [epoch] = client.inventory().epochs
        client.close()
        names.add(epoch.epoch)
        assert epoch.members.keys() == {node}
        [slot] = [slot for slot in epoch.members[node] if slot.step == step]
        assert slot.state == "committed"
    assert len(names) == 1


def before(owner: Any, name: str, do: Callable[[], None]) -> None:
    """Do something before the next call of a method."""
    function = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, function)
        do()
        return function(*args, **kwargs)

    setattr(owner, name, called)


def flip(pid: int, name: str) -> None:
    """Change one bit in the middle of a piece of a holder's memory."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if re.match(rf"/memfd:phalanx-[0-9a-f]+-{name} ", os.readlink(link)):
            with link.open("r+b") as file:
                file.seek(link.stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 16]))
            return
    raise AssertionError(f"no {name}")
