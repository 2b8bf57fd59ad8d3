"""Durable checkpoints of a run: saved in one layout, loaded in any other, complete or not there.

A save copies every tensor to host memory, writes through torch.distributed.checkpoint on a gloo
group of its own, and commits with a manifest of the files' checksums; asynchronously, all but the
copying happens in a background thread. Every method but `names` is collective: all ranks call it.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.folders import complete_folders
from phalanx.checkpoint.manifest import BrokenCheckpointError, check_files, read_manifest
from phalanx.checkpoint.peers import CheckpointError, Peers
from phalanx.checkpoint.planner import read_chunks, stored_tensors
from phalanx.checkpoint.restore import check_fit
from phalanx.checkpoint.staging import Stager
from phalanx.checkpoint.write import Saved, write_checkpoint

EventSink = Callable[[str, dict[str, Any]], None]


class CheckpointManager:
    """Saves, chooses and loads the checkpoints of `config.dir`.

    Args:
        on_event: called on rank 0, in the calling thread: "checkpoint_saved" (step, seconds, bytes,
            deleted), "checkpoint_not_deleted" (step, reason), "checkpoint_rejected" (step, path,
            reason), "checkpoint_cast" (step, names).
    """

    def __init__(
        self, config: CheckpointConfig, *, rank: int, world_size: int, on_event: EventSink
    ) -> None:
        self._config = config
        self._root = Path(config.dir)
        self._peers = Peers(dist.new_group(backend="gloo"))
        if (self._peers.rank, self._peers.size) != (rank, world_size):
            raise ValueError(
                f"rank={rank}, world_size={world_size}: the process group has rank "
                f"{self._peers.rank} of {self._peers.size}"
            )
        self._on_event = on_event
        self._stager = Stager()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[Saved]] | None = None
        self._verified: set[int] = set()
        self._rejected: set[int] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> float:
        """Save the checkpoint of `step`; asynchronously where the configuration says so.

        A save that still runs is waited for. Tensors may be changed once this returns. Where ranks
        hold the same name, they hold parts or equal copies of one tensor. Rank 0's `meta` is kept.

        Returns:
            Seconds that the caller was blocked.

        Raises:
            CheckpointError: this save (synchronous) or the one before it (asynchronous) failed.
        """
        start = time.perf_counter()
        self.wait()
        staged: dict[str, Chunk] | Exception
        try:
            document = _as_json(meta)
            staged = self._stager.stage(tensors)
        except Exception as error:  # told to the other ranks, which would wait for this one
            document, staged = {}, error
        future = self._writer.submit(
            write_checkpoint,
            self._root,
            step,
            staged,
            document,
            peers=self._peers,
            config=self._config,
            rejected=frozenset(self._rejected),
        )
        self._running = (step, future)
        if not self._config.async_save:
            self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the running save, if any, is complete.

        Raises:
            CheckpointError: it failed; the cause carries the traceback.
        """
        if self._running is None:
            return
        (step, future), self._running = self._running, None
        try:
            saved = future.result()
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be saved: {error}"
            ) from error
        self._verified.add(step)
        self._rejected.discard(step)
        self._report(
            "checkpoint_saved",
            step=step,
            seconds=saved.seconds,
            bytes=saved.bytes,
            deleted=saved.deleted,
        )
        for problem in saved.not_deleted:
            self._report("checkpoint_not_deleted", step=step, reason=problem)

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint whose every file holds; None where there is none.

        Broken ones are reported and passed over.
        """
        self.wait()
        folders = self._complete()
        for step, folder in reversed(folders.items()):
            reason = self._why_broken(step, folder)
            if reason is None:
                return step
            self._rejected.add(step)
            self._verified.discard(step)
            self._report("checkpoint_rejected", step=step, path=str(folder), reason=reason)
            if self._peers.rank == 0:
                print(f"phalanx: checkpoint {folder} refused: {reason}", file=sys.stderr)
        return None

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from the checkpoint of `step`, and return its meta.

        The checkpoint may hold more names than are asked for. Floating-point types are converted;
        where that may round, it is reported.

        Raises:
            ValueError: the checkpoint is missing or broken, or lacks a name, or a shape differs.
            CheckpointError: reading failed.
        """
        self.wait()
        folder = self._folder(step, self._complete())
        if step not in self._verified:
            reason = self._why_broken(step, folder)
            if reason is not None:
                raise ValueError(f"checkpoint {folder} refused: {reason}")
        meta = self._peers.agree("read manifest", lambda: read_manifest(folder).meta)[0]
        wanted, problem, rounded = check_fit(folder, tensors)
        answers = self._peers.gather((problem, rounded))
        for rank, (text, _) in enumerate(answers):
            if text is not None:
                raise ValueError(f"checkpoint {folder} does not fit (rank {rank}): {text}")
        casts = sorted({name for _, names in answers for name in names})
        if casts:
            self._report("checkpoint_cast", step=step, names=casts)
            if self._peers.rank == 0:
                print(
                    f"phalanx: {len(casts)} tensors of {folder} are rounded to a narrower type "
                    f"({casts[0]}, ...)",
                    file=sys.stderr,
                )
        self._peers.agree(
            f"load {folder}", lambda: read_chunks(folder, wanted, group=self._peers.group)
        )
        return meta

    def names(self, step: int) -> set[str]:
        """Names of the tensors in the checkpoint of `step`; not collective."""
        return set(stored_tensors(self._folder(step, complete_folders(self._root))))

    def close(self) -> None:
        """Wait for the running save and end the background thread.

        Raises:
            CheckpointError: the running save failed.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _complete(self) -> dict[int, Path]:
        """Complete folders as rank 0 sees them."""
        return self._peers.agree("list checkpoints", lambda: complete_folders(self._root))[0]

    def _folder(self, step: int, folders: Mapping[int, Path]) -> Path:
        if step not in folders:
            have = ", ".join(map(str, folders)) or "none"
            raise ValueError(
                f"checkpoint.dir={self._root}: no complete checkpoint of step {step}; "
                f"complete are: {have}"
            )
        return folders[step]

    def _why_broken(self, step: int, folder: Path) -> str | None:
        """Why a checkpoint must not be loaded; each rank checks its share of the files."""
        try:
            manifest = read_manifest(folder)
            names = sorted(manifest.files)[self._peers.rank :: self._peers.size]
            reason = check_files(folder, manifest, names)
            if manifest.step != step:
                reason = f"its manifest is of step {manifest.step}"
        except BrokenCheckpointError as error:
            reason = str(error)
        reason = next((text for text in self._peers.gather(reason) if text is not None), None)
        if reason is None:
            self._verified.add(step)
        return reason

    def _report(self, name: str, **facts: Any) -> None:
        if self._peers.rank == 0:
            self._on_event(name, facts)


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `meta` as it will be read again."""
    try:
        return json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta: only what JSON holds can be saved ({error})") from None
