"""Checkpoints from and to torch.distributed.checkpoint's folders, in one process, box by box.

No foreign code runs: of `.metadata` see `reader`, tensors are read with `weights_only=True`,
and objects that are no tensors are left out.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.dcp.meta import state_of, write_state
from phalanx.checkpoint.dcp.reader import MetadataReader
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.format.writer import FILE_BYTES, write_groups
from phalanx.checkpoint.load.reads import Located, locate
from phalanx.checkpoint.load.sources import Source, StorageSource
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.torch_types import TORCH_TYPES, byte_view

OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was made of a DCP folder."""

    folder: str
    """Name of the new checkpoint's folder."""
    step: int
    bytes: int
    """Of all tensors."""
    skipped: list[str]
    """Names of what is no tensor, and is not in the new checkpoint."""


def from_dcp(
    src: Path,
    storage: Storage,
    *,
    step: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Converted:
    """Write what a DCP folder holds as a checkpoint; boxes stay as they were cut.

    Of checkpoints that an older phalanx wrote, and of those that `to_dcp` made, step and meta are
    kept, and of the former the files' checksums are compared.

    Args:
        step: of the new checkpoint; must be given where `src` does not tell.
        on_bytes: told the bytes of each box once it is read.

    Raises:
        ValueError: `src` is no such folder, or is damaged, or holds a type that we do not store.
        OSError: it cannot be read, or the new one not be written.
    """
    reader = MetadataReader(src)
    metadata = reader.metadata()
    state = state_of(src, step)
    boxes, skipped = _boxes(src, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    def groups() -> Iterator[list[tuple[str, Chunk]]]:
        for group in _grouped(boxes):
            yield _read_group(reader, group)
            if on_bytes is not None:
                on_bytes(sum(box.nbytes for box in group))

    folder = write_groups(storage, state.step, groups(), state.meta)
    return Converted(
        folder=folder, step=state.step, bytes=sum(box.nbytes for box in boxes), skipped=skipped
    )


def to_dcp(storage: Storage, folder: str, dst: Path, *, on_bytes: OnBytes | None = None) -> None:
    """Write a checkpoint as a DCP folder, a file for each box, that dcp.load reads.

    Its step and meta stand beside in phalanx.json.

    Raises:
        BrokenCheckpointError: the checkpoint is damaged; names file and box.
        ValueError: `dst` is in use.
        OSError: something cannot be read or written.
    """
    if dst.exists() and any(dst.iterdir()):
        raise ValueError(f"{dst}: is not empty; give a new folder")
    manifest = read_manifest(storage, folder)
    planner = _BoxSavePlanner(StorageSource(storage, folder, manifest), on_bytes)
    writer = dcp.FileSystemWriter(dst, single_file_per_rank=False, per_thread_copy_ahead=0)
    dst.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        write_state(dst, step=manifest.step, meta=manifest.meta)
    except BaseException as error:
        shutil.rmtree(dst, ignore_errors=True)
        if isinstance(error, CheckpointException):  # it is no `Exception`; the first is the cause
            raise error.failures[0][0] from error
        raise


# --- from -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoredBox:
    """A box in a DCP folder."""

    name: str
    stored: TensorStorageMetadata
    chunk: ChunkStorageMetadata

    @property
    def nbytes(self) -> int:
        return self.chunk.sizes.numel() * self.stored.properties.dtype.itemsize

    def item(self) -> ReadItem:
        """A request for all of it."""
        index = MetadataIndex(self.name, self.chunk.offsets)
        begin = torch.Size([0] * len(self.chunk.sizes))
        return ReadItem(LoadItemType.TENSOR, index, begin, index, begin, self.chunk.sizes)


def _boxes(src: Path, metadata: Metadata) -> tuple[list[_StoredBox], list[str]]:
    """The boxes in the order of their names, and the names of what is no tensor."""
    boxes: list[_StoredBox] = []
    skipped: list[str] = []
    known = set(TORCH_TYPES.values())
    for name, stored in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(stored, TensorStorageMetadata):
            skipped.append(name)
            continue
        if stored.properties.dtype not in known:
            raise ValueError(f"{src}: {name} is {stored.properties.dtype}, which is not stored")
        chunks = [chunk for chunk in stored.chunks if chunk.sizes.numel()] or stored.chunks[:1]
        boxes += [_StoredBox(name, stored, chunk) for chunk in chunks]
    return boxes, skipped


def _grouped(boxes: Sequence[_StoredBox]) -> Iterator[list[_StoredBox]]:
    group: list[_StoredBox] = []
    filled = 0
    for box in boxes:
        if group and filled + box.nbytes > FILE_BYTES:
            yield group
            group, filled = [], 0
        group.append(box)
        filled += box.nbytes
    yield group


def _read_group(reader: MetadataReader, group: Sequence[_StoredBox]) -> list[tuple[str, Chunk]]:
    tensors = [torch.empty(box.chunk.sizes, dtype=box.stored.properties.dtype) for box in group]
    items = [box.item() for box in group]
    targets = {item.dest_index: tensor for item, tensor in zip(items, tensors, strict=True)}
    reader.fill(targets, [item for item in items if item.lengths.numel()])
    return [
        (box.name, Chunk(local=tensor, size=box.stored.size, offsets=box.chunk.offsets))
        for box, tensor in zip(group, tensors, strict=True)
    ]


# --- to -------------------------------------------------------------------------------------------


class _BoxSavePlanner(DefaultSavePlanner):
    """Plans to write every stored box; each is read when it is written."""

    def __init__(self, source: Source, on_bytes: OnBytes | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._source = source
        self._on_bytes = on_bytes
        self._places: dict[MetadataIndex, Located] = {}

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for located in locate(self._source.parts()):
            entry = located.entry
            index = MetadataIndex(entry.name, torch.Size(entry.box.offsets))
            self._places[index] = located
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(
                    offsets=torch.Size(entry.box.offsets), sizes=torch.Size(entry.box.sizes)
                ),
                properties=TensorProperties(dtype=TORCH_TYPES[entry.info.dtype]),
                size=torch.Size(entry.info.shape),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        located = self._places[write_item.index]
        entry = located.entry
        values = torch.empty(entry.box.sizes, dtype=TORCH_TYPES[entry.info.dtype])
        self._source.read(located.part, located.index, byte_view(values))
        if self._on_bytes is not None:
            self._on_bytes(entry.nbytes)
        return values
