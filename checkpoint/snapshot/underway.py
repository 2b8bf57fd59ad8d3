"""Snapshots and checkpoints that are on their way, and what is told of them once they ended.

The threads that take and write never report by themselves: all is said in the calling thread, where
`poll` is called.
"""

from collections.abc import Callable
from concurrent.futures import Future

from phalanx.checkpoint.errors import StorageBusyError
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.snapshot.durable import Saved
from phalanx.checkpoint.snapshot.epoch import Epoch
from phalanx.checkpoint.snapshot.monitoring import Monitor
from phalanx.checkpoint.snapshot.request import Taken

Report = Callable[..., None]
"""`report(event, **facts)`."""


class Underway:
    """One rank's; `saving` is known on the nodes' first ranks alone."""

    def __init__(
        self,
        *,
        peers: Peers,
        report: Report,
        monitor: Monitor,
        on_saved: Callable[[int], None],
    ) -> None:
        """`on_saved`: called with the step of each checkpoint that was written."""
        self._peers = peers
        self._report = report
        self._monitor = monitor
        self._on_saved = on_saved
        self._taking: list[tuple[int, Future[Taken], bool]] = []
        """With whether it is for storage."""
        self._saving: list[tuple[int, Future[Saved | None]]] = []
        self.opened: list[Epoch] = []
        """Epochs that were opened and not told of yet."""
        self.lost: list[int] = []
        """Steps at which a holder had died since the snapshot before."""
        self._skipped = 0
        """Since a checkpoint was written last."""
        self._failed: str | None = None
        """Why the newest checkpoint that was asked for could not be saved."""

    def taking(self, step: int, taken: "Future[Taken]", *, durable: bool) -> None:
        """A snapshot was begun."""
        self._taking.append((step, taken, durable))

    def saving(self, step: int, saved: "Future[Saved | None]") -> None:
        """A checkpoint is to be written; None where it was skipped."""
        self._saving.append((step, saved))

    def wait(self) -> str | None:
        """Wait for all of it; why the newest checkpoint could not be saved, told once."""
        for _, taken, _ in self._taking:
            taken.exception()
        for _, saved in self._saving:
            saved.exception()
        self.poll()
        failed, self._failed = self._failed, None
        return failed

    def poll(self) -> None:
        """Report what ended."""
        while self.lost:
            step = self.lost.pop(0)
            self._report("holder_lost", step=step)
            self._peers.say(
                f"a node's holder has died before the snapshot of step {step}; starting anew"
            )
        while self.opened:
            epoch = self.opened.pop(0)
            groups = [list(group) for group in epoch.groups]
            nbytes = sum(table.nbytes for table in epoch.tables)
            self._report("snapshot_opened", groups=groups, bytes=nbytes)
            for warning in epoch.warnings:
                self._peers.say(f"note: {warning}")
        while self._taking and self._taking[0][1].done():
            self._end_taking(*self._taking.pop(0))
        while self._saving and self._saving[0][1].done():
            self._end_saving(*self._saving.pop(0))

    def _end_taking(self, step: int, future: "Future[Taken]", durable: bool) -> None:
        error = future.exception()
        skipped = isinstance(error, StorageBusyError)
        if error is None:
            taken = future.result()
            self._monitor.taken(taken)
            skipped = durable and not taken.durable
        if skipped:
            self._skip(step, durable=durable)
        elif error is not None:
            self._report("snapshot_failed", step=step, reason=str(error))
            self._peers.say(f"the snapshot of step {step} failed: {error}")

    def _skip(self, step: int, *, durable: bool) -> None:
        """Say so at the first one since storage was done last: there may be one a step."""
        self._report("checkpoint_skipped" if durable else "snapshot_skipped", step=step)
        if not self._skipped:
            self._peers.say(
                f"the {'checkpoint' if durable else 'snapshot'} of step {step} is left out, as "
                "will be others until storage has written the one before; is checkpoint.every "
                "too low for it?"
            )
        self._skipped += 1

    def _end_saving(self, step: int, future: "Future[Saved | None]") -> None:
        error = future.exception()
        if error is not None:
            self._failed = f"the checkpoint of step {step} could not be saved: {error}"
            self._report("checkpoint_failed", step=step, reason=str(error))
            self._peers.say(self._failed)
            return
        saved = future.result()
        if saved is None:
            return
        if self._skipped > 1:
            self._peers.say(f"{self._skipped} were left out until that of step {step} was written")
        self._skipped = 0
        self._failed = None
        self._on_saved(step)
        self._monitor.saved(saved)
        self._report(
            "checkpoint_saved",
            step=step,
            seconds=saved.seconds,
            bytes=saved.bytes,
            deleted=saved.deleted,
        )
        for problem in saved.not_deleted:
            self._report("checkpoint_not_deleted", step=step, reason=problem)
