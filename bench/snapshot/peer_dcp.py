"""Peers of `phalanx bench snapshot` in torch.distributed.checkpoint: `async_save` with each way of
staging that this torch has, and `save` and `load`."""

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from phalanx.parallel.ranks import Ranks

FRESH, CACHED, SHARED = "async_save", "async_save_cached", "async_save_shared"
STAGINGS = (FRESH, CACHED, SHARED)
"""Staging as async_save does it by itself, into memory made anew; into memory that is kept; and in
a thread of its own into shared memory that is kept, so that the loop waits only before it changes
something. All of them save in a thread."""


class AsyncSave:
    """Saves a state again and again, as `bench.snapshot_ranks.Saver`."""

    def __init__(self, folder: Path, ranks: Ranks, *, staging: str) -> None:
        """`folder`: a new one in it for every save, until `forget`. Collective."""
        # It calls what torch has renamed since, at every save.
        warnings.filterwarnings("ignore", module="torch.distributed")
        self._folder = folder
        self._group = dist.new_group(backend="gloo")
        self._stager: DefaultStager | None = None
        if staging != FRESH:
            cuda = ranks.device_type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=staging == SHARED,
                    use_async_staging=staging == SHARED,
                    use_non_blocking_copy=cuda,
                )
            )
        self._staged: Future[Any] | None = None
        self._saved: Future[Any] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Begin, once the save before has ended: two at a time would mix up their messages."""
        self.drain()
        answer = dcp.async_save(
            dict(tensors),
            checkpoint_id=self._path(step),
            process_group=self._group,
            async_stager=self._stager,
        )
        if isinstance(answer, Future):
            self._staged, self._saved = None, answer
        else:
            self._staged, self._saved = answer.staging_completion, answer.upload_completion

    def gate(self) -> None:
        """Wait until the tensors may change."""
        if self._staged is not None:
            self._staged.result()

    def drain(self) -> None:
        """Wait until the last save is complete."""
        if self._saved is not None:
            self._saved.result()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` with what was saved last."""
        dcp.load(dict(tensors), checkpoint_id=self._path(step), process_group=self._group)

    def forget(self) -> None:
        """Delete all that was saved; collective."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        dist.barrier()

    def close(self) -> None:
        """Let go of what it holds."""
        if self._stager is not None:
            self._stager.close()
        self.forget()

    def _path(self, step: int) -> Path:
        return self._folder / str(step)


class Files:
    """Durable checkpoints by dcp.save and dcp.load with their defaults: one file a rank, written by
    one thread and fsync'd."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write; collective."""
        dcp.save(dict(tensors), checkpoint_id=self._folder / str(step))

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place; collective."""
        dcp.load(dict(tensors), checkpoint_id=self._folder / str(step))
