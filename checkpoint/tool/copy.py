"""A checkpoint file by file into a storage that takes only whole files.

What an interruption costs is the files under way. The journal is a file like the others, written
anew after each of them.
"""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from phalanx.checkpoint.manifest import (
    BrokenCheckpointError,
    StoredParity,
    StoredPart,
    write_manifest,
)
from phalanx.checkpoint.storage import Bytes
from phalanx.checkpoint.tool.journal import NAME as JOURNAL
from phalanx.checkpoint.tool.journal import VERSION
from phalanx.checkpoint.tool.plan import Plan, Restored
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.restore import THREADS

READ_BYTES = 8 << 20


def restore_by_files(plan: Plan) -> Restored:
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
            plan.target.write(f"{plan.name}/{file.file}", _content(plan, file), on_bytes=bar)
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


def _content(plan: Plan, file: StoredPart | StoredParity) -> Iterator[Bytes]:
    """A file's bytes; an error instead of an end where they are not what the manifest says."""
    digest = xxhash.xxh3_64()
    for at in range(0, file.size, READ_BYTES):
        piece = memoryview(bytearray(min(READ_BYTES, file.size - at)))
        plan.source.read_into(f"{plan.folder}/{file.file}", at, piece)
        digest.update(piece)
        yield piece
    if digest.hexdigest() != file.xxh3_64:
        raise BrokenCheckpointError(
            f"{plan.url}: {file.file} has checksum {digest.hexdigest()} instead of "
            f"{file.xxh3_64}; look with `phalanx checkpoint verify {plan.url}`, whose --repair "
            "may mend it, then run this restore again"
        )


def _noted(plan: Plan, journal: str) -> list[str]:
    """Files that an earlier call has written whole."""
    facts = plan.facts() | {"journal": VERSION}
    if not plan.target.exists(journal):
        _note(plan, journal, [])
        return []
    try:
        before: dict[str, Any] = json.loads(plan.target.read(journal))
    except ValueError:
        raise ValueError(
            f"{plan.target.url}/{journal} cannot be read; delete that folder and start anew"
        ) from None
    for key, value in facts.items():
        if before.get(key) != value:
            raise ValueError(
                f"{plan.target.url}/{plan.name}: a restore with {key}={before.get(key)!r} goes on "
                f"here, not one with {key}={value!r}; give the same arguments, or delete the folder"
            )
    return list(before["files"])


def _note(plan: Plan, journal: str, files: list[str]) -> None:
    facts = plan.facts() | {"journal": VERSION, "files": files}
    plan.target.write(journal, [json.dumps(facts).encode() + b"\n"])


def _stands(plan: Plan, file: StoredPart | StoredParity, done: list[str]) -> bool:
    """Whether a file was noted and is there; storages of this kind hold whole files only."""
    if file.file not in done:
        return False
    try:
        return plan.target.size(f"{plan.name}/{file.file}") == file.size
    except FileNotFoundError:
        return False
