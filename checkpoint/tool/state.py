"""What state a checkpoint's folder is in, by its manifest and the sizes of its files."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.folders import stands_by_backup
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.format.manifest import Manifest, read_manifest
from phalanx.checkpoint.format.stored import StoredFile
from phalanx.checkpoint.storage.base import REMOVE, NotAFileError, Storage
from phalanx.checkpoint.tool.places import step_of
from phalanx.checkpoint.tool.restore.journal import NAME as JOURNAL

THREADS = 16
NO_FOLDER = f"is a file, not a folder; {REMOVE}"
COMPLETE, BROKEN, UNFINISHED, RESTORING = "complete", "broken", "unfinished", "restoring"
"""States of a folder: whole by its sizes; with a manifest, or its backup alone, but not what that
says; without one; the target of a restore that can go on."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A checkpoint's folder, as far as its manifest and its files' sizes tell."""

    folder: str
    step: int
    state: str
    reason: str = ""
    """Why it is not complete."""
    manifest: Manifest | None = None
    """Where it can be read."""

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = {
            "folder": self.folder,
            "step": self.step,
            "state": self.state,
            "reason": self.reason or None,
        }
        manifest = self.manifest
        if manifest is None:
            return found
        return found | {
            "time": manifest.time,
            "bytes": manifest.nbytes,
            "layout": manifest.meta.get("layout"),
            "kind": manifest.meta.get("kind"),
            "world_size": manifest.world_size,
            "files": len(manifest.files),
            "parity": manifest.num_parity if manifest.parity else 0,
            "groups": [list(group) for group in manifest.groups],
        }


def look(storage: Storage, folder: str) -> Listed:
    """The state of one folder."""
    step = step_of(folder)
    try:
        names = storage.names(folder)
    except NotADirectoryError:
        return Listed(folder=folder, step=step, state=BROKEN, reason=NO_FOLDER)
    if MANIFEST not in names:
        if JOURNAL in names:
            reason = "run its restore again, and it goes on"
            return Listed(folder=folder, step=step, state=RESTORING, reason=reason)
        if (backup := stands_by_backup(storage, folder)) is not None:
            reason = f"{MANIFEST} is missing; its backup stands"
            return Listed(folder=folder, step=step, state=BROKEN, reason=reason, manifest=backup)
        reason = f"no {MANIFEST}: the save did not end, or still runs"
        return Listed(folder=folder, step=step, state=UNFINISHED, reason=reason)
    try:
        manifest = read_manifest(storage, folder)
    except BrokenCheckpointError as error:
        return Listed(folder=folder, step=step, state=BROKEN, reason=str(error))
    reason = wrong_sizes(storage, folder, manifest)
    if step not in (-1, manifest.step):
        reason = f"{MANIFEST} is of step {manifest.step}"
    state = BROKEN if reason else COMPLETE
    return Listed(folder=folder, step=manifest.step, state=state, reason=reason, manifest=manifest)


def wrong_sizes(storage: Storage, folder: str, manifest: Manifest) -> str:
    """Which file is missing or of another size; "" where all are as they should be."""
    wrong = wrong_files(storage, folder, manifest.files.values())
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return next(iter(wrong.values())) + more if wrong else ""


def wrong_files(storage: Storage, folder: str, files: Iterable[StoredFile]) -> dict[str, str]:
    """Files that are missing or of another size, and which it is; none is read."""

    def look_at(file: StoredFile) -> str:
        try:
            size = storage.size(f"{folder}/{file.file}")
        except NotAFileError as error:
            return f"{file.file} {error.strerror}"
        except FileNotFoundError:
            return f"{file.file} is missing"
        if size == file.size:
            return ""
        return f"{file.file} has {size} bytes, not {file.size}"

    files = list(files)
    with ThreadPoolExecutor(THREADS) as pool:  # far away, each question takes a while
        answers = pool.map(look_at, files)
        return {file.file: why for file, why in zip(files, answers, strict=True) if why}
