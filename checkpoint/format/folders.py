"""The folders of checkpoints: names, what is complete, what is kept, safe replacing and deleting.

`step_00000100/` is the checkpoint of step 100, complete when it holds a manifest. The step is saved
anew to `step_00000100.r1/`, then `.r2/`, ...: the highest complete one counts and the others go
once it stands. Nothing is renamed, so that object stores do the same.
Torch-free.
"""

import re
from collections.abc import Collection

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import BACKUP, Manifest, read_manifest
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.storage.base import Storage

PATTERN = re.compile(r"step_(\d{8,})(?:\.r([1-9]\d*))?")


def folder_name(step: int, *, revision: int = 0) -> str:
    """Name of the folder of a step; `revision` counts how often it was saved anew."""
    return f"step_{step:08d}" + (f".r{revision}" if revision else "")


def step_folders(storage: Storage) -> list[tuple[int, str]]:
    """Steps and names of all folders of checkpoints, complete or not; what counts stands last."""
    matches = [PATTERN.fullmatch(name) for name in storage.names()]
    found = sorted((int(match[1]), int(match[2] or 0), match[0]) for match in matches if match)
    return [(step, name) for step, _, name in found]


def is_complete(storage: Storage, folder: str) -> bool:
    """Whether a folder holds a manifest."""
    return storage.exists(f"{folder}/{MANIFEST}")


def stands_by_backup(storage: Storage, folder: str) -> Manifest | None:
    """The backup of a manifest that is missing, where every file is there; else None.

    Then the manifest was lost: deleting a folder begins with the backup, and a save that dies
    leaves one only where it had written all else.

    Raises:
        OSError: the storage cannot be read.
    """
    try:
        backup = read_manifest(storage, folder, name=BACKUP)
    except BrokenCheckpointError:
        return None
    names = storage.names(folder)
    lost = MANIFEST not in names and set(names).issuperset(backup.files)
    return backup if lost else None


def complete_folders(storage: Storage) -> dict[int, str]:
    """Names of the folders that hold a manifest, by step, oldest first.

    Raises:
        OSError: the storage cannot be read.
    """
    return {step: name for step, name in step_folders(storage) if is_complete(storage, name)}


def prepare_folder(storage: Storage, step: int) -> str:
    """Name of an empty folder to save `step` to, which was never saved to.

    What there is of the step stays until `prune`. A complete checkpoint may have to be repaired;
    and into one that was begun, a holder of the run that died may still be writing.

    Raises:
        OSError: the storage cannot be read, or a leftover cannot be deleted.
    """
    revision = 0
    for name in (name for found, name in step_folders(storage) if found == step):
        match = PATTERN.fullmatch(name)
        assert match is not None
        revision = int(match[2] or 0) + 1
    target = folder_name(step, revision=revision)
    storage.delete(target)  # leftovers, be they uploads that no listing shows
    return target


def remove_folder(storage: Storage, name: str) -> None:
    """Delete a folder, its manifests first: it never counts while half of it is gone.

    The backup goes before the manifest: without that, it would look as if it could be mended.

    Raises:
        OSError: something could not be deleted.
    """
    storage.delete(f"{name}/{BACKUP}")
    storage.delete(f"{name}/{MANIFEST}")
    storage.delete(name)


def prune(
    storage: Storage, *, saved: int, keep: int, keep_every: int, rejected: Collection[int]
) -> tuple[list[str], list[str]]:
    """Delete what need not be kept, now that the checkpoint of step `saved` is complete.

    The newest `keep` (0 = all) are kept, those at multiples of `keep_every`, `saved` itself, and
    step 0 (imported weights); those that were saved anew are not. Rejected ones count for nothing
    and go once they are older than the newest `keep`: until then they may be mended. So do those
    that lost their manifest but have its backup. Other folders without a manifest go up to
    `saved`; beyond, they may be in the making.

    Returns:
        Names of the deleted folders, and why others could not be deleted.

    Raises:
        OSError: the storage cannot be read.
    """
    complete = complete_folders(storage)
    good = [step for step in complete if step not in rejected or step == saved]
    kept = {0, saved, *good[-keep:]}
    kept |= {step for step in complete if step in rejected and step > min(good[-keep:])}
    if keep_every:
        kept |= {step for step in good if step % keep_every == 0}
    if keep == 0:
        kept |= complete.keys()

    def mendable(step: int, name: str) -> bool:
        wanted = not keep or step == 0 or step > min(good[-keep:])
        wanted = wanted or bool(keep_every and step % keep_every == 0)
        return wanted and step not in complete and stands_by_backup(storage, name) is not None

    deleted: list[str] = []
    problems: list[str] = []
    for step, name in step_folders(storage):
        counts = complete.get(step) == name
        if (counts and step in kept) or (step > saved and not is_complete(storage, name)):
            continue
        if mendable(step, name):
            continue
        try:
            remove_folder(storage, name)
            deleted.append(name)
        except OSError as error:  # the new checkpoint stands; this only costs space
            problems.append(f"{name}: {error}")
    return deleted, problems
