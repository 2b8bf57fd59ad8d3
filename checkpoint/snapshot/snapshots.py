"""Snapshots of a run's state in host memory, taken while training goes on.

`take` only remembers what is to be copied. A thread copies it to the holder's memory while the next
forward and backward run (parameters and optimizer states do not change meanwhile); the only wait is
`before_update`. Then the holders send and fold parity, and when every rank says that its node has
all of it, the snapshot is committed. Until then the one before stands.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.errors import StorageBusyError
from phalanx.checkpoint.holder.of_node import NodeHolder
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.snapshot.copier import Copier
from phalanx.checkpoint.snapshot.epoch import Epoch, open_epoch
from phalanx.checkpoint.snapshot.pins import Pins
from phalanx.checkpoint.snapshot.request import NO_WORK, Request, Taken


class Snapshots:
    """Takes snapshots of one rank; every method but `before_update` and `release` is collective."""

    def __init__(
        self, node_holder: NodeHolder, *, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """`group`: a gloo group of all ranks that nothing else uses."""
        self._node_holder = node_holder
        self._peers = Peers(group)
        self._device = device
        self._copier = Copier(device)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="snapshot", initializer=self._copier.enter
        )
        self._epoch: Epoch | None = None
        self._broken = False
        self._last_step = -1
        self._newest: Taken | None = None
        """The newest committed one."""
        self._pins = Pins()
        self._older: set[str] = set()
        """Epochs that the node's holder can let go of; known on a node's first rank."""
        self._request: Request | None = None
        self._eager: dict[str, Tensor] = {}
        self.on_open: Callable[[Epoch], None] = lambda epoch: None
        """Called in the thread with every epoch that was opened."""
        self.on_lost: Callable[[int], None] = lambda step: None
        """Called in the thread with the step before whose snapshot a node's holder was missed."""

    def prepare(self, chunks: Mapping[str, Chunk]) -> None:
        """Reserve all memory now, so that what cannot work fails before training begins.

        Raises:
            CheckpointError: see `open_epoch`.
        """
        self._thread.submit(self._open, chunks).result()

    def take(
        self,
        step: int,
        chunks: Callable[[], dict[str, Chunk]],
        *,
        eager: Mapping[str, Chunk],
        meta: Mapping[str, Any],
        durable: bool = False,
        may_skip: bool = False,
    ) -> "Future[Taken]":
        """Begin the snapshot of `step`; returns at once.

        The tensors that `chunks` gives (asked in the thread) must not change before `before_update`
        was called; those behind `eager` may, they are copied here.

        Args:
            durable: keep the slot as it is until `release`, on every node's first rank. Of the
                step that was snapshotted last, that snapshot is kept.
            may_skip: where another one is kept, this one is taken without (Taken.durable), or,
                where snapshots are for storage alone, not at all (StorageBusyError): the slot that
                is left is for one that may not be skipped, which waits for none.
        """
        self.before_update()
        request = Request(
            step=step,
            chunks=chunks,
            eager=self._copied(eager),
            ready=self._copier.mark(),
            meta=meta,
            durable=durable,
            may_skip=may_skip,
        )
        self._request = request
        return self._thread.submit(self._run, request)

    def before_update(self) -> float:
        """Wait until what `take` was given may change; returns the seconds it took.

        On CUDA the current stream waits, and the caller only until all copies were started.
        """
        request, self._request = self._request, None
        if request is None:
            return 0.0
        start = time.perf_counter()
        request.copied.wait()
        if request.issued is not None:
            torch.cuda.current_stream(self._device).wait_event(request.issued)
        return time.perf_counter() - start

    def release(self, taken: Taken) -> None:
        """Let a slot be used again that `take` kept."""
        self._pins.remove(taken)

    def close(self) -> None:
        """End the thread, once it has done what it was asked, and let go of the memory."""
        self._thread.shutdown()
        self._copier.unpin()
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None

    def _copied(self, eager: Mapping[str, Chunk]) -> dict[str, Chunk]:
        copies: dict[str, Chunk] = {}
        for name, chunk in eager.items():
            buffer = self._eager.get(name)
            if (
                buffer is None
                or buffer.shape != chunk.local.shape
                or buffer.dtype != chunk.local.dtype
            ):
                buffer = self._eager[name] = torch.empty_like(chunk.local)
            buffer.copy_(chunk.local)
            copies[name] = Chunk(local=buffer, size=chunk.size, offsets=chunk.offsets)
        return copies

    # --- in the thread ----------------------------------------------------------------------------

    def _open(self, chunks: Mapping[str, Chunk]) -> Epoch:
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None
        epoch = open_epoch(
            chunks, node_holder=self._node_holder, peers=self._peers, copier=self._copier
        )
        self._epoch, self._broken = epoch, False
        self.on_open(epoch)
        return epoch

    def _run(self, request: Request) -> Taken:
        try:
            held = self._held(request)
            chunks, anew, slot = self._agree(request, held=held is not None)
            if held is not None and not anew:
                taken = replace(held, durable=request.durable, **NO_WORK)
            else:
                epoch = self._open(chunks) if anew else self._epoch
                assert epoch is not None
                taken = self._newest = self._take(request, chunks, epoch, slot)
            if taken.durable and self._node_holder.node.leader:
                self._pins.add(taken)
            return taken
        except StorageBusyError:
            raise
        except Exception:
            self._broken = True
            raise
        finally:
            request.copied.set()

    def _held(self, request: Request) -> Taken | None:
        """The snapshot of the step, where it was taken before and is now for storage."""
        newest = self._newest
        if newest is None or newest.epoch is not self._epoch or not request.durable:
            return None
        return newest if newest.step == request.step else None

    def _agree(self, request: Request, *, held: bool) -> tuple[dict[str, Chunk], bool, int]:
        """What this rank copies; whether every rank begins a new epoch for it, and the slot that
        all use."""
        epoch, step = self._epoch, request.step
        again = step <= self._last_step and not held  # steps of an epoch only grow
        self._last_step = step
        chunks: dict[str, Chunk] = {}

        def look() -> list[int]:
            chunks.update(request.chunks() | request.eager)
            gone = epoch is not None and not self._broken and epoch.client.gone
            stale = again or gone or self._broken or epoch is None or not epoch.fits(chunks)
            kept = request.durable and not request.may_skip
            choosing = self._peers.rank == 0 and not stale and not held
            slot = self._free_slot(wait=kept) if choosing else 0
            full = request.durable and not kept and bool(self._pins)
            return [stale, gone, slot, full]

        anew, lost, slot, busy = self._peers.all_reduce(f"snapshot of step {step}", look, count=4)
        if busy:
            request.durable = False
        if lost:
            self.on_lost(step)
        if not anew and (slot == self._node_holder.slots or (busy and self._node_holder.slots < 3)):
            raise StorageBusyError(f"step {step}: storage has not yet written the one before")
        return chunks, bool(anew), slot

    def _free_slot(self, *, wait: bool) -> int:
        """See `Pins.free_slot`; rank 0 decides for all."""
        assert self._epoch is not None
        newest = self._newest
        return self._pins.free_slot(
            self._node_holder.slots,
            epoch=self._epoch.name,
            newest=newest.slot if newest is not None and newest.epoch is self._epoch else None,
            wait=wait,
        )

    def _take(
        self, request: Request, chunks: Mapping[str, Chunk], epoch: Epoch, slot: int
    ) -> Taken:
        """Copy, protect, commit."""
        what, node = f"snapshot of step {request.step}", self._node_holder.node
        work: dict[str, Any] = {"encode_s": 0.0, "sent_s": 0.0, "sent_bytes": 0}
        copied = protected = 0.0

        def copy() -> None:
            nonlocal copied
            try:
                self._copy(request, epoch.sources(chunks), epoch, slot)
            finally:
                request.copied.set()
            copied = time.perf_counter()

        def protect() -> list[int]:
            nonlocal work, protected
            digests = [0] * node.count
            if node.leader:
                work = epoch.client.protect(epoch.name, slot, request.step)
                digests[node.number] = _signed(work["digest"])
            protected = time.perf_counter()
            return digests

        def commit() -> None:
            if node.leader:
                self._commit(request, epoch, slot, [digest % 2**64 for digest in digests])

        self._peers.all_reduce(what, copy)
        digests = self._peers.all_reduce(what, protect, count=node.count)
        self._peers.all_reduce(what, commit)  # nobody writes to storage what another gave up
        return Taken(
            step=request.step,
            epoch=epoch,
            slot=slot,
            durable=request.durable,
            meta=dict(request.meta),
            time=time.time(),
            bytes=epoch.table.nbytes,
            copy_s=copied - request.start,
            protect_s=protected - copied if node.leader else 0.0,
            encode_s=work["encode_s"],
            sent_s=work["sent_s"],
            sent_bytes=work["sent_bytes"],
        )

    def _copy(self, request: Request, sources: list[Tensor], epoch: Epoch, slot: int) -> None:
        rank, client = self._peers.rank, epoch.client
        client.begin(epoch.name, slot, request.step)

        def issued(event: "torch.cuda.Event | None") -> None:
            request.issued = event
            request.copied.set()

        self._copier.copy(
            sources,
            epoch.memory[slot],
            ready=request.ready,
            on_issued=issued,
            on_bytes=lambda done: client.filled(epoch.name, rank, slot, done),
        )
        if not epoch.table.nbytes:
            client.filled(epoch.name, rank, slot, 0)

    def _commit(self, request: Request, epoch: Epoch, slot: int, digests: list[int]) -> None:
        client = epoch.client
        meta = {**request.meta, "time": time.time()}
        client.commit(epoch.name, slot, request.step, digests=digests, meta=meta)
        if epoch.first:
            self._older = {held.epoch for held in client.inventory().epochs} - {epoch.name}
            epoch.first = False
        # What is on its way to storage stays until a later commit.
        for name in self._older - self._pins.epochs():
            client.forget(name)
            self._older.discard(name)


def _signed(number: int) -> int:
    """A 64-bit number as int64 holds it; each node adds its own to zeros, so nothing overflows."""
    return number - 2**64 if number >= 2**63 else number
