"""Chunks to and from files, through torch.distributed.checkpoint.

What is written is an ordinary DCP checkpoint, which DCP's own tools read. Its `.metadata` is a
pickle of DCP's classes (read it only from folders you trust, like any torch checkpoint); tensors
are read with `weights_only=True`, and all that is not a tensor stands in the JSON manifest.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.disk import RecordingFileSystem
from phalanx.checkpoint.manifest import Fingerprint
from phalanx.checkpoint.peers import CheckpointError


class ChunkSavePlanner(DefaultSavePlanner):
    """Plans the writing of `Chunk`s; of chunks that several ranks hold, one rank writes each."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One write item a chunk."""
        self.plan = SavePlan([_write_item(name, chunk) for name, chunk in self.state_dict.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of a planned item."""
        chunk: Chunk = self.state_dict[write_item.index.fqn]
        return chunk.local


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of `Chunk`s, from however the checkpoint was cut."""

    def set_up_planner(
        self,
        state_dict: dict[str, Chunk],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Remember what is asked for."""
        self.state_dict = state_dict  # type: ignore[assignment]
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Read items for every overlap of a wanted box with a stored one."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, chunk in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            wanted = ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.local.size())
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the values of a planned item go."""
        chunk: Chunk = self.state_dict[index.fqn]
        return chunk.local


def _write_item(name: str, chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.local.size()),
            properties=TensorProperties.create_from_tensor(chunk.local),
            size=chunk.size,
        ),
    )


def write_chunks(
    folder: Path, chunks: Mapping[str, Chunk], *, group: dist.ProcessGroup | None
) -> dict[str, Fingerprint]:
    """Write this rank's chunks, fsync'd; without a group, as the only process.

    Returns:
        The files that this rank wrote.

    Raises:
        CheckpointError: on every rank, where one of them failed.
    """
    # No copy-ahead: the chunks are in host memory, and the overlapping loader that it selects on
    # CUDA machines would wait for the training stream.
    writer = dcp.FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    files = RecordingFileSystem()
    writer.fs = files
    with _dcp(group):
        dcp.save(
            dict(chunks),
            storage_writer=writer,
            planner=ChunkSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    return files.files


def read_chunks(
    folder: Path, chunks: Mapping[str, Chunk], *, group: dist.ProcessGroup | None
) -> None:
    """Fill the chunks' tensors in place; names must be stored (see `stored_tensors`).

    Raises:
        CheckpointError: on every rank, where one of them failed.
    """
    with _dcp(group):
        dcp.load(
            dict(chunks),
            storage_reader=dcp.FileSystemReader(folder),
            planner=ChunkLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor of a checkpoint, by name."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return {
        name: stored
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


@contextmanager
def _dcp(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around a DCP call: its failures as ours, and no remark that it works alone as asked.

    DCP has then told every rank of every rank's failure; its exception is not an `Exception`.
    """
    with warnings.catch_warnings() if group is None else nullcontext():
        if group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            failures = (
                f"rank {rank}: {type(failure[0]).__name__}: {failure[0]}"
                for rank, failure in sorted(error.failures.items())
            )
            raise CheckpointError("; ".join(failures)) from error
