"""Reading the `.metadata` of torch.distributed.checkpoint, a pickle, without trusting it.

It may name DCP's own classes and nothing else, so that a foreign folder runs no foreign code.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from phalanx.checkpoint.manifest import BrokenCheckpointError

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


class MetadataReader(dcp.FileSystemReader):
    """Reads `.metadata` without running what it may name."""

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
