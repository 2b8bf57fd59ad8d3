"""A checkpoint file by file into a storage that takes only whole files.

What an interruption costs is the files under way. The journal is a file like the others, written
anew after each of them.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.checksums import check_file, held_to, read_range
from phalanx.checkpoint.format.manifest import write_manifest
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.storage.base import ShortFileError
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.restore.journal import NAME as JOURNAL
from phalanx.checkpoint.tool.restore.journal import begun
from phalanx.checkpoint.tool.restore.plan import Restored, RestorePlan
from phalanx.checkpoint.tool.restore.recut import THREADS


def restore_by_files(plan: RestorePlan) -> Restored:
    """Copy every file that does not stand yet, then the manifest.

    Raises:
        ValueError: another restore began in that folder.
        BrokenCheckpointError: a file is not what the source's manifest says.
        OSError: the source cannot be read or the target not written; whole files stay.
    """
    assert plan.cutting.tables is None
    journal = f"{plan.name}/{JOURNAL}"
    done = _noted(plan, journal)
    standing = {file.file for file in plan.manifest.files.values() if _stands(plan, file, done)}
    left = [file for name, file in plan.manifest.files.items() if name not in standing]
    stood = plan.manifest.nbytes - sum(file.size for file in left)
    lock, finished = threading.Lock(), sorted(standing)
    with (
        byte_bar(f"restoring {plan.name}", plan.manifest.nbytes) as bar,
        ThreadPoolExecutor(THREADS, thread_name_prefix="restore") as pool,
    ):
        bar(stood)

        def copy(file: StoredPart | StoredParity) -> None:
            _copy(plan, file, bar)
            with lock:
                finished.append(file.file)
                _note(plan, journal, finished)

        futures = [pool.submit(copy, file) for file in left]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_manifest(plan.target, plan.name, plan.manifest)
    plan.target.delete(journal)
    moved = plan.manifest.nbytes - stood
    return Restored(stood=stood, moved=moved, manifest=plan.manifest)


def _copy(
    plan: RestorePlan, file: StoredPart | StoredParity, on_bytes: Callable[[int], None]
) -> None:
    pieces = read_range(plan.source, f"{plan.folder}/{file.file}", 0, file.size)
    content = held_to(file.xxh3_64, pieces, what=file.file)
    try:
        plan.target.write(f"{plan.name}/{file.file}", content, on_bytes=on_bytes)
    except (BrokenCheckpointError, FileNotFoundError, ShortFileError):
        why = check_file(plan.source, plan.folder, file)  # names the shard
        if why is None:
            raise
        raise BrokenCheckpointError(f"{plan.url}: {why}; {plan.advice}") from None


def _noted(plan: RestorePlan, journal: str) -> list[str]:
    """Files that an earlier call has written whole."""
    if not plan.target.exists(journal):
        _note(plan, journal, [])
        return []
    before: object = None
    with suppress(ValueError):
        before = json.loads(plan.target.read(journal))
    folder = f"{plan.target.url}/{plan.name}"
    return list(begun(before, plan.facts(), folder=folder, own="files", kind=list)["files"])


def _note(plan: RestorePlan, journal: str, files: list[str]) -> None:
    facts = plan.facts() | {"files": files}
    plan.target.write(journal, [json.dumps(facts).encode() + b"\n"])


def _stands(plan: RestorePlan, file: StoredPart | StoredParity, done: list[str]) -> bool:
    """Whether a file was noted and is there; storages of this kind hold whole files only."""
    if file.file not in done:
        return False
    try:
        return plan.target.size(f"{plan.name}/{file.file}") == file.size
    except FileNotFoundError:
        return False
