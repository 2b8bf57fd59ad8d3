"""What tests of resharding share: random tensors, cuts of them, and a source in memory."""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from phalanx.checkpoint.boxes import Box, TensorInfo, whole
from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.table import PartTable, lay_out
from phalanx.checkpoint.torch_types import TORCH_TYPES, byte_view, name_of

Run = Callable[..., list[Any]]
Tensors = dict[str, Tensor]
Cuts = dict[str, list[Box]]


class MemorySource:
    """Parts in memory, which counts what is read of them."""

    def __init__(
        self, tensors: Tensors, parts: Sequence[Cuts], *, near: dict[int, list[int]] | None = None
    ) -> None:
        self._near = near or {}
        self._lock = threading.Lock()
        self.reads: list[tuple[int, int]] = []
        self.tables: list[PartTable] = []
        self.bytes: list[list[bytearray]] = []
        for cuts in parts:
            table = lay_out(
                {
                    name: [(info_of(tensors[name]), box) for box in boxes]
                    for name, boxes in cuts.items()
                }
            )
            self.tables.append(table)
            self.bytes.append(
                [
                    bytearray(byte_view(cut(tensors[e.name], e.box).contiguous()))
                    for e in table.entries
                ]
            )
        self._digests = [[xxhash.xxh3_64_digest(b) for b in part] for part in self.bytes]

    def parts(self) -> list[PartTable]:
        return self.tables

    def near(self, part: int) -> Sequence[int]:
        return self._near.get(part, ())

    def read(self, part: int, index: int, out: memoryview) -> None:
        with self._lock:
            self.reads.append((part, index))
        out[:] = self.bytes[part][index]
        if xxhash.xxh3_64_digest(out) != self._digests[part][index]:
            key = self.tables[part].entries[index].key
            raise BrokenCheckpointError(f"part {part} is damaged: {key}")


def info_of(tensor: Tensor) -> TensorInfo:
    return TensorInfo(dtype=name_of(tensor.dtype), shape=tuple(tensor.shape))


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[box.slices_in(whole(tensor.shape))]


def some_tensors(rng: random.Random) -> Tensors:
    """Tensors of every type, of no, one and up to four dims, uneven and empty ones."""
    torch.manual_seed(rng.randrange(1000))
    shapes = [(), (1,), (7,), (1000,), (0,), (3, 0, 2), (13, 7), (64, 33), (5, 4, 3), (2, 3, 4, 5)]
    tensors: Tensors = {}
    for number, (dtype, shape) in enumerate(
        (dtype, shape) for dtype in TORCH_TYPES.values() for shape in rng.sample(shapes, 4)
    ):
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8)
        tensors[f"t{number}"] = raw.view(dtype).view(shape)
    return tensors


def random_cut(rng: random.Random, box: Box, pieces: int) -> list[Box]:
    """Disjoint boxes that make up `box`, by random cuts along random dims."""
    boxes = [box]
    for _ in range(pieces - 1):
        which = rng.randrange(len(boxes))
        target = boxes[which]
        dims = [dim for dim, size in enumerate(target.sizes) if size > 1]
        if not dims:
            continue
        dim = rng.choice(dims)
        at = rng.randrange(1, target.sizes[dim])
        first, second = list(target.sizes), list(target.sizes)
        first[dim], second[dim] = at, target.sizes[dim] - at
        offsets = list(target.offsets)
        offsets[dim] += at
        boxes[which] = Box(target.offsets, tuple(first))
        boxes.append(Box(tuple(offsets), tuple(second)))
    return boxes


def random_layout(rng: random.Random, tensors: Tensors, num_parts: int) -> list[Cuts]:
    """Each box of each tensor in one random part."""
    parts: list[Cuts] = [{} for _ in range(num_parts)]
    for name, tensor in tensors.items():
        for box in random_cut(rng, whole(tensor.shape), rng.randint(1, 5)):
            parts[rng.randrange(num_parts)].setdefault(name, []).append(box)
    return parts


def random_wants(rng: random.Random, tensors: Tensors, size: int) -> list[dict[str, Box]]:
    """Per rank a cut, nothing or an empty part of each tensor; some boxes on several ranks."""
    wants: list[dict[str, Box]] = [{} for _ in range(size)]
    for name, tensor in tensors.items():
        boxes = random_cut(rng, whole(tensor.shape), rng.randint(1, size))
        for rank in range(size):
            if rng.random() < 0.8:
                wants[rank][name] = rng.choice(boxes)
            elif tensor.ndim:
                wants[rank][name] = Box((0,) * tensor.ndim, (0, *tensor.shape[1:]))
    return wants


def empty_chunk(tensor: Tensor, box: Box, *, strided: bool = False) -> Chunk:
    """A place to load to, filled with ones; as a column of something wider if `strided`."""
    shape = (*box.sizes, 2) if strided else box.sizes
    local = torch.full((torch.Size(shape).numel() * tensor.dtype.itemsize,), 1, dtype=torch.uint8)
    view = local.view(tensor.dtype).view(shape)
    return Chunk(
        local=view[..., 0] if strided else view,
        size=tensor.shape,
        offsets=torch.Size(box.offsets),
    )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return bytes(byte_view(a.contiguous())) == bytes(byte_view(b.contiguous()))


def distinct_bytes(tensors: Tensors, wants: list[dict[str, Box]]) -> int:
    """Bytes that some rank wants, by marking every element."""
    total = 0
    for name, tensor in tensors.items():
        marked = torch.zeros(tensor.shape, dtype=torch.bool)
        for want in wants:
            if name in want:
                cut(marked, want[name]).fill_(True)
        total += int(marked.sum()) * tensor.dtype.itemsize
    return total


# --- any layout to any layout ---------------------------------------------------------------------
