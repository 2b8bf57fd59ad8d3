"""`phalanx checkpoint verify`: every checksum, every box once; and what of it can be mended.

A checkpoint that is broken names the file and the shard. With `repair`, files are rebuilt out of
parity or another copy, files under each other's names are told by their checksums and put back, and
a manifest is restored from its backup (and the other way round).
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.checksums import check_files
from phalanx.checkpoint.format.coverage import uncovered
from phalanx.checkpoint.format.manifest import BACKUP, Manifest, read_manifest
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.storage.base import REMOVE, NotAFileError, Storage
from phalanx.checkpoint.storage.metered import Metered
from phalanx.checkpoint.tool.places import CheckpointPlace, step_of
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.reading import Reader
from phalanx.checkpoint.tool.repair.repair import MENDED, Checked, find_ways, mend
from phalanx.checkpoint.tool.report import Outcome, plural, size
from phalanx.checkpoint.tool.state import BROKEN, COMPLETE, NO_FOLDER, RESTORING, UNFINISHED, look


def verify(
    place: CheckpointPlace,
    *,
    step: int | None = None,
    repair: bool = False,
    other: CheckpointPlace | None = None,
) -> Outcome:
    """Check one checkpoint, or all of a folder; what is unfinished counts only where it was named.

    Args:
        other: where copies of the same steps are, to repair from.

    Raises:
        ValueError: no such checkpoint.
        OSError: the storage cannot be read.
    """
    folders = place.folders() if step is None else [place.one(step)]
    single = place.folder is not None or step is not None
    found: list[Checked] = []
    lines: list[str] = []
    for folder in folders:
        reader = None if other is None else _copy_of(folder, other)
        item = examine(place.storage, folder, repair=repair, other=reader, named=single)
        found.append(item)
        lines += _lines(place, item, repair=repair)
        if other is not None and reader is None and not item.fine:
            lines.append(f"  {other.text} has no checkpoint of step {step_of(folder)} to mend from")
    bad = [
        item
        for item in found
        if not item.fine and (single or item.state not in (UNFINISHED, RESTORING))
    ]
    if not found:
        lines.append(f"{place.storage.url}: no checkpoints yet")
    return Outcome(
        lines=lines,
        content={
            "url": place.storage.url,
            "checkpoints": [_content(item) for item in found],
            "fine": not bad,
        },
        fine=not bad,
    )


def examine(
    storage: Storage,
    folder: str,
    *,
    repair: bool = False,
    other: Reader | None = None,
    named: bool = False,
) -> Checked:
    """Check a folder's manifests and files, and mend them if `repair`: all that can be mended.

    Args:
        named: whether just this one was asked for; then it is tried even where it looks as if its
            save or its deletion did not end.
    """
    listed = look(storage, folder)
    done = listed.state == RESTORING or listed.reason == NO_FOLDER
    if done or (listed.state == UNFINISHED and not named):
        return Checked(folder=folder, state=listed.state, reason=listed.reason)
    readable, faults = _manifests(storage, folder)
    found = {name: _check(storage, folder, manifest) for name, manifest in readable.items()}
    # Where the two differ, a stranger's fits no file.
    source, best = min(
        found.items(),
        key=lambda item: (bool(item[1].reason), len(item[1].faults)),
        default=("", Checked(folder=folder, state=BROKEN, reason=_neither(faults))),
    )
    if best.manifest is None:
        if listed.state == UNFINISHED:
            return Checked(folder=folder, state=UNFINISHED, reason=listed.reason)
        return best
    faults |= {name: f"{name} is another one's" for name in readable if name != source}
    find_ways(storage, folder, best, other)
    best.ways |= dict.fromkeys(faults, source)
    if repair:
        mend(storage, folder, best, other)
        others = [item for name, item in found.items() if name != source]
        if best.left and others and (_fits_none(best) or not all(map(_fits_none, others))):
            best.failed |= dict.fromkeys(faults, "which of the two is right is not clear")
        else:
            _mend_manifests(storage, best, faults)
    best.faults |= faults
    if best.faults:
        best.state = BROKEN if best.left or best.reason else MENDED
    return best


def _neither(faults: dict[str, str]) -> str:
    """Why no manifest can be had, and what to do."""
    return "; ".join([*faults.values(), "another copy of this checkpoint is needed"])


def _fits_none(item: Checked) -> bool:
    """Whether no file was what this manifest says."""
    return item.manifest is not None and len(item.faults) == len(item.manifest.files)


def _mend_manifests(storage: Storage, checked: Checked, names: Iterable[str]) -> None:
    """Write the one manifest in place of the other."""
    for name in names:
        source = f"{checked.folder}/{checked.ways[name]}"
        try:
            storage.write(f"{checked.folder}/{name}", [storage.read(source)])
        except OSError as error:
            checked.failed[name] = str(error)
        else:
            checked.mended[name] = checked.ways[name]


def _manifests(storage: Storage, folder: str) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Manifests of the folder's step, by file (one if both are alike); why others are not."""
    readable: dict[str, Manifest] = {}
    faults: dict[str, str] = {}
    texts: dict[str, bytes] = {}
    for name in (MANIFEST, BACKUP):
        try:
            texts[name] = storage.read(f"{folder}/{name}")
        except NotAFileError as error:
            faults[name] = f"{name} {error.strerror}"
            continue
        except FileNotFoundError:
            faults[name] = f"{name} is missing"
            continue
        if name == BACKUP and readable and texts[name] == texts[MANIFEST]:
            continue
        try:
            manifest = read_manifest(storage, folder, name=name)
        except BrokenCheckpointError as error:
            faults[name] = str(error)
            continue
        if step_of(folder) in (-1, manifest.step):
            readable[name] = manifest
        else:
            faults[name] = f"{name} is of step {manifest.step}"
    return readable, faults


def _check(storage: Storage, folder: str, manifest: Manifest) -> Checked:
    """Every file against one manifest."""
    gap = uncovered(manifest) or ""  # as it was written: no repair makes it whole
    with byte_bar(f"checking {folder}", manifest.nbytes) as done:
        metered = Metered(storage, done)
        faults = check_files(metered, folder, manifest, manifest.files)
    state = BROKEN if faults or gap else COMPLETE
    return Checked(folder=folder, state=state, reason=gap, faults=faults, manifest=manifest)


def _copy_of(folder: str, other: CheckpointPlace) -> Reader | None:
    """What `other` has of the same step."""
    step = step_of(folder)
    fitting = [name for name in other.folders() if step in (-1, step_of(name))]
    for name in fitting:
        with suppress(BrokenCheckpointError):
            return Reader(other.storage, name, read_manifest(other.storage, name))
    return None


def _lines(place: CheckpointPlace, item: Checked, *, repair: bool) -> list[str]:
    url = place.url(item.folder)
    if item.state == COMPLETE:
        assert item.manifest is not None
        files, nbytes = len(item.manifest.files), item.manifest.nbytes
        return [f"{url}: complete, {plural(files, 'file')} of {size(nbytes)} hold their checksums"]
    lines = [f"{url}: {item.state}" + (f": {item.reason}" if item.reason else "")]
    for name, why in item.faults.items():
        if name in item.mended:
            lines.append(f"  {why}; mended from {item.mended[name]}")
        elif name in item.failed and why.endswith(REMOVE):
            lines.append(f"  {why}")
        elif name in item.failed:
            lines.append(f"  {why}; mending failed: {item.failed[name]}")
        elif name in item.ways:
            lines.append(f"  {why}; --repair can mend it from {item.ways[name]}")
        else:
            lines.append(f"  {why}; cannot be mended from parity")
    return lines + _advice(item, url, repair=repair)


def _advice(item: Checked, url: str, *, repair: bool) -> list[str]:
    """What to do next about what is left."""
    left = item.left
    if not left:
        return []
    other = "  what is left needs another copy: --repair --from OTHER, in any layout"
    if repair:
        needy = [name for name in left if not item.faults[name].endswith(REMOVE)]
        again = f"  remove what is no file and repair again: {_command(url)}"
        advice = ([other] if needy else []) + ([again] if len(needy) < len(left) else [])
        return [f"  mended {len(item.mended)} of {len(item.faults)}", *advice]
    mendable = sum(name in item.ways for name in left)
    what = "all" if mendable == len(left) else f"{mendable} of {len(left)}"
    command = [f"  mend {what}: {_command(url)}"] if mendable else []
    return command if what == "all" else [*command, other]


def _command(url: str) -> str:
    return f"phalanx checkpoint verify --repair {url}"


def _content(item: Checked) -> dict[str, Any]:
    return {
        "folder": item.folder,
        "step": step_of(item.folder) if item.manifest is None else item.manifest.step,
        "state": item.state,
        "reason": item.reason or None,
        "files": [
            {
                "file": name,
                "reason": why,
                "mendable_from": item.ways.get(name),
                "mended_from": item.mended.get(name),
                "mending_failed": item.failed.get(name),
            }
            for name, why in item.faults.items()
        ],
        "left": item.left,
    }
