"""A peer of `phalanx bench snapshot`: the asynchronous saver of the torch_checkpointing package.

It copies to shared memory in a thread, and a process of its own writes that to files. Settings are
its defaults, for a CPU what they become there.
"""

import importlib.util
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

NAME = "torch_checkpointing"
KEY = "state"


def installed() -> bool:
    """Whether the peer can run here."""
    return importlib.util.find_spec(NAME) is not None


class Saver:
    """Saves a state again and again, as `bench.snapshot_ranks.Saver`."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """`folder`: a new one in it for every save, until `forget`. Collective."""
        from torch_checkpointing import CheckpointManager

        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = CheckpointManager(CheckpointManager.Config(subprocess_init_fn=_quiet))
        self._manager.prewarm_staging({KEY: dict(tensors)})
        self._saved: Future[Any] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Begin; waits by itself for the save before."""
        self._saved = self._manager.save(self._path(step), {KEY: dict(tensors)})

    def gate(self) -> None:
        """Wait until the tensors may change."""
        with self._manager.lock():
            pass

    def drain(self) -> None:
        """Wait until the last save is complete."""
        if self._saved is not None:
            self._saved.result()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` with what was saved last."""
        self._manager.load(self._path(step), into={KEY: dict(tensors)}, strict=True)

    def forget(self) -> None:
        """Delete all that was saved; collective."""
        dist.barrier()
        if dist.get_rank() == 0:
            for folder in self._folder.iterdir():
                shutil.rmtree(folder)
        dist.barrier()

    def close(self) -> None:
        """End its process."""
        self._manager.close()
        self.forget()

    def _path(self, step: int) -> str:
        return str(self._folder / str(step))


def _quiet(*_: Any) -> None:
    """In its process: torch warns of every DTensor that arrives there."""
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
