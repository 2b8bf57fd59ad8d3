"""Mending a checkpoint that was checked: from parity, another copy, or files under wrong names."""

from contextlib import suppress
from dataclasses import dataclass, field

from phalanx.checkpoint.format.checksums import digest_range, held_to, read_range
from phalanx.checkpoint.format.manifest import BACKUP, Manifest
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.format.stored import StoredFile
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.reading import Reader
from phalanx.checkpoint.tool.repair.mender import Mender
from phalanx.checkpoint.tool.state import COMPLETE

MENDED = "mended"
"""State of a checkpoint that was broken, and of which nothing is any more."""
ASIDE = ".misplaced"
"""Ending of a file's name while contents change places."""


@dataclass(kw_only=True)
class Checked:
    """What was found of one checkpoint."""

    folder: str
    state: str
    """complete, broken, unfinished or restoring; mended where a repair left nothing."""
    reason: str = ""
    """What is wrong with all of it; then perhaps nothing of it could be checked."""
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
    def left(self) -> list[str]:
        """Broken files that are not mended."""
        return [name for name in self.faults if name not in self.mended]

    @property
    def fine(self) -> bool:
        """Whether it can be loaded, and nothing of it is amiss."""
        return self.state in (COMPLETE, MENDED)


def find_ways(storage: Storage, folder: str, checked: Checked, other: Reader | None) -> None:
    """Find out what the broken files can be mended out of."""
    assert checked.manifest is not None
    checked.ways |= misplaced(storage, folder, checked)
    broken = [name for name in checked.faults if name not in checked.ways]
    mender = Mender(storage, folder, checked.manifest, broken=broken, other=other)
    checked.ways |= mender.mendable()


def misplaced(storage: Storage, folder: str, checked: Checked) -> dict[str, str]:
    """Broken file to the file that has its content: broken itself, or left by a repair, or one
    that should be a manifest."""
    assert checked.manifest is not None
    files = checked.manifest.files
    sizes = {files[name].size for name in checked.faults}
    aside = [name for name in storage.names(folder) if name.endswith(ASIDE)]
    candidates = [*checked.faults, *aside, MANIFEST, BACKUP] if checked.faults else []
    contents: dict[str, str] = {}
    for name in candidates:
        with suppress(OSError):
            there = storage.size(f"{folder}/{name}")
            if there in sizes:
                contents[digest_range(storage, f"{folder}/{name}", 0, there)] = name
    found = {name: contents.get(files[name].xxh3_64) for name in checked.faults}
    return {name: source for name, source in found.items() if source is not None}


def mend(storage: Storage, folder: str, checked: Checked, other: Reader | None) -> None:
    """Mend what can be mended.

    Raises:
        OSError: files could not be put under their own names; what they hold is still there.
        BrokenCheckpointError: what they hold has changed since.
    """
    assert checked.manifest is not None
    files = checked.manifest.files
    moved = misplaced(storage, folder, checked)
    for name, source in moved.items():  # all aside before any is overwritten
        if source != name + ASIDE:
            _copy(storage, folder, files[name], source, name + ASIDE)
    for name in moved:
        _copy(storage, folder, files[name], name + ASIDE, name)
    for name in storage.names(folder):
        if name.endswith(ASIDE):
            storage.delete(f"{folder}/{name}")
    checked.mended |= moved
    broken = [name for name in checked.faults if name not in moved]
    mender = Mender(storage, folder, checked.manifest, broken=broken, other=other)
    total = sum(files[name].size for name in mender.mendable())
    with byte_bar(f"mending {folder}", total) as done:
        mended, checked.failed = mender.mend(on_bytes=done)
    checked.mended |= mended


def _copy(storage: Storage, folder: str, file: StoredFile, source: str, target: str) -> None:
    """Write what `source` holds, which is the content of `file`, to `target`."""
    pieces = read_range(storage, f"{folder}/{source}", 0, file.size)
    storage.write(f"{folder}/{target}", held_to(file.xxh3_64, pieces, what=source))
