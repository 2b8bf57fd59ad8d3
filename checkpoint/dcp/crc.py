"""Whether an item of a DCP file is as torch wrote it: torch.save makes zip archives, with CRC32s.

Torch-free.
"""

import io
import struct
import zipfile
import zlib
from pathlib import Path

ZIP = b"PK\x03\x04"
"""How an archive begins."""
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""What zipfile raises where an archive is none."""


def damage(path: Path, offset: int, length: int) -> str:
    """What is wrong with the archive in the file's bytes [offset, offset + length).

    "" where all holds, and where nothing can be checked: in what is no archive, and in archives
    that were written without CRC32s (see torch.serialization.set_crc32_options).

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        view = io.BufferedReader(_Slice(file, offset, length), 1 << 20)
        if view.read(len(ZIP)) != ZIP:
            return ""
        try:
            with zipfile.ZipFile(view) as archive:
                if not any(record.CRC for record in archive.infolist()):
                    return ""
                bad = archive.testzip()
        except DAMAGE as error:
            return str(error) or type(error).__name__
    return "" if bad is None else f"the CRC32 of {bad} does not hold"


class _Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError(f"it points to byte {at}")
        self._at = at
        return at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count
