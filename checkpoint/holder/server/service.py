"""All that a holder holds, and what it does for the ranks of its node. Torch-free."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from phalanx.checkpoint.holder.inventory import Inventory
from phalanx.checkpoint.holder.memory import GIB, check_free
from phalanx.checkpoint.holder.server.drain import Drains
from phalanx.checkpoint.holder.server.epoch import HolderEpoch
from phalanx.checkpoint.holder.server.live import LiveEpoch
from phalanx.checkpoint.holder.server.neighbours import Neighbours
from phalanx.checkpoint.holder.server.protect import Protection
from phalanx.checkpoint.holder.server.rebuild import rebuild
from phalanx.checkpoint.holder.spec import HolderError, Spec
from phalanx.checkpoint.holder.transport import Address

logger = logging.getLogger(__name__)


class Service:
    """All that one holder holds."""

    def __init__(self, *, stop: threading.Event, directory: str) -> None:
        """
        Args:
            stop: set when the holder is to end.
            directory: where its run saves; "" = unknown.
        """
        self._stop = stop
        self.directory = directory
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._epochs: dict[str, HolderEpoch] = {}
        self._protections: dict[str, Protection] = {}
        self._peers = Neighbours(self)
        self._drains = Drains()
        self._trainers: set[object] = set()
        self.idle_since = time.monotonic()
        """When the last rank's connection ended; it counts while there is none."""
        self.used = False
        """Whether there ever was one."""

    @property
    def busy(self) -> bool:
        """Whether ranks are connected, or something of theirs is still being written."""
        return self.in_use(0.0) is not None

    def in_use(self, quiet_s: float) -> str | None:
        """Why the run needs this holder, or has needed it within so many seconds; None = it only
        lingers."""
        with self._lock:
            if self._trainers:
                return "ranks are connected"
            if self._drains.running:
                return "a checkpoint is being written"
            idle_s = time.monotonic() - self.idle_since
        if idle_s < quiet_s:
            return f"ranks were connected {idle_s:.0f} s ago, and may be again; wait {quiet_s:g} s"
        return None

    def epoch(self, name: str) -> HolderEpoch:
        """An epoch that is held.

        Raises:
            HolderError: it is not.
        """
        with self._lock:
            if name not in self._epochs:
                raise HolderError(f"no epoch {name} here")
            return self._epochs[name]

    def live(self, name: str) -> LiveEpoch:
        """An epoch that ranks fill, or filled, here.

        Raises:
            HolderError: it is none.
        """
        epoch = self.epoch(name)
        if not isinstance(epoch, LiveEpoch):
            raise HolderError(f"epoch {name} was not opened here, only rebuilt")
        return epoch

    def protection(self, name: str) -> Protection | None:
        """The threads of an epoch that is in use."""
        with self._lock:
            return self._protections.get(name)

    def tokens(self) -> dict[str, str]:
        """By epoch."""
        with self._lock:
            return {name: epoch.spec.token for name, epoch in self._epochs.items()}

    def join(self, connection: object) -> None:
        """A rank is there; the holder stays as long as it is."""
        with self._lock:
            self._trainers.add(connection)
            self.used = True

    def leave(self, connection: object) -> None:
        """A connection has ended."""
        with self._lock:
            if connection in self._trainers:
                self._trainers.discard(connection)
                self.idle_since = time.monotonic()

    # --- requests ---------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """What this holder has."""
        with self._lock:
            epochs = list(self._epochs.values())
        return Inventory(
            pid=os.getpid(),
            address=self._peers.address,
            epochs=tuple(epoch.inventory() for epoch in epochs),
        )

    def listen(self, host: str) -> Address:
        """See `HolderClient.listen`."""
        return self._peers.listen(host)

    def open(self, spec: Spec, *, member: int, populate: int) -> None:
        """See `HolderClient.open`."""
        if not 0 <= member < len(spec.ranks):
            raise HolderError(f"member {member} of {len(spec.ranks)}")
        with self._opening:
            with self._lock:
                known = self._epochs.get(spec.epoch)
                older = [epoch for epoch in self._epochs.values() if epoch is not known]
            if known is not None:
                if not isinstance(known, LiveEpoch) or known.own.number != member or known.frozen:
                    raise HolderError(f"epoch {spec.epoch} was opened before, otherwise")
                return
            for epoch in older:
                self._end(epoch, epoch.freeze)
            opened = LiveEpoch(spec, own=member)
            _allocate(opened, populate)
            with self._lock:
                self._epochs[spec.epoch] = opened
                self._protections[spec.epoch] = Protection(opened)
        logger.info("epoch %s opened as member %d of %d", spec.epoch, member, len(spec.ranks))

    def rebuild(
        self,
        spec: Spec,
        *,
        member: int,
        step: int,
        meta: Any,
        digests: list[int],
        sources: Mapping[int, Address],
    ) -> None:
        """See `HolderClient.rebuild`."""
        with self._opening:
            with self._lock:
                epoch = self._epochs.get(spec.epoch)
            found = rebuild(
                epoch.spec if epoch else spec,
                member,
                step,
                meta=meta,
                digests=digests,
                sources=sources,
            )
            if epoch is None:
                epoch = HolderEpoch(spec)
                with self._lock:  # before those that are in use: it is older
                    self._epochs = {spec.epoch: epoch, **self._epochs}
            epoch.adopt(found)
        logger.info("epoch %s: member %d of step %d rebuilt", spec.epoch, member, step)

    def forget(self, name: str) -> None:
        """See `HolderClient.forget`."""
        with self._lock:
            epoch = self._epochs.pop(name, None)
        if epoch is not None:
            self._end(epoch, epoch.close)
            self._drains.forget(name)
            logger.info("epoch %s forgotten", name)

    def drain(self, request: Mapping[str, Any], *, alive: Callable[[], bool]) -> dict[str, Any]:
        """See `HolderClient.drain`."""
        return self._drains.drain(self.epoch(str(request["epoch"])), request, alive=alive)

    def finish(self) -> None:
        """End the holder."""
        self._stop.set()

    def retire(self, quiet_s: float) -> None:
        """End the holder.

        Raises:
            HolderError: it is in use, see `in_use`.
        """
        why = self.in_use(quiet_s)
        if why is not None:
            raise HolderError(why)
        self.finish()

    def _end(self, epoch: HolderEpoch, how: Callable[[], None]) -> None:
        how()
        with self._lock:
            protection = self._protections.pop(epoch.spec.epoch, None)
        if protection is not None:
            protection.hang_up()


def _allocate(epoch: LiveEpoch, populate: int) -> None:
    """Give every slot its memory; `populate` of them take it at once.

    Raises:
        HolderError: there is not so much.
    """
    own = epoch.own
    check_free(
        own.slot_bytes * min(populate, epoch.spec.num_slots),
        f"{populate} generations of member {own.number}'s snapshots ({own.slot_bytes / GIB:.2f} "
        f"GiB each, of which {own.stripes.parity_bytes / GIB:.2f} GiB parity)",
    )
    try:
        for number in range(epoch.spec.num_slots):
            own.allocate(number, populate=number < populate)
    except MemoryError as error:
        epoch.close()
        raise HolderError(str(error)) from error
