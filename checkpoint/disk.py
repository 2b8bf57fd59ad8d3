"""The file system below torch.distributed.checkpoint: fingerprints while writing, names errors."""

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

from phalanx.checkpoint.manifest import Fingerprint


class RecordingFileSystem(FileSystem):
    """Remembers size and checksum of every file written through it, as the bytes went by.

    A file is so known by what was meant to be written, and is not read again. An OSError under
    torch.save, which torch reports as `unexpected pos`, is raised as what it was.
    """

    def __init__(self) -> None:
        self.files: dict[str, Fingerprint] = {}

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """Open a file."""
        if "w" not in mode:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        recorder: Recorder | None = None
        try:
            with Path(path).open(mode) as file:
                recorder = Recorder(cast(IO[bytes], file))
                yield recorder
        except Exception as error:
            if recorder is not None and recorder.error is not None:
                raise OSError(recorder.error.errno, recorder.error.strerror, str(path)) from error
            raise
        self.files[Path(path).name] = recorder.fingerprint()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, its fingerprint with it."""
        super().rename(path, new_path)
        if Path(path).name in self.files:
            self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class Recorder(io.IOBase):
    """A file that is written front to back, hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = xxhash.xxh3_64()
        self._size = 0
        self.error: OSError | None = None
        """The first error of the operating system."""

    def write(self, data: Any) -> int:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        if self._file.closed:
            return
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def fileno(self) -> int:
        """The descriptor, with nothing left in our buffer: what follows is an fsync."""
        self.flush()
        return self._file.fileno()

    def writable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or error
                raise
        super().close()

    def fingerprint(self) -> Fingerprint:
        """What was written."""
        return Fingerprint(size=self._size, xxh3_64=self._digest.hexdigest())
