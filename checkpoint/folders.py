"""The folder of checkpoints: names, what is complete, what is kept, safe replacing and deleting.

`step_00000100/` is the checkpoint of step 100, complete when it holds a manifest. While a complete
one is saved anew, the old stands beside it as `step_00000100.replaced/` and still counts.
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from phalanx.checkpoint.manifest import NAME as MANIFEST
from phalanx.checkpoint.manifest import fsync_folder

REPLACED = ".replaced"


def folder_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step_{step:08d}"


def complete_folders(root: Path) -> dict[int, Path]:
    """Folders that hold a manifest, by step, oldest first."""
    found: dict[int, Path] = {}
    for step, folder in sorted(_folders(root)):  # a .replaced one sorts after its successor
        if (folder / MANIFEST).exists():
            found.setdefault(step, folder)
    return found


def prepare_folder(root: Path, step: int, *, broken: bool) -> Path:
    """An empty folder to save `step` to; what stood there is moved aside while it is worth it.

    Args:
        broken: what stands there is known to be broken, so it is not kept.
    """
    target = root / folder_name(step)
    root.mkdir(parents=True, exist_ok=True)
    if (target / MANIFEST).exists() and not broken:
        aside = target.with_name(target.name + REPLACED)
        _delete(aside)
        target.rename(aside)
    _delete(target)
    target.mkdir()
    fsync_folder(root)
    return target


def prune(
    root: Path, *, saved: int, keep: int, keep_every: int, rejected: Collection[int]
) -> tuple[list[str], list[str]]:
    """Delete what need not be kept, now that the checkpoint of step `saved` is complete.

    The newest `keep` (0 = all) are kept, those at multiples of `keep_every`, `saved` itself, and
    step 0 (imported weights); rejected ones are not, and leftovers without a manifest go.

    Returns:
        Names of the deleted folders, and why others could not be deleted.
    """
    complete = complete_folders(root)
    good = sorted(step for step in complete if step not in rejected or step == saved)
    kept = {0, saved, *good[-keep:]}
    if keep_every:
        kept |= {step for step in good if step % keep_every == 0}
    if keep == 0:
        kept |= complete.keys()
    deleted: list[str] = []
    problems: list[str] = []
    for step, folder in sorted(_folders(root)):
        if step in kept and complete.get(step) == folder:
            continue
        try:
            _delete(folder)
            deleted.append(folder.name)
        except OSError as error:  # the new checkpoint stands; this only costs space
            problems.append(f"{folder.name}: {error}")
    return deleted, problems


def _folders(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    pattern = re.compile(rf"step_(\d{{8,}})({re.escape(REPLACED)})?")
    matches = ((pattern.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]


def _delete(folder: Path) -> None:
    """Remove a folder, its manifest first, so that it never counts while half of it is gone."""
    if not folder.exists():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)
