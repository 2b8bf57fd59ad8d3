"""Where a restore reads, where it writes, and what it says."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.folders import complete_folders, folder_name
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.format.manifest import Manifest, read_manifest
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.metered import Metered
from phalanx.checkpoint.storage.rate_limit import RateLimit
from phalanx.checkpoint.tool.places import CheckpointPlace, step_of, target
from phalanx.checkpoint.tool.report import Outcome, layout_of, plural, size
from phalanx.checkpoint.tool.restore.copy import restore_by_files
from phalanx.checkpoint.tool.restore.journal import NAME as JOURNAL
from phalanx.checkpoint.tool.restore.plan import SAME, Cutting, Restored, RestorePlan
from phalanx.checkpoint.tool.restore.recut import restore_to_folder

Cut = Callable[[Manifest], Cutting]
"""How another layout cuts the tensors of a checkpoint."""


def restore(
    source: CheckpointPlace,
    where: str,
    *,
    config: StorageConfig | None = None,
    step: int | None = None,
    cut: Cut | None = None,
    staging: Path | None = None,
    limit_mb_s: float = 0.0,
    dry_run: bool = False,
) -> Outcome:
    """Restore a checkpoint into a folder of checkpoints, or into `step_...` of one.

    Args:
        cut: None = tensors stay cut as they are.
        staging: a folder here where tensors are cut on their way to a storage that takes whole
            files only.
        limit_mb_s: most megabytes a second that are read; 0 = no limit.
        dry_run: say what would be done.

    Raises:
        ValueError: source, target and step do not fit, or staging is missing.
        BrokenCheckpointError: a file or shard is not what the source's manifest says, or that is
            damaged, or a broken checkpoint stands where this one is to.
        OSError: the source cannot be read or the target not written; what stands stays.
    """
    storage, name = target(where, config)
    folder = source.one(step if step is not None else _going_on(source, storage, name))
    manifest = source.manifest(folder)
    if name is None:
        name = folder_name(manifest.step)
    elif step_of(name) != manifest.step:
        raise ValueError(
            f"{where}: {source.url(folder)} is of step {manifest.step}, so its folder is called "
            f"{folder_name(manifest.step)}"
        )
    limit = RateLimit(limit_mb_s * 1e6)
    plan = RestorePlan(
        url=source.url(folder),
        source=Metered(source.storage, lambda _: None, limit=limit),
        folder=folder,
        manifest=manifest,
        cutting=SAME if cut is None else cut(manifest),
        target=storage,
        name=name,
    )
    if _stands(plan):
        line = f"{storage.url}/{name}: stands already, nothing to do"
        return Outcome(lines=[line], content=_content(plan, None) | {"state": "complete"})
    _refuse_a_save(plan)
    if dry_run:
        return _forecast(plan)
    if storage.local is not None:
        done = restore_to_folder(plan, storage.local)
    elif cut is None:
        done = restore_by_files(plan)
    else:
        done = _staged(plan, staging, config)
    return Outcome(lines=_said(plan, done), content=_content(plan, done) | {"state": "complete"})


def _said(plan: RestorePlan, done: Restored) -> list[str]:
    """What a restore has done."""
    lines = [
        f"restored {plan.url}",
        f"      to {plan.target.url}/{plan.name}: {_what(done.manifest)}, every shard checked",
        f"  {size(done.moved)} read"
        + (f", {size(done.stood)} stood from earlier calls" if done.stood else ""),
    ]
    if plan.cutting.tables is not None and plan.manifest.num_parity:
        lines.append("  without parity: its files are those of the layout it was saved in")
    return lines


def _going_on(source: CheckpointPlace, storage: Storage, name: str | None) -> int | None:
    """The step of the one restore that was interrupted here, though the source may have newer."""
    if source.folder is not None or name is not None:
        return None
    begun = [
        step_of(folder)
        for folder in storage.names()
        if step_of(folder) >= 0
        and storage.exists(f"{folder}/{JOURNAL}")
        and not storage.exists(f"{folder}/{MANIFEST}")
    ]
    return begun[0] if len(begun) == 1 and begun[0] in complete_folders(source.storage) else None


def _stands(plan: RestorePlan) -> bool:
    """Whether the target holds just what is to be restored.

    Raises:
        ValueError: it holds another checkpoint.
        BrokenCheckpointError: it holds a broken one.
    """
    if not plan.target.exists(f"{plan.name}/{MANIFEST}"):
        return False
    place = f"{plan.target.url}/{plan.name}"
    try:
        there = read_manifest(plan.target, plan.name)
    except BrokenCheckpointError as error:
        raise BrokenCheckpointError(
            f"{place}: a broken checkpoint stands there ({error})"
        ) from None
    wanted = plan.finished(
        StoredPart(file=t.file, size=t.size, xxh3_64="", table=t.table, digests=t.digests)
        for t in plan.targets
    )
    same = [
        (m.step, m.time, m.meta, [(part.file, part.table) for part in m.parts])
        for m in (there, wanted)
    ]
    if same[0] != same[1]:
        raise ValueError(
            f"{place}: another complete checkpoint stands there; name another folder, or delete it"
        )
    plan.target.delete(f"{plan.name}/{JOURNAL}")  # a kill between the manifest and this
    return True


def _refuse_a_save(plan: RestorePlan) -> None:
    """Whether what is there may be a save that runs, or ended half-way.

    Raises:
        ValueError: it may.
    """
    names = plan.target.names(plan.name)
    if names and JOURNAL not in names:
        raise ValueError(
            f"{plan.target.url}/{plan.name}: holds files of a save that did not end, or still "
            "runs; name another folder, or delete it"
        )


def _staged(plan: RestorePlan, staging: Path | None, config: StorageConfig | None) -> Restored:
    """Cut here, then copy file by file."""
    place = f"{plan.target.url}/{plan.name}"
    if staging is None:
        raise ValueError(
            f"{place}: takes whole files only; name a folder on this machine, with room for "
            f"{size(plan.nbytes)}, where tensors are cut: --staging FOLDER"
        )
    here, _ = target(str(staging), config)
    if here.local is None:
        raise ValueError(f"--staging {staging}: must be a folder of this machine")
    local = replace(plan, target=here)
    cut_here = (
        Restored(stood=plan.nbytes, moved=0, manifest=read_manifest(here, plan.name))
        if _stands(local)
        else restore_to_folder(local, here.local)
    )
    copied = restore_by_files(
        replace(
            plan,
            source=here,
            folder=plan.name,
            manifest=cut_here.manifest,
            cutting=SAME,
        )
    )
    here.delete(plan.name)
    return replace(cut_here, manifest=copied.manifest)


def _forecast(plan: RestorePlan) -> Outcome:
    """What a restore would do."""
    total = sum(stream.size for stream in plan.targets)
    layout = plan.cutting.text or "as it is"
    lines = [
        f"would restore {plan.url}",
        f"           to {plan.target.url}/{plan.name}",
        f"  {_what(plan.manifest)}, layout {layout_of(plan.manifest)} -> {layout}",
        f"  {size(plan.nbytes)} to read, {plural(len(plan.targets), 'file')} to write",
    ]
    free, begun = None, False
    if plan.target.local is not None:
        free = shutil.disk_usage(_standing(plan.target.local)).free
        begun = (plan.target.local / plan.name / JOURNAL).exists()
        if begun:
            lines.append("  a restore was interrupted there and goes on, if it is this one")
        elif free < total:
            lines.append(f"  no room: {size(free)} free, {size(total)} needed")
    fine = free is None or free >= total or begun
    content = _content(plan, None) | {"state": "dry run", "free_bytes": free}
    return Outcome(lines=lines, content=content, fine=fine)


def _standing(folder: Path) -> Path:
    return folder if folder.exists() else _standing(folder.absolute().parent)


def _what(manifest: Manifest) -> str:
    files = plural(len(manifest.files), "file")
    return f"step {manifest.step}, {files}, {size(manifest.nbytes)}"


def _content(plan: RestorePlan, done: Restored | None) -> dict[str, Any]:
    return {
        "source": plan.url,
        "target": f"{plan.target.url}/{plan.name}",
        "step": plan.manifest.step,
        "layout": plan.cutting.layout or plan.manifest.meta.get("layout"),
        "bytes": plan.nbytes,
        "moved_bytes": 0 if done is None else done.moved,
        "stood_bytes": 0 if done is None else done.stood,
    }
