"""Any box of any tensor out of a checkpoint's files, in NumPy's memory.

NumPy knows no bf16 and no fp8, so values are opaque items of the right width.
"""

from collections import defaultdict
from collections.abc import Iterable
from math import prod

import numpy as np
import xxhash

from phalanx.checkpoint.boxes import ITEM_BYTES, Box, TensorInfo
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.format.table import Entry
from phalanx.checkpoint.storage.base import Storage

Array = np.ndarray


def item_type(dtype: str) -> np.dtype:
    """Opaque items as wide as the type's."""
    return np.dtype(f"u{ITEM_BYTES[dtype]}")


def as_box(memory: memoryview, entry: Entry, sizes: Iterable[int] | None = None) -> Array:
    """Bytes of an entry (or of a box of `sizes` of its tensor) as an array."""
    shape = entry.box.sizes if sizes is None else tuple(sizes)
    return np.frombuffer(memory, item_type(entry.info.dtype)).reshape(shape)


def tensors_of(manifest: Manifest) -> dict[str, TensorInfo]:
    """Every tensor, by name."""
    return {entry.name: entry.info for part in manifest.parts for entry in part.table.entries}


class Reader:
    """Reads one checkpoint; every byte that it hands out has its checksum."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage, self._folder = storage, folder
        self._places: dict[str, list[tuple[StoredPart, int]]] = defaultdict(list)
        for part in manifest.parts:
            for index, entry in enumerate(part.table.entries):
                self._places[entry.name].append((part, index))

    def read(self, name: str, box: Box) -> Array:
        """The values of a box.

        Raises:
            BrokenCheckpointError: what is stored of it is damaged, or is not all of it.
        """
        places = self._places.get(name, [])
        if not places:
            raise BrokenCheckpointError(f"{self._folder} holds no {name}")
        info = places[0][0].table.entries[places[0][1]].info
        if len(info.shape) != len(box.sizes):
            raise BrokenCheckpointError(f"{self._folder}: {name} has the shape {list(info.shape)}")
        found = np.empty(box.sizes, item_type(info.dtype))
        left = prod(box.sizes)
        for part, index in places:
            entry = part.table.entries[index]
            common = entry.box.overlap(box)
            if common is None:
                continue
            values = self.entry(part, index)
            found[common.slices_in(box)] = values[common.slices_in(entry.box)]
            left -= common.numel
        if left:
            raise BrokenCheckpointError(f"{self._folder}: of {name}, {left} elements are missing")
        return found

    def entry(self, part: StoredPart, index: int) -> Array:
        """A stored box.

        Raises:
            BrokenCheckpointError: it is damaged.
        """
        entry = part.table.entries[index]
        memory = memoryview(bytearray(entry.nbytes))
        path = f"{self._folder}/{part.file}"
        if entry.nbytes:
            try:
                self._storage.read_into(path, part.data_begin + entry.begin, memory)
            except OSError as error:
                raise BrokenCheckpointError(f"{path}: {error}") from error
        found = xxhash.xxh3_64_hexdigest(memory)
        if found != part.digests[index]:
            raise BrokenCheckpointError(f"{path}: {entry.key} is damaged")
        return as_box(memory, entry)
