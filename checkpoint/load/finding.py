"""The newest state that a run can go on from, in memory or in storage, and loading it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.folders import complete_folders
from phalanx.checkpoint.format.manifest import Manifest, read_manifest
from phalanx.checkpoint.holder.of_node import NodeHolder
from phalanx.checkpoint.load.choice import Recoverable
from phalanx.checkpoint.load.fit import check_fit
from phalanx.checkpoint.load.memory import MemorySource, find, recover
from phalanx.checkpoint.load.reshard import Moved, load
from phalanx.checkpoint.load.sources import Source, StorageSource
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.storage.base import Storage

Report = Callable[..., None]
"""`report(event, **facts)`."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a state is."""

    step: int
    memory: Recoverable | None = None
    folder: str | None = None
    manifest: Manifest | None = None

    @property
    def text(self) -> str:
        """For messages."""
        return "memory" if self.memory is not None else f"checkpoint {self.folder}"


class Finder:
    """Chooses and loads; every method is collective."""

    def __init__(
        self, storage: Storage, *, node_holder: NodeHolder | None, peers: Peers, report: Report
    ) -> None:
        """`node_holder`: of the holders; None where the run has none yet."""
        self._storage = storage
        self.node_holder = node_holder
        self._peers = peers
        self._report = report
        self.rejected: set[int] = set()
        """Steps whose durable checkpoints are broken."""
        self.refused: list[str] = []
        """What was rejected, and why."""
        self._lost: set[tuple[str, int]] = set()
        self.durable_step: int | None = None
        """Of the newest checkpoint in storage that `newest` saw."""
        self.moved: Moved | None = None
        """What the last load moved on this rank."""

    def newest(self) -> Origin | None:
        """The newest state; broken ones are reported and passed over."""
        durable = self._newest_durable()
        self.durable_step = durable.step if durable else None
        memory = self._newest_in_memory(durable.step if durable else -1)
        return memory or durable

    def at(self, step: int) -> Origin:
        """The durable checkpoint of a step.

        Raises:
            ValueError: there is none, or it is broken.
        """
        folders = self._complete()
        if step not in folders:
            have = ", ".join(map(str, folders)) or "none"
            raise ValueError(
                f"checkpoint.dir={self._storage.url}: no complete checkpoint of step {step}; "
                f"complete are: {have}"
            )
        manifest = self._manifest(step, folders[step])
        if isinstance(manifest, str):
            raise ValueError(f"checkpoint {folders[step]} refused: {manifest}")
        return Origin(step=step, folder=folders[step], manifest=manifest)

    def names(self, origin: Origin) -> set[str]:
        """Names of its tensors."""
        if origin.memory is not None:
            return {entry.name for table in origin.memory.spec.tables() for entry in table.entries}
        assert origin.manifest is not None
        return {entry.name for part in origin.manifest.parts for entry in part.table.entries}

    def meta(self, origin: Origin) -> dict[str, Any]:
        """What was saved with it."""
        if origin.memory is not None:
            return {key: value for key, value in origin.memory.meta.items() if key != "time"}
        assert origin.manifest is not None
        return origin.manifest.meta

    def load(self, origin: Origin, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place. Where it fails, some may have been filled.

        Raises:
            ValueError: it lacks a name, or a shape differs.
            CheckpointError: it is broken or cannot be read.
        """
        source: Source
        if origin.memory is not None:
            assert self.node_holder is not None
            source = recover(origin.memory, node_holder=self.node_holder, peers=self._peers)
        else:
            assert origin.folder is not None
            assert origin.manifest is not None
            source = StorageSource(self._storage, origin.folder, origin.manifest)
        try:
            wanted, problem, rounded = check_fit(source, tensors)
            answers = self._peers.all_gather((problem, rounded))
            for rank, (text, _) in enumerate(answers):
                if text is not None:
                    raise ValueError(f"{origin.text} does not fit (rank {rank}): {text}")
            casts = sorted({name for _, names in answers for name in names})
            if casts:
                self._report("checkpoint_cast", step=origin.step, names=casts)
                self._peers.say(
                    f"{len(casts)} tensors of {origin.text} are rounded to a narrower type "
                    f"({casts[0]}, ...)"
                )
            self.moved = load(source, wanted, peers=self._peers)
            if isinstance(source, MemorySource):
                source.check_unchanged(self._peers)
        finally:
            if isinstance(source, MemorySource):
                source.close()

    def reject(self, origin: Origin, reason: str) -> None:
        """Never come back to this one."""
        self.refused.append(f"step {origin.step}: {reason}")
        if origin.memory is not None:
            self._lost.add((origin.memory.epoch, origin.step))
            self._report("snapshot_rejected", step=origin.step, reason=reason)
        else:
            self.rejected.add(origin.step)
            path = f"{self._storage.url}/{origin.folder}"
            self._report("checkpoint_rejected", step=origin.step, path=path, reason=reason)
        self._peers.say(f"{origin.text} of step {origin.step} refused: {reason}")

    def _newest_durable(self) -> Origin | None:
        folders = self._complete()
        for step, folder in reversed(folders.items()):
            if step in self.rejected:
                continue
            manifest = self._manifest(step, folder)
            if isinstance(manifest, Manifest):
                return Origin(step=step, folder=folder, manifest=manifest)
            self.reject(Origin(step=step, folder=folder), manifest)
        return None

    def _newest_in_memory(self, durable: int) -> Origin | None:
        if self.node_holder is None:
            return None
        found, reasons = find(self.node_holder, self._peers, without=self._lost, durable=durable)
        for reason in reasons:
            self._report("snapshot_lost", reason=reason)
            self._peers.say(reason)
        if found is None:
            return None
        return Origin(step=found.step, memory=found)

    def _complete(self) -> dict[int, str]:
        """Complete folders as rank 0 sees them."""

        def look() -> dict[int, str]:
            return complete_folders(self._storage) if self._peers.rank == 0 else {}

        return self._peers.agree("list checkpoints", look)[0]

    def _manifest(self, step: int, folder: str) -> Manifest | str:
        """A folder's manifest if all its parts are there, else why it must not be loaded.

        Bytes are compared with their checksums when they are loaded.
        """

        def read() -> Manifest | str | None:
            if self._peers.rank != 0:
                return None
            try:
                manifest = read_manifest(self._storage, folder)
            except BrokenCheckpointError as error:
                return str(error)
            if manifest.step != step:
                return f"its manifest is of step {manifest.step}"
            return manifest

        manifest = self._peers.agree("read manifest", read)[0]
        assert manifest is not None
        if isinstance(manifest, str):
            return manifest

        def compare() -> str | None:
            # Parity is for repairs: no loading needs it.
            for part in manifest.parts[self._peers.rank :: self._peers.size]:
                try:
                    size = self._storage.size(f"{folder}/{part.file}")
                except FileNotFoundError:
                    return f"{part.file} is missing"
                if size != part.size:
                    return f"{part.file} has {size} bytes instead of {part.size}"
            return None

        reasons = self._peers.agree("look at the files", compare)
        return next((reason for reason in reasons if reason is not None), manifest)
