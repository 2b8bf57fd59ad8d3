"""`phalanx checkpoint restore`: a copy of a checkpoint elsewhere, cut as asked, however often it is
interrupted.

Every byte crosses from source to target once: units are read side by side, laid where they belong,
and noted in a journal; a restore that is run again reads what stands back from the target's disk,
and believes its checksums alone. Every shard is held to the source's checksum before the manifest,
which makes a checkpoint of the folder, is written last.
"""

import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import xxhash

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import write_manifest
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.storage.base import ShortFileError
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.restore.finishing import check_targets
from phalanx.checkpoint.tool.restore.journal import NAME as JOURNAL
from phalanx.checkpoint.tool.restore.journal import Journal
from phalanx.checkpoint.tool.restore.plan import Restored, RestorePlan
from phalanx.checkpoint.tool.restore.units import Stream, TargetFiles, Unit, units_of

UNITS = 1000
"""About so many units a restore is cut into: a kill costs those under way, THREADS of them."""
UNIT_BYTES = (64 << 10, 16 << 20)
"""Least and most of a unit; the most is one request's worth of a storage far away."""
THREADS = 4
OTHER_FILES = 256
"""Files that may be open besides the target's."""
SYNC_S = 2.0
"""Seconds between moments at which what was written is made durable."""


def restore_to_folder(plan: RestorePlan, root: Path) -> Restored:
    """Restore into a folder of a mounted file system, going on where an earlier call stopped.

    Raises:
        ValueError: another restore is in that folder.
        BrokenCheckpointError: a shard is not what the source's manifest says.
        OSError: the source cannot be read or the target not written; what stands stays.
    """
    folder = root / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    least, most = UNIT_BYTES
    facts = plan.facts() | {"unit_bytes": min(most, max(least, plan.nbytes // UNITS))}
    with closing(Journal(folder / JOURNAL, facts)) as journal:
        sources, targets = plan.sources, plan.targets
        with closing(_open(folder, sources, targets, begun=bool(journal.done))) as files:
            mover = _Mover(plan, sources, files, journal)
            mover.move_all()
            files.sync()
            if plan.cutting.tables is not None:  # what lies on the disk is what the source had
                mover.compare_all()
        parts = check_targets(plan, targets)
        manifest = plan.finished(parts)
        write_manifest(plan.target, plan.name, manifest)
        (folder / JOURNAL).unlink()
    return Restored(stood=mover.stood, moved=mover.moved, manifest=manifest)


def _open(
    folder: Path, sources: list[Stream], targets: list[Stream], *, begun: bool
) -> TargetFiles:
    """The target's files; where there is no room for them, none of it is kept for nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(targets) + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        return TargetFiles(folder, sources, targets)
    except OSError:
        for target in () if begun else targets:
            (folder / target.file).unlink(missing_ok=True)
        raise


class _Mover:
    """Moves the units of one restore."""

    def __init__(
        self, plan: RestorePlan, sources: list[Stream], files: TargetFiles, journal: Journal
    ) -> None:
        self._plan, self._sources = plan, sources
        self._files, self._journal = files, journal
        self._unit_bytes: int = journal.facts["unit_bytes"]
        self._synced = time.monotonic()
        self._lock = threading.Lock()
        self.stood = 0
        self.moved = 0

    def move_all(self) -> None:
        """Bring every unit that does not stand.

        Raises:
            BrokenCheckpointError: shards are not what the manifest says; they are not noted.
            OSError: a file cannot be read or written.
        """
        with byte_bar(f"restoring {self._plan.name}", self._plan.nbytes) as done:
            wrong = self._hold_to_digests(self._results(self._bring, done))
        for units, _ in wrong:
            for unit in units:
                self._journal.forget(unit)
        if wrong:
            names = ", ".join(name for _, name in wrong[:3])
            more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
            raise BrokenCheckpointError(
                f"{self._plan.url}: {names}{more}: not what the manifest says; all else stands; "
                f"{self._plan.advice}"
            )

    def compare_all(self) -> None:
        """Read all of the target back and hold it to the source's checksums.

        Raises:
            BrokenCheckpointError: the target's disk does not give back what was written.
            OSError: it cannot be read.
        """
        with byte_bar(f"checking {self._plan.name}", self._plan.nbytes) as done:
            wrong = self._hold_to_digests(self._results(self._files.gather, done))
        for units, _ in wrong:
            for unit in units:
                self._journal.forget(unit)
        if wrong:
            raise BrokenCheckpointError(
                f"{self._plan.target.url}/{self._plan.name}: {wrong[0][1]} was written and reads "
                "back otherwise: its disk or memory is failing"
            )

    def _bring(self, unit: Unit) -> memoryview:
        """A unit's bytes, which stand in the target when this returns."""
        noted = self._journal.done.get(unit.number)
        if noted is not None:
            data = self._files.gather(unit)
            if xxhash.xxh3_64_hexdigest(data) == noted:
                with self._lock:
                    self.stood += unit.nbytes
                return data
        data = self._read(unit)
        self._files.scatter(unit, data)
        self._journal.add(unit.number, xxhash.xxh3_64_hexdigest(data))
        with self._lock:
            self.moved += unit.nbytes
        return data

    def _read(self, unit: Unit) -> memoryview:
        """A unit's bytes, out of the source."""
        source = self._sources[unit.source]
        data = memoryview(bytearray(unit.nbytes))
        path = f"{self._plan.folder}/{source.file}"
        try:
            self._plan.source.read_into(path, len(source.header) + unit.begin, data)
        except (FileNotFoundError, ShortFileError) as error:
            size = 0 if isinstance(error, FileNotFoundError) else self._plan.source.size(path)
            entries = (source.table.entries[index] for index, _ in unit.slabs)
            lost = next(e.key for e in entries if len(source.header) + e.begin + e.nbytes > size)
            raise BrokenCheckpointError(
                f"{self._plan.url}: {source.file}: {lost} is lost ({error.strerror}); "
                f"{self._plan.advice}"
            ) from None
        return data

    def _results(
        self, action: Callable[[Unit], memoryview], done: Callable[[int], None]
    ) -> Iterator[tuple[Unit, memoryview]]:
        """Every unit and its bytes, in order; some are worked on at the same time."""
        waiting: deque[tuple[Unit, Future[memoryview]]] = deque()
        units = units_of(self._sources, self._unit_bytes)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="restore")
        try:
            for unit in units:
                waiting.append((unit, pool.submit(action, unit)))
                if len(waiting) > 2 * THREADS:
                    yield self._next(waiting, done)
            while waiting:
                yield self._next(waiting, done)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next(
        self,
        waiting: deque[tuple[Unit, Future[memoryview]]],
        done: Callable[[int], None],
    ) -> tuple[Unit, memoryview]:
        unit, future = waiting.popleft()
        data = future.result()
        done(unit.nbytes)
        if time.monotonic() - self._synced > SYNC_S:
            self._files.sync()
            self._journal.sync()
            self._synced = time.monotonic()
        return unit, data

    def _hold_to_digests(
        self, results: Iterator[tuple[Unit, memoryview]]
    ) -> list[tuple[list[int], str]]:
        """Entries that are not what the manifest says: their units, and names."""
        wrong: list[tuple[list[int], str]] = []
        entry_of: tuple[int, int] | None = None
        digest, seen, units = xxhash.xxh3_64(), 0, list[int]()
        for unit, data in results:
            source, at = self._sources[unit.source], 0
            while at < len(data):
                index = _entry_at(source.table, unit.begin + at, entry_of, unit.source)
                entry = source.table.entries[index]
                if entry_of != (unit.source, index):
                    entry_of = unit.source, index
                    digest, seen, units = xxhash.xxh3_64(), 0, []
                count = min(len(data) - at, entry.nbytes - seen)
                digest.update(data[at : at + count])
                seen, at = seen + count, at + count
                units.append(unit.number)
                if seen == entry.nbytes and digest.hexdigest() != source.digests[index]:
                    wrong.append((units, f"{source.file}: {entry.key}"))
        return wrong


def _entry_at(table: PartTable, begin: int, before: tuple[int, int] | None, source: int) -> int:
    """Place of the entry that holds a byte; not before the one that was last looked at."""
    index = before[1] if before is not None and before[0] == source else 0
    entries = table.entries
    while entries[index].begin + entries[index].nbytes <= begin:
        index += 1
    return index
