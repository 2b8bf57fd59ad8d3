"""`phalanx checkpoint verify`: every checksum, every box once; and what of it can be mended.

A checkpoint that is broken names the file and the shard. With `repair`, files are rebuilt out of
parity or another copy, files under each other's names are told by their checksums and put back, and
a manifest is restored from its backup (and the other way round).
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from phalanx.checkpoint.checksums import check_files, digest_range
from phalanx.checkpoint.coverage import uncovered
from phalanx.checkpoint.manifest import (
    BACKUP,
    BrokenCheckpointError,
    Manifest,
    read_manifest,
)
from phalanx.checkpoint.manifest import NAME as MANIFEST
from phalanx.checkpoint.storage import Storage
from phalanx.checkpoint.tool.mend import Mender
from phalanx.checkpoint.tool.metered import Metered
from phalanx.checkpoint.tool.places import Place, step_of
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.reading import Reader
from phalanx.checkpoint.tool.report import Report, plural, size
from phalanx.checkpoint.tool.state import RESTORING, UNFINISHED, look

OnBytes = Callable[[int], None]
ASIDE = ".misplaced"
"""Ending of a file's name while contents change places."""


@dataclass(kw_only=True)
class Checked:
    """What was found of one checkpoint."""

    folder: str
    state: str
    """complete, broken, unfinished or restoring; mended where a repair left nothing broken."""
    reason: str = ""
    """Why nothing of it could be checked."""
    faults: dict[str, str] = field(default_factory=dict)
    """Broken file to what is wrong with it."""
    ways: dict[str, str] = field(default_factory=dict)
    """Broken file to what it can be mended out of."""
    mended: dict[str, str] = field(default_factory=dict)
    """File to what it was mended out of."""
    failed: dict[str, str] = field(default_factory=dict)
    """File to why mending it failed."""
    manifest: Manifest | None = None

    @property
    def fine(self) -> bool:
        """Whether it can be loaded, and nothing of it is amiss."""
        return self.state in ("complete", "mended")


def verify(
    place: Place,
    *,
    step: int | None = None,
    repair: bool = False,
    other: Place | None = None,
) -> Report:
    """Check one checkpoint, or all of a folder; what is unfinished counts only where it was named.

    Args:
        other: where copies of the same steps are, to repair from.

    Raises:
        ValueError: no such checkpoint, or nothing fits in `other`.
        OSError: the storage cannot be read.
    """
    folders = place.folders() if step is None else [place.one(step)]
    single = place.folder is not None or step is not None
    found: list[Checked] = []
    for folder in folders:
        reader = None if other is None else _copy_of(folder, other)
        found.append(examine(place.storage, folder, repair=repair, other=reader))
    bad = [
        item
        for item in found
        if not item.fine and (single or item.state not in (UNFINISHED, RESTORING))
    ]
    lines = [line for item in found for line in _lines(place, item, repair=repair)]
    return Report(
        lines=lines,
        content={
            "url": place.storage.url,
            "checkpoints": [_content(item) for item in found],
            "fine": not bad,
        },
        fine=not bad,
    )


def examine(
    storage: Storage, folder: str, *, repair: bool = False, other: Reader | None = None
) -> Checked:
    """Check a folder's manifests and files, and mend them if `repair`."""
    listed = look(storage, folder)
    begun = listed.state == UNFINISHED and not storage.exists(f"{folder}/{BACKUP}")
    if begun or listed.state == RESTORING:
        return Checked(folder=folder, state=listed.state, reason=listed.reason)
    readable, faults = _manifests(storage, folder)
    if not readable:
        return Checked(folder=folder, state="broken", reason=faults[MANIFEST], faults=faults)
    found = [_check(storage, folder, manifest) for manifest in readable.values()]
    best = min(found, key=lambda item: len(item.faults))  # a foreign manifest fits no file
    assert best.manifest is not None
    source = next(name for name, manifest in readable.items() if manifest is best.manifest)
    if len(readable) == 2:
        twin = BACKUP if source == MANIFEST else MANIFEST
        if storage.read(f"{folder}/{twin}") != storage.read(f"{folder}/{source}"):
            faults[twin] = f"{twin} is another checkpoint's"
    whole = not best.faults
    if listed.state == UNFINISHED and not whole:  # a save or a deletion ended in between
        return Checked(folder=folder, state=UNFINISHED, reason=listed.reason)
    _find_ways(storage, folder, best, other)
    if repair:
        _mend(storage, folder, best, other)
    for name, why in faults.items():
        best.faults[name] = why
        best.ways[name] = source
        if repair and not best.faults.keys() - faults.keys() - best.mended.keys():
            storage.write(f"{folder}/{name}", [storage.read(f"{folder}/{source}")])
            best.mended[name] = source
    if best.faults and not best.faults.keys() - best.mended.keys():
        best.state = "mended"
    elif best.faults:
        best.state = "broken"
    return best


def _manifests(storage: Storage, folder: str) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Manifests of the folder's step that can be read, by file; and why others cannot."""
    readable: dict[str, Manifest] = {}
    faults: dict[str, str] = {}
    for name in (MANIFEST, BACKUP):
        try:
            manifest = read_manifest(storage, folder, name=name)
        except BrokenCheckpointError as error:
            faults[name] = str(error)
            continue
        if step_of(folder) not in (-1, manifest.step):
            faults[name] = f"{name} is of step {manifest.step}"
            continue
        readable[name] = manifest
    return readable, faults


def _check(storage: Storage, folder: str, manifest: Manifest) -> Checked:
    """Every file against one manifest."""
    gap = uncovered(manifest)
    if gap is not None:  # as it was written: nothing can be mended
        return Checked(folder=folder, state="broken", reason=gap, manifest=manifest)
    with byte_bar(f"checking {folder}", manifest.nbytes) as done:
        metered = Metered(storage, done)
        faults = check_files(metered, folder, manifest, manifest.files)
    state = "broken" if faults else "complete"
    return Checked(folder=folder, state=state, faults=faults, manifest=manifest)


def _find_ways(storage: Storage, folder: str, checked: Checked, other: Reader | None) -> None:
    assert checked.manifest is not None
    for name, source in misplaced(storage, folder, checked).items():
        checked.ways[name] = source
    broken = [name for name in checked.faults if name not in checked.ways]
    mender = Mender(storage, folder, checked.manifest, broken=broken, other=other)
    checked.ways |= mender.mendable()


def misplaced(storage: Storage, folder: str, checked: Checked) -> dict[str, str]:
    """Broken file to the broken file that has its content."""
    assert checked.manifest is not None
    files = checked.manifest.files
    sizes = {files[name].size for name in checked.faults}
    contents: dict[str, str] = {}
    for name in checked.faults if len(checked.faults) > 1 else ():
        with suppress(OSError):
            there = storage.size(f"{folder}/{name}")
            if there in sizes:
                contents[digest_range(storage, f"{folder}/{name}", 0, there)] = name
    found = {name: contents.get(files[name].xxh3_64) for name in checked.faults}
    return {name: source for name, source in found.items() if source is not None}


def _mend(storage: Storage, folder: str, checked: Checked, other: Reader | None) -> None:
    """Mend what can be mended."""
    assert checked.manifest is not None
    files = checked.manifest.files
    moved = {n: source for n, source in checked.ways.items() if source in files}
    for name, source in moved.items():  # all aside before any is overwritten
        content = _pieces(storage, f"{folder}/{source}", files[name].size)
        storage.write(f"{folder}/{name}{ASIDE}", content)
    for name in moved:
        aside = f"{folder}/{name}{ASIDE}"
        storage.write(f"{folder}/{name}", _pieces(storage, aside, files[name].size))
        storage.delete(aside)
    checked.mended |= moved
    broken = [name for name in checked.faults if name not in moved]
    mender = Mender(storage, folder, checked.manifest, broken=broken, other=other)
    total = sum(files[name].size for name in mender.mendable())
    with byte_bar(f"mending {folder}", total) as done:
        mended, checked.failed = mender.mend(on_bytes=done)
    checked.mended |= mended


def _pieces(storage: Storage, path: str, count: int) -> Any:
    buffer = memoryview(bytearray(min(count, 8 << 20)))
    for at in range(0, count, 8 << 20):
        view = buffer[: min(len(buffer), count - at)]
        storage.read_into(path, at, view)
        yield view


def _copy_of(folder: str, other: Place) -> Reader | None:
    """What `other` has of the same step."""
    step = step_of(folder)
    fitting = [name for name in other.folders() if step in (-1, step_of(name))]
    for name in fitting:
        with suppress(BrokenCheckpointError):
            return Reader(other.storage, name, read_manifest(other.storage, name))
    return None


def _lines(place: Place, item: Checked, *, repair: bool) -> list[str]:
    url = place.url(item.folder)
    if item.state == "complete":
        assert item.manifest is not None
        files, nbytes = len(item.manifest.files), item.manifest.nbytes
        return [f"{url}: complete, {plural(files, 'file')} of {size(nbytes)} hold their checksums"]
    lines = [f"{url}: {item.state}" + (f": {item.reason}" if item.reason else "")]
    if item.reason:
        return lines
    for name, why in item.faults.items():
        if name in item.mended:
            lines.append(f"  {why}; mended from {item.mended[name]}")
        elif name in item.failed:
            lines.append(f"  {why}; mending failed: {item.failed[name]}")
        elif name in item.ways:
            lines.append(f"  {why}; --repair can mend it from {item.ways[name]}")
        else:
            lines.append(f"  {why}; cannot be mended from parity")
    left = item.faults.keys() - item.mended.keys()
    if left and not left - item.ways.keys() and not repair:
        lines.append(f"  mend all: phalanx checkpoint verify --repair {url}")
    elif left:
        lines.append("  what is left needs another copy: --repair --from OTHER, in any layout")
    return lines


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
    }
