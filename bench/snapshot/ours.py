"""Our side of `phalanx bench snapshot`: the checkpoint manager, as the trainer uses it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from phalanx.checkpoint.config import CheckpointConfig, SnapshotConfig
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.parallel.ranks import Ranks

LINGER_S = 60.0
"""Seconds that a holder stays when the bench is killed."""


class Ours:
    """Snapshots in the holder's memory, as `bench.snapshot_ranks.Saver`."""

    def __init__(self, folder: Path, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        """Collective; `folder`: where `files` go."""
        self._ranks = ranks
        self._config = CheckpointConfig(
            dir=str(folder),
            save_last=False,
            keep=0,
            async_save=False,
            snapshot=SnapshotConfig(every=1, linger_s=LINGER_S),
        )
        self.manager = self._new_manager()
        self.manager.prepare(tensors)

    def _new_manager(self) -> CheckpointManager:
        return CheckpointManager(self._config, ranks=self._ranks, on_event=_no_failure)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Begin."""
        self.manager.snapshot(step, lambda: tensors, {})

    def gate(self) -> None:
        """Wait until the tensors may change."""
        self.manager.before_update()

    def drain(self) -> None:
        """Wait until the last snapshot is committed."""
        self.manager.wait()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` from the holder's memory, as a successor of this process would."""
        successor = self._new_manager()
        resumed = successor.resume(lambda *_: tensors)
        successor.close(finished=False)  # the holder is still this one's
        if resumed is None or not resumed.from_memory or resumed.step != step:
            raise RuntimeError(f"the snapshot of step {step} is not in memory: {resumed}")

    def forget(self) -> None:
        """Nothing: memory is used again."""

    def close(self) -> None:
        """End the holder."""
        self.manager.close()


class Files:
    """Durable checkpoints by the same manager: written by the holder, fsync'd, committed by a
    manifest, and compared with their checksums when they are loaded."""

    def __init__(self, manager: CheckpointManager) -> None:
        self._manager = manager

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write, and wait for it; collective."""
        self._manager.save(step, tensors, {})

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place; collective."""
        self._manager.load(step, tensors)


def _no_failure(name: str, facts: Mapping[str, object]) -> None:
    """A snapshot that failed would be a quick one."""
    if name.endswith(("_failed", "_rejected", "_lost")):
        raise RuntimeError(f"{name}: {facts}")
