"""Writing a committed snapshot to storage from the holder, so that no rank waits for it.

Torch-free.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import xxhash

from phalanx.checkpoint.format.part_file import write_part
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.holder.server.epoch import HolderEpoch
from phalanx.checkpoint.holder.server.slots import Generation, Member
from phalanx.checkpoint.holder.spec import HolderError
from phalanx.checkpoint.holder.transport import ALIVE_S, CHUNK_BYTES
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage

FILES_AT_ONCE = 4
JOBS_KEPT = 4
"""Jobs whose outcome is remembered, for who asks again."""

logger = logging.getLogger(__name__)
Key = tuple[str, int, int, str, str]
Stored = StoredPart | StoredParity


class _ChangedError(HolderError):
    """Memory of a committed snapshot has changed."""

    def __init__(self, what: str, member: Member, generation: Generation) -> None:
        super().__init__(
            f"step {generation.step}: the memory of {what} on node {member.number} has changed "
            "since the snapshot was committed; it is not written, and counts as lost there"
        )


class Drains:
    """All that this holder writes or has written to storage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[Key, _Job] = {}

    @property
    def running(self) -> bool:
        """Whether something is being written."""
        with self._lock:
            return any(job.running for job in self._jobs.values())

    def drain(
        self, epoch: HolderEpoch, request: Mapping[str, Any], *, alive: Callable[[], bool]
    ) -> dict[str, Any]:
        """Write the files of all members held here; asked again, it goes on where it stopped.

        The writing goes on when who asked is gone.

        Raises:
            HolderError: the snapshot is not whole, or cannot be written.
            ConnectionError: not `alive`.
        """
        key: Key = (
            epoch.spec.epoch,
            int(request["slot"]),
            int(request["step"]),
            str(request["url"]),
            str(request["folder"]),
        )
        with self._lock:
            job = self._jobs.pop(key, None) or _Job(epoch, key)
            self._jobs[key] = job
            job.start(StorageConfig(**request["storage"]))
            ended = [key for key, job in self._jobs.items() if not job.running]
            for old in ended[:-JOBS_KEPT]:
                del self._jobs[old]
        return job.wait(alive)

    def forget(self, epoch: str) -> None:
        """Forget what was done for an epoch."""
        with self._lock:
            for key in [key for key in self._jobs if key[0] == epoch]:
                if not self._jobs[key].running:
                    del self._jobs[key]


class _Job:
    """One snapshot on its way to one folder."""

    def __init__(self, epoch: HolderEpoch, key: Key) -> None:
        self._epoch: HolderEpoch | None = epoch
        _, self._slot, self._step, self._url, self._folder = key
        self._stored: dict[str, Stored] = {}
        self._seconds = 0.0
        self._error: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, config: StorageConfig) -> None:
        """Write what is not written yet, in a thread; nothing where that is done or under way."""
        if self.running or self._epoch is None:
            return
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(config,), name="drain", daemon=True)
        self._thread.start()

    def wait(self, alive: Callable[[], bool]) -> dict[str, Any]:
        """What was written, once it is."""
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(ALIVE_S)
            if self._thread.is_alive() and not alive():
                raise ConnectionAbortedError("nobody waits for the answer")
        if self._error is not None:
            raise HolderError(self._error)
        stored = [self._stored[file] for file in sorted(self._stored)]
        return {
            "parts": [item.to_json() for item in stored if isinstance(item, StoredPart)],
            "parity": [item.to_json() for item in stored if isinstance(item, StoredParity)],
            "seconds": self._seconds,
            "bytes": sum(item.size for item in stored),
        }

    def _run(self, config: StorageConfig) -> None:
        start = time.perf_counter()
        epoch = self._epoch
        assert epoch is not None
        try:
            storage = open_storage(self._url, config)
            numbers = epoch.holders_of(self._slot, self._step)
            if not numbers:
                raise HolderError(f"step {self._step} is not in slot {self._slot}")
            for number in numbers:
                with epoch.reading(self._slot, number, self._step) as generation:
                    self._write_member(storage, epoch, number, generation)
            self._epoch = None  # done: the memory may go
        except Exception as error:
            logger.warning("step %d was not written: %s", self._step, error)
            self._error = (
                str(error) if isinstance(error, HolderError) else f"{self._folder}: {error}"
            )
            traceback.clear_frames(error.__traceback__)  # they know the snapshot's memory
        self._seconds += time.perf_counter() - start

    def _write_member(
        self, storage: Storage, epoch: HolderEpoch, number: int, generation: Generation
    ) -> None:
        try:
            self._write(storage, epoch.members[number], generation)
        except _ChangedError:
            epoch.damage(number, generation)
            self._epoch = None  # who asks again hears the same
            raise

    def _write(self, storage: Storage, member: Member, generation: Generation) -> None:
        tasks: dict[str, Callable[[], Stored]] = {}
        for rank in member.ranks:
            path = f"{self._folder}/part-{rank:05d}.safetensors"
            tasks[path] = partial(_write_part, storage, path, member, generation, rank)
        if member.peers:
            path = f"{self._folder}/parity-{member.number:05d}.bin"
            tasks[path] = partial(_write_parity, storage, path, member, generation)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            futures = {
                path: pool.submit(task) for path, task in tasks.items() if path not in self._stored
            }
        for path, future in futures.items():
            if future.exception() is None:
                self._stored[path] = future.result()
        for future in futures.values():
            future.result()  # raises what went wrong, once what went right is remembered


def _write_part(
    storage: Storage, path: str, member: Member, generation: Generation, rank: int
) -> StoredPart:
    table, view = member.spec.table(rank), generation.slot.data[rank].view

    def read(index: int) -> memoryview:
        entry = table.entries[index]
        return view[entry.begin : entry.begin + entry.nbytes]

    def check(digest: int) -> None:
        assert generation.part_digests is not None
        if digest != generation.part_digests[rank]:
            raise _ChangedError(f"rank {rank}'s part", member, generation)

    return write_part(storage, path, table, read, member=member.number, check=check)


def _write_parity(
    storage: Storage, path: str, member: Member, generation: Generation
) -> StoredParity:
    digest = xxhash.xxh3_64()

    def pieces() -> Iterator[memoryview]:
        view = generation.slot.parity.view
        for at in range(0, len(view), CHUNK_BYTES):
            piece = view[at : at + CHUNK_BYTES]
            digest.update(piece)
            yield piece
        if digest.intdigest() != generation.parity_digest:
            raise _ChangedError("the parity", member, generation)

    size = storage.write(path, pieces())
    return StoredParity(
        file=path.rpartition("/")[2],
        size=size,
        xxh3_64=digest.hexdigest(),
        member=member.number,
    )
