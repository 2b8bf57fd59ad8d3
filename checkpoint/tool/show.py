"""`phalanx checkpoint show`: what a checkpoint is made of, by its manifest and its files' sizes."""

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from phalanx.checkpoint.boxes import ITEM_BYTES, Box
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.format.table import Entry
from phalanx.checkpoint.tool.places import CheckpointPlace
from phalanx.checkpoint.tool.report import (
    Outcome,
    age,
    columns,
    layout_of,
    plural,
    protection_of,
    size,
    when,
)
from phalanx.checkpoint.tool.state import wrong_files

Shards = dict[str, list[tuple[StoredPart, Entry, str]]]
"""By tensor: file, box and checksum of each of its pieces."""


def show(
    place: CheckpointPlace,
    *,
    step: int | None = None,
    patterns: Iterable[str] = (),
    shards: bool = False,
) -> Outcome:
    """Tensors of one checkpoint, and which of its files are missing or of a wrong size.

    Args:
        patterns: names wanted, with * and ?; none = all.
        shards: tell each box too, its file and its checksum.

    Raises:
        ValueError: no such checkpoint, or no tensor of such a name.
        BrokenCheckpointError: its manifest cannot be read.
    """
    folder = place.one(step)
    manifest = place.manifest(folder)
    wanted = tuple(patterns)
    found = {
        name: pieces
        for name, pieces in sorted(shards_of(manifest).items())
        if not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)
    }
    if wanted and not found:
        raise ValueError(
            f"{' '.join(wanted)}: no tensor of {place.url(folder)} is called so; * and ? stand "
            "for anything, as in 'model.layers.0.*'"
        )
    lines = [place.url(folder), *_about(manifest), "", *_table(found, shards=shards)]
    total = sum(entry.nbytes for pieces in found.values() for _, entry, _ in pieces)
    count = sum(map(len, found.values()))
    lines.append(f"{plural(len(found), 'tensor')} in {plural(count, 'shard')}, {size(total)}")
    wrong = wrong_files(place.storage, folder, manifest.files.values())
    lines += [f"broken: {why}" for why in wrong.values()]
    content = {
        "url": place.url(folder),
        "step": manifest.step,
        "time": manifest.time,
        "bytes": manifest.nbytes,
        "world_size": manifest.world_size,
        "torch": manifest.torch_version,
        "phalanx": manifest.phalanx_version,
        "parity": manifest.num_parity if manifest.parity else 0,
        "groups": [list(group) for group in manifest.groups],
        "meta": manifest.meta,
        "tensors": [_tensor(name, pieces) for name, pieces in found.items()],
        "wrong_files": [{"file": file, "reason": why} for file, why in wrong.items()],
    }
    return Outcome(lines=lines, content=content, fine=not wrong)


def shards_of(manifest: Manifest) -> Shards:
    """Every tensor's pieces, in the order of the files."""
    found: Shards = defaultdict(list)
    for part in manifest.parts:
        for entry, digest in zip(part.table.entries, part.digests, strict=True):
            found[entry.name].append((part, entry, digest))
    return found


def box_text(box: Box) -> str:
    """`[0:8,4:8]`."""
    ranges = (f"{a}:{a + n}" for a, n in zip(box.offsets, box.sizes, strict=True))
    return f"[{','.join(ranges)}]"


def _about(manifest: Manifest) -> list[str]:
    data, parity = sum(p.size for p in manifest.parts), sum(p.size for p in manifest.parity)
    kind = manifest.meta.get("kind", "-")
    rows = [
        ("step", f"{manifest.step}, of kind {kind}"),
        ("saved", f"{when(manifest.time)}, {age(manifest.time)} ago"),
        ("by", f"phalanx {manifest.phalanx_version}, torch {manifest.torch_version}"),
        ("layout", f"{layout_of(manifest)}, {plural(manifest.world_size, 'rank')}"),
        ("data", f"{size(data)} in {plural(len(manifest.parts), 'file')}"),
        ("protection", protection_of(manifest) + (f", {size(parity)} of parity" if parity else "")),
    ]
    return [f"  {line}" for line in columns(rows)]


def _table(found: Shards, *, shards: bool) -> list[str]:
    rows = [("tensor", "type", "shape", "shards", "size")]
    for name, pieces in found.items():
        info = pieces[0][1].info
        nbytes = sum(entry.nbytes for _, entry, _ in pieces)
        shape = "x".join(map(str, info.shape)) or "number"
        rows.append((name, info.dtype, shape, str(len(pieces)), size(nbytes)))
        if shards:
            rows += [
                (f"  {box_text(entry.box)}", "", part.file, digest, size(entry.nbytes))
                for part, entry, digest in pieces
            ]
    return columns(rows, right=(3, 4))


def _tensor(name: str, pieces: list[tuple[StoredPart, Entry, str]]) -> dict[str, Any]:
    info = pieces[0][1].info
    numel = Box((), info.shape).numel
    return {
        "name": name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": numel * ITEM_BYTES[info.dtype],
        "shards": [
            {
                "file": part.file,
                "offsets": list(entry.box.offsets),
                "sizes": list(entry.box.sizes),
                "begin": part.data_begin + entry.begin,
                "xxh3_64": digest,
            }
            for part, entry, digest in pieces
        ],
    }
