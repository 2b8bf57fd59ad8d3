"""Writing a checkpoint from one process: imported weights, converted checkpoints.

A run's own checkpoints are written by the nodes' holders; what one process writes looks the same.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from phalanx.checkpoint.boxes import Box, TensorInfo
from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.format.coverage import uncovered
from phalanx.checkpoint.format.folders import prepare_folder
from phalanx.checkpoint.format.manifest import new_manifest, write_manifest
from phalanx.checkpoint.format.part_file import write_part
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.format.table import lay_out
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.torch_types import byte_view

FILE_BYTES = 1 << 30
"""Bytes of tensors in one file, unless one box is larger."""


def write_tensors(
    storage: Storage,
    step: int,
    chunks: Mapping[str, Chunk],
    meta: Mapping[str, Any],
    *,
    file_bytes: int = FILE_BYTES,
) -> str:
    """Write the checkpoint of `step`, in files of about `file_bytes`.

    The chunks' tensors may be mapped from files: one at a time is read.

    Returns:
        The name of its folder.

    Raises:
        ValueError: a type cannot be stored, the chunks of a tensor are not all of it, or `meta` is
            not what JSON holds.
        OSError: a file cannot be written; what stood before still counts.
    """
    return write_groups(storage, step, _grouped(chunks, file_bytes), meta)


def write_groups(
    storage: Storage,
    step: int,
    groups: Iterable[Sequence[tuple[str, Chunk]]],
    meta: Mapping[str, Any],
) -> str:
    """Write the checkpoint of `step` with one file for each group of named chunks.

    A group is asked for when the one before is written; of a tensor, groups may hold a box each.

    Returns, raises: as `write_tensors`.
    """
    folder = prepare_folder(storage, step)
    parts = [
        _write_group(storage, f"{folder}/part-{number:05d}.safetensors", group)
        for number, group in enumerate(groups)
    ]
    manifest = new_manifest(step=step, meta=dict(meta), parts=parts, world_size=1)
    reason = uncovered(manifest)
    if reason is not None:
        raise ValueError(f"step {step} cannot be written: {reason}")
    try:
        write_manifest(storage, folder, manifest)
    except TypeError as error:
        raise ValueError(f"meta: only what JSON holds can be saved ({error})") from None
    return folder


def _write_group(storage: Storage, path: str, group: Sequence[tuple[str, Chunk]]) -> StoredPart:
    boxes: dict[str, list[tuple[TensorInfo, Box]]] = defaultdict(list)
    locals_: dict[tuple[str, Box], Tensor] = {}
    for name, chunk in group:
        boxes[name].append((chunk.info, chunk.box))
        locals_[name, chunk.box] = chunk.local
    table = lay_out(boxes)
    current: list[Tensor] = []

    def read(index: int) -> memoryview:
        entry = table.entries[index]
        current[:] = [locals_[entry.name, entry.box].detach().cpu().contiguous()]
        return byte_view(current[0])

    return write_part(storage, path, table, read)


def _grouped(chunks: Mapping[str, Chunk], file_bytes: int) -> Iterator[list[tuple[str, Chunk]]]:
    """Chunks by file, in their order."""
    group: list[tuple[str, Chunk]] = []
    filled = 0
    for name, chunk in chunks.items():
        if group and filled + chunk.local.nbytes > file_bytes:
            yield group
            group, filled = [], 0
        group.append((name, chunk))
        filled += chunk.local.nbytes
    yield group
