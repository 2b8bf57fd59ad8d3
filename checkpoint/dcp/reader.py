"""Reading torch.distributed.checkpoint's folders, and their `.metadata`, a pickle, without trust.

It may name DCP's own classes and nothing else, so that a foreign folder runs no foreign code.
"""

import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from phalanx.checkpoint.dcp.crc import damage
from phalanx.checkpoint.errors import BrokenCheckpointError

METADATA = ".metadata"
ALLOWED = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What `.metadata` may name, by module; of torch itself also Size and the types."""


DAMAGE = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    struct.error,
    KeyError,
    EOFError,
    AssertionError,
    FileNotFoundError,
    pickle.UnpicklingError,
)
"""What torch raises where a file is not what `.metadata` says."""


class MetadataReader(dcp.FileSystemReader):
    """Reads `.metadata` without running what it may name, and boxes."""

    def metadata(self) -> Metadata:
        """What the folder holds.

        Raises:
            ValueError: it is no folder of DCP's.
            BrokenCheckpointError: its `.metadata` is damaged, or names what it must not.
        """
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except FileNotFoundError:
            raise ValueError(
                f"{path.parent}: no {METADATA} there; give a folder that "
                "torch.distributed.checkpoint wrote"
            ) from None
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, KeyError) as error:
            raise BrokenCheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, Metadata):
            raise BrokenCheckpointError(f"{path} holds a {type(found).__name__}, no metadata")
        found.storage_meta = found.storage_meta or StorageMeta()
        return found

    def fill(self, targets: Mapping[MetadataIndex, Tensor], items: Sequence[ReadItem]) -> None:
        """Read boxes into the tensors that they are for.

        Raises:
            BrokenCheckpointError: a file is missing or damaged; names it and the box.
        """
        planner = _BoxLoadPlanner(targets)
        try:
            self.read_data(LoadPlan(list(items)), planner).wait()
        except DAMAGE:
            for item in items:  # which one it is
                self._fill_one(item, planner)
            raise
        for item in items:  # torch does not look at the CRC32s that it writes
            self._check_one(item)

    def _check_one(self, item: ReadItem) -> None:
        index = item.storage_index
        stored = self.storage_data[index]
        file = Path(self.path) / stored.relative_path
        if why := damage(file, stored.offset, stored.length):
            box = f"{index.fqn} at {list(index.offset or ())}"
            raise BrokenCheckpointError(f"{file} is damaged: {box}: {why}")

    def _fill_one(self, item: ReadItem, planner: "_BoxLoadPlanner") -> None:
        index, file = item.storage_index, Path(self.path)
        box = f"{index.fqn} at {list(index.offset or ())}"
        try:
            file /= self.storage_data[index].relative_path
            self.read_data(LoadPlan([item]), planner).wait()
        except FileNotFoundError:
            raise BrokenCheckpointError(f"{file} is missing; it holds {box}") from None
        except DAMAGE as error:
            why = str(error).partition(". ")[0] or type(error).__name__
            raise BrokenCheckpointError(
                f"{file} is damaged: {box} cannot be read ({why})"
            ) from error


class _BoxLoadPlanner(DefaultLoadPlanner):
    """Where the boxes that are read go."""

    def __init__(self, targets: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._targets[index]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype) or found is torch.Size:
                return found
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which no checkpoint needs; nothing of it was run"
        )
