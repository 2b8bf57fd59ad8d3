"""What a checkpoint is made of, whatever the layout: boxes of tensors, packed into parts.

A tensor has a name, a shape and a type. What one rank keeps of it is a box in global coordinates.
A part is a run of boxes without gaps, in an order that aligns each box to its element size; behind
a header it is a safetensors file, in memory it stands as it is. Torch-free.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phalanx.checkpoint.boxes import ITEM_BYTES, Box, TensorInfo

HEADER_ALIGN = 64
"""The data behind a header begins at a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One box in a part."""

    name: str
    """Of the tensor."""
    info: TensorInfo
    box: Box
    begin: int
    """First byte in the part."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.numel * ITEM_BYTES[self.info.dtype]

    @property
    def key(self) -> str:
        """Its name in a safetensors file: the tensor's, with the range of each dim if it is cut."""
        if self.box.sizes == self.info.shape:
            return self.name
        ranges = (
            f"{begin}:{begin + size}"
            for begin, size in zip(self.box.offsets, self.box.sizes, strict=True)
        )
        return f"{self.name}[{','.join(ranges)}]"


@dataclass(frozen=True)
class PartTable:
    """The boxes of a part, in the order of their bytes."""

    entries: tuple[Entry, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return sum(entry.nbytes for entry in self.entries)

    def header(self) -> bytes:
        """What makes a safetensors file of the part's bytes when it stands before them."""
        body: dict[str, Any] = {"__metadata__": {"format": "phalanx"}}
        for entry in self.entries:
            body[entry.key] = {
                "dtype": entry.info.dtype,
                "shape": entry.box.sizes,
                "data_offsets": [entry.begin, entry.begin + entry.nbytes],
            }
        text = json.dumps(body, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % HEADER_ALIGN)
        return len(text).to_bytes(8, "little") + text

    def to_json(self) -> list[list[Any]]:
        """As JSON holds it; where boxes begin follows from their order."""
        return [
            [
                entry.name,
                entry.info.dtype,
                list(entry.info.shape),
                list(entry.box.offsets),
                list(entry.box.sizes),
            ]
            for entry in self.entries
        ]

    @staticmethod
    def from_json(rows: Iterable[Any]) -> "PartTable":
        """The table that `to_json` gave.

        Raises:
            ValueError: it is no such thing.
        """
        entries: list[Entry] = []
        begin = 0
        try:
            for name, dtype, shape, offsets, sizes in rows:
                if not len(shape) == len(offsets) == len(sizes) or dtype not in ITEM_BYTES:
                    raise ValueError(f"{name}: {dtype} {shape} {offsets} {sizes} is no box")
                entry = Entry(
                    name=str(name),
                    info=TensorInfo(dtype=dtype, shape=tuple(map(int, shape))),
                    box=Box(tuple(map(int, offsets)), tuple(map(int, sizes))),
                    begin=begin,
                )
                entries.append(entry)
                begin += entry.nbytes
        except TypeError as error:
            raise ValueError(f"no table of boxes: {error}") from None
        return PartTable(tuple(entries))


def lay_out(boxes: Mapping[str, Iterable[tuple[TensorInfo, Box]]]) -> PartTable:
    """A part of these boxes, by tensor name: wide elements first, which aligns every box."""
    found = [(name, info, box) for name, some in boxes.items() for info, box in some]
    found.sort(key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0], item[2].offsets))
    entries: list[Entry] = []
    begin = 0
    for name, info, box in found:
        entry = Entry(name=name, info=info, box=box, begin=begin)
        entries.append(entry)
        begin += entry.nbytes
    return PartTable(tuple(entries))
