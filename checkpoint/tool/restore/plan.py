"""What a restore is to do: which files it reads, which it writes, and how tensors are cut."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.tool.restore.journal import VERSION
from phalanx.checkpoint.tool.restore.units import Stream


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How the target's tensors are cut."""

    text: str
    """As the user wrote it; "" = as the source."""
    tables: tuple[PartTable, ...] | None = None
    """The part of each rank; None = as the source."""
    layout: dict[str, int] | None = None
    """Degrees, for the target's meta."""


SAME = Cutting(text="")


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """What a restore is to do."""

    url: str
    """The source."""
    source: Storage
    folder: str
    """Of the source, in its storage."""
    manifest: Manifest
    cutting: Cutting
    target: Storage
    name: str
    """Of the target's folder, in its storage."""

    @property
    def sources(self) -> list[Stream]:
        """Files that are read; parity only where it will still fit."""
        parity = () if self.cutting.tables else self.manifest.parity
        return [*map(Stream.of_part, self.manifest.parts), *map(Stream.of_parity, parity)]

    @property
    def advice(self) -> str:
        """What to do about a source that is damaged."""
        return (
            f"look with `phalanx checkpoint verify {self.url}`, whose --repair may mend it, then "
            "run this restore again"
        )

    @property
    def targets(self) -> list[Stream]:
        """Files that are written."""
        if self.cutting.tables is None:
            return self.sources
        return [
            Stream(file=f"part-{rank:05d}.safetensors", header=table.header(), table=table)
            for rank, table in enumerate(self.cutting.tables)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of boxes to be moved."""
        return sum(source.table.nbytes for source in self.sources)

    def facts(self) -> dict[str, Any]:
        """What must be the same when the restore goes on."""
        ids = [file.xxh3_64 for file in self.manifest.files.values()]
        source = xxhash.xxh3_64_hexdigest(
            f"{self.manifest.step} {self.manifest.time} {ids}".encode()
        )
        return {
            "journal": VERSION,
            "source": self.url,
            "checksum": source,
            "layout": self.cutting.text,
        }

    def finished(self, parts: Iterable[StoredPart]) -> Manifest:
        """The target's manifest, with the files that were written."""
        if self.cutting.tables is None:
            return self.manifest
        return replace(
            self.manifest,
            parts=tuple(parts),
            parity=(),
            groups=(),
            num_parity=0,
            world_size=len(self.cutting.tables),
            meta=self.manifest.meta | {"layout": self.cutting.layout},
        )


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a restore did."""

    stood: int
    """Bytes that earlier calls had brought."""
    moved: int
    """Bytes read from the source by this one."""
    manifest: Manifest
