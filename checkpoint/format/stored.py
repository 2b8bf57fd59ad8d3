"""What is known of a stored file: its boxes and checksums. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.checkpoint.format.table import PartTable


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What is known of any file."""

    file: str
    """Its name in the folder."""
    size: int
    """Bytes."""
    xxh3_64: str
    """XXH3-64 of the whole file, 16 hexadecimal digits."""
    member: int = 0
    """The node that wrote it, by its place in the parity groups."""

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "file": self.file,
            "size": self.size,
            "xxh3_64": self.xxh3_64,
            "member": self.member,
        }


@dataclass(frozen=True, kw_only=True)
class StoredPart(StoredFile):
    """A file of one rank's boxes: a header that makes it a safetensors file, and the part."""

    table: PartTable
    """The boxes."""
    digests: tuple[str, ...]
    """XXH3-64 of each box's bytes, in the table's order."""

    @property
    def data_begin(self) -> int:
        """First byte of the part in the file."""
        return self.size - self.table.nbytes

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return super().to_json() | {
            "digests": list(self.digests),
            "table": self.table.to_json(),
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "StoredPart":
        """What `to_json` gave.

        Raises:
            ValueError, KeyError, TypeError: it is no such thing.
        """
        return StoredPart(
            **_file_fields(body),
            digests=tuple(map(str, body["digests"])),
            table=PartTable.from_json(body["table"]),
        )


@dataclass(frozen=True, kw_only=True)
class StoredParity(StoredFile):
    """A file of the parity that one node holds for its group."""

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "StoredParity":
        """What `to_json` gave.

        Raises:
            ValueError, KeyError, TypeError: it is no such thing.
        """
        return StoredParity(**_file_fields(body))


def _file_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": str(body["file"]),
        "size": int(body["size"]),
        "xxh3_64": str(body["xxh3_64"]),
        "member": int(body["member"]),
    }
