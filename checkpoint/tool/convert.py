"""`phalanx checkpoint convert`: from and to torch.distributed.checkpoint's folders. Needs torch."""

from pathlib import Path

from phalanx.checkpoint.dcp.convert import from_dcp, to_dcp
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.tool.places import CheckpointPlace
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.report import Outcome, plural, size

METADATA = ".metadata"
"""What makes a folder one of torch.distributed.checkpoint's."""


def is_dcp(folder: Path) -> bool:
    """Whether a folder is torch.distributed.checkpoint's."""
    return (folder / METADATA).is_file()


def convert_from_dcp(source: Path, target: Storage, *, step: int | None) -> Outcome:
    """Make a checkpoint of a DCP folder.

    Raises:
        ValueError: it is damaged, holds what cannot be stored, or does not tell its step.
        OSError: it cannot be read, or the target not written.
    """
    total = sum(file.stat().st_size for file in source.iterdir() if file.is_file())
    with byte_bar(f"converting {source.name}", total) as done:
        found = from_dcp(source, target, step=step, on_bytes=done)
    lines = [f"wrote {target.url}/{found.folder}: step {found.step}, {size(found.bytes)}"]
    if found.skipped:
        names = ", ".join(found.skipped[:5]) + (", ..." if found.skipped[5:] else "")
        lines.append(f"  left out, for they are no tensors: {names}")
    content = {
        "target": f"{target.url}/{found.folder}",
        "step": found.step,
        "bytes": found.bytes,
        "skipped": found.skipped,
    }
    return Outcome(lines=lines, content=content)


def convert_to_dcp(source: CheckpointPlace, target: Path, *, step: int | None) -> Outcome:
    """Make a DCP folder of a checkpoint, which dcp.load reads.

    Raises:
        ValueError: there is no such checkpoint, or the target is in use.
        BrokenCheckpointError: a shard is damaged.
        OSError: something cannot be read or written.
    """
    folder = source.one(step)
    manifest = source.manifest(folder)
    total = sum(part.table.nbytes for part in manifest.parts)
    with byte_bar(f"converting {folder}", total) as done:
        to_dcp(source.storage, folder, target, on_bytes=done)
    count = len({entry.name for part in manifest.parts for entry in part.table.entries})
    lines = [f"wrote {target}: step {manifest.step}, {plural(count, 'tensor')}, {size(total)}"]
    content = {"target": str(target), "step": manifest.step, "bytes": total}
    return Outcome(lines=lines, content=content)
