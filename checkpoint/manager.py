"""The checkpoints of a run: snapshots in host memory, written to storage where they are due.

Saved in one layout, loaded in any other; complete or not there. Everything goes one way: tensors to
the memory of the node's holder (`snapshot`), from there to storage (`durable`); and back from
whichever has the newest (`finding`), box by box (`reshard`).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from phalanx.checkpoint.chunks import Chunks
from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.errors import CheckpointError, StorageBusyError
from phalanx.checkpoint.format.job import directory_of, job_name, read_job
from phalanx.checkpoint.holder.client import HolderGone
from phalanx.checkpoint.holder.of_node import NodeHolder
from phalanx.checkpoint.load.finding import Finder, Origin
from phalanx.checkpoint.nodes.node import PATIENCE, find_node, leaders_of, store_host
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.snapshot.durable import Saved, write_durable
from phalanx.checkpoint.snapshot.monitoring import Monitor
from phalanx.checkpoint.snapshot.request import Taken
from phalanx.checkpoint.snapshot.snapshots import Snapshots
from phalanx.checkpoint.snapshot.underway import Underway
from phalanx.checkpoint.storage.open import open_storage
from phalanx.parallel.ranks import Ranks

EventSink = Callable[[str, dict[str, Any]], None]
Wanted = Callable[[int, set[str], dict[str, Any]], Mapping[str, Tensor]]
"""`wanted(step, names, meta)`: what to fill of a state that holds `names`."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A state that was loaded."""

    step: int
    meta: dict[str, Any]
    from_memory: bool
    saved_step: int | None
    """Of the newest checkpoint in storage; None = there is none."""


class CheckpointManager:
    """Takes, saves, chooses and loads; methods are collective, all ranks call them alike.

    Args:
        on_event: called on rank 0, in the calling thread: "checkpoint_saved" (step, seconds, bytes,
            deleted), "checkpoint_failed" (step, reason), "checkpoint_skipped" (step),
            "checkpoint_not_deleted" (step, reason),
            "checkpoint_rejected" (step, path, reason), "checkpoint_cast" (step, names),
            "snapshot_opened" (groups, bytes), "snapshot_failed" (step, reason),
            "snapshot_skipped" (step),
            "snapshot_lost" (reason), "snapshot_rejected" (step, reason), "holder_lost" (step).
        racks: failure domain of each node, see launch.racks.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        ranks: Ranks,
        on_event: EventSink,
        racks: Sequence[str] = (),
        log_dir: Path | None = None,
    ) -> None:
        self._config = config
        self._on_event = on_event
        self._storage = open_storage(config.dir, config.storage)
        self._peers = Peers(dist.new_group(backend="gloo", timeout=PATIENCE))
        self._node = find_node(
            self._peers,
            ranks_per_node=ranks.ranks_per_node,
            racks=racks,
            store_host=store_host(),
        )
        copying = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._leaders = leaders_of(self._node)
        self._log_dir = log_dir
        self._device = ranks.device
        self._copying = copying
        self._chunks, self._eager_chunks = Chunks(), Chunks()
        self._snapshots: Snapshots | None = None
        self._node_holder: NodeHolder | None = None
        job = self._peers.agree("look for the run's name", self._read_job)[0]
        if job is not None:
            self._node_holder = self._node_holder_of(job)
        self._finder = Finder(
            self._storage, node_holder=self._node_holder, peers=self._peers, report=self._report
        )
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.monitor = Monitor(config.snapshot)
        self._underway = Underway(
            peers=self._peers,
            report=self._report,
            monitor=self.monitor,
            on_saved=self._finder.rejected.discard,
        )

    # --- saving -----------------------------------------------------------------------------------

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Start the holders and reserve their memory, so that what cannot work fails at once.

        Raises:
            CheckpointError: too little host memory, no storage, no holder; says which and how much.
        """
        self._started().prepare(self._chunks.of(tensors))
        self._underway.poll()

    def snapshot(
        self,
        step: int,
        tensors: Callable[[], Mapping[str, Tensor]],
        meta: Mapping[str, Any],
        *,
        eager: Mapping[str, Tensor] | None = None,
        durable: bool = False,
        may_skip: bool = False,
    ) -> float:
        """Begin a snapshot of `step`, and with `durable` its way to storage; where the step's
        snapshot was begun before, that one's.

        Storage is never waited for. With `may_skip` a checkpoint is left out, and so reported,
        where the one before is not yet written; otherwise it waits in memory for its turn.

        Where ranks hold the same name, they hold parts or equal copies of one tensor. `tensors` is
        asked in another thread, and what it gives may change only after `before_update`; what is
        in `eager` may change at once.

        Returns:
            Seconds that the caller was blocked.

        Raises:
            ValueError: `meta` is not what JSON holds, or placements are not understood.
        """
        start = time.perf_counter()
        self._underway.poll()
        snapshots = self._started()
        taking = snapshots.take(
            step,
            lambda: self._chunks.of(tensors()),
            eager=self._eager_chunks.of(eager or {}),
            meta=_as_json(meta),
            durable=durable,
            may_skip=may_skip,
        )
        self._underway.taking(step, taking, durable=durable)
        if durable and self._node.leader:
            self._underway.saving(step, self._writer.submit(self._write, taking))
        seconds = time.perf_counter() - start
        self.monitor.stalled(seconds)
        return seconds

    def before_update(self) -> None:
        """Wait until the tensors of the last snapshot may change."""
        if self._snapshots is not None:
            self.monitor.stalled(self._snapshots.before_update())
            self._underway.poll()

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> float:
        """Save a checkpoint; asynchronously where the configuration says so.

        Tensors may be changed once this returns.

        Returns:
            Seconds that the caller was blocked.

        Raises:
            CheckpointError: a synchronous save failed.
        """
        start = time.perf_counter()
        self.snapshot(step, lambda: tensors, meta, durable=True)
        self.before_update()
        if not self._config.async_save:
            self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until what was asked for so far is in memory and in storage.

        Raises:
            CheckpointError: the newest checkpoint asked for could not be saved.
        """
        failures = self._peers.all_gather(self._underway.wait())
        failed = next((text for text in failures if text), None)
        if failed is not None:
            raise CheckpointError(failed)

    def close(self, *, finished: bool = True) -> None:
        """Wait, and let go of everything.

        Args:
            finished: the job needs its snapshots no more, so the holders end. Otherwise (an error
                unwinds) they keep the newest for `checkpoint.snapshot.linger_s`.

        Raises:
            CheckpointError: as `wait`.
        """
        try:
            if finished:
                self.wait()
        finally:
            self._writer.shutdown(wait=finished, cancel_futures=not finished)
            if self._snapshots is not None and finished:
                self._snapshots.close()
        if finished and self._node_holder is not None:
            self._peers.all_gather(None)  # nobody needs a holder any more
            self._finish_holder()
            self._snapshots = None

    # --- loading ----------------------------------------------------------------------------------

    def resume(self, wanted: Wanted) -> Resumed | None:
        """Load the newest state, in memory or in storage; None where there is none.

        What turns out to be broken is reported, and the next older one is tried.

        Raises:
            ValueError: all that there was is broken, or what `wanted` raises.
        """
        while (origin := self._finder.newest()) is not None:
            meta = self._finder.meta(origin)
            tensors = wanted(origin.step, self._finder.names(origin), meta)
            try:
                self._finder.load(origin, tensors)
            except CheckpointError as error:
                self._finder.reject(origin, str(error))
                continue
            return Resumed(
                step=origin.step,
                meta=meta,
                from_memory=origin.memory is not None,
                saved_step=self._finder.durable_step,
            )
        if self._finder.refused:
            why = "; ".join(self._finder.refused)
            raise ValueError(
                f"checkpoint.dir={self._config.dir}: no checkpoint is left that can be loaded "
                f"({why}); see `phalanx checkpoint verify --repair`, or choose another run.dir for "
                "a new run"
            )
        return None

    def newest(self) -> int | None:
        """Step of the newest state whose files or memory are all there; None without one."""
        origin = self._finder.newest()
        return None if origin is None else origin.step

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from the durable checkpoint of `step`, and return its meta.

        The checkpoint may hold more names than are asked for. Floating-point types are converted;
        where that may round, it is reported.

        Raises:
            ValueError: the checkpoint is missing, or lacks a name, or a shape differs.
            CheckpointError: it is broken, or reading failed.
        """
        origin: Origin = self._finder.at(step)
        self._finder.load(origin, tensors)
        return self._finder.meta(origin)

    # --- parts ------------------------------------------------------------------------------------

    def _read_job(self) -> str | None:
        return read_job(self._storage) if self._peers.rank == 0 else None

    def _node_holder_of(self, job: str) -> NodeHolder:
        return NodeHolder(
            config=self._config,
            job=job,
            directory=directory_of(self._storage),
            node=self._node,
            log_dir=self._log_dir,
        )

    def _started(self) -> Snapshots:
        """The snapshots, set up the first time."""
        if self._snapshots is None:
            if self._node_holder is None:
                job = self._peers.agree(
                    "name the run",
                    lambda: job_name(self._storage) if self._peers.rank == 0 else "",
                )[0]
                self._finder.node_holder = self._node_holder = self._node_holder_of(job)
            self._snapshots = Snapshots(self._node_holder, group=self._copying, device=self._device)
            self._snapshots.on_open = self._underway.opened.append
            self._snapshots.on_lost = self._underway.lost.append
        return self._snapshots

    def _write(self, taking: "Future[Taken]") -> Saved | None:
        """In the writer's thread, on a node's first rank; None where it was skipped."""
        assert self._node_holder is not None
        assert self._leaders is not None
        assert self._snapshots is not None
        if isinstance(taking.exception(), StorageBusyError):
            return None
        taken = taking.result()
        if not taken.durable:
            return None
        try:
            return write_durable(
                taken,
                storage=self._storage,
                node_holder=self._node_holder,
                peers=self._leaders,
                rejected=lambda: frozenset(self._finder.rejected),
            )
        finally:
            self._snapshots.release(taken)

    def _finish_holder(self) -> None:
        if not self._node.leader or self._node_holder is None:
            return
        with suppress(HolderGone), self._node_holder.connect() as client:
            client.finish()

    def _report(self, name: str, **facts: Any) -> None:
        if self._peers.rank == 0:
            self._on_event(name, facts)


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `meta` as it will be read again."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta: only what JSON holds can be saved ({error})") from None
    return copy
