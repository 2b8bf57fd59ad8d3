"""Token corpora on disk, in Megatron's format: `PREFIX.bin` and `PREFIX.idx`.

`PREFIX.bin` is nothing but tokens. `PREFIX.idx`, all little-endian: the magic `MMIDIDX\\0\\0`, a
version (u64, 1), a code for the token's number format (u8), the number of sequences (u64), the
number of document marks (u64); then each sequence's length in tokens (i32) and place in the .bin in
bytes (i64), and the marks (i64): document d is sequences mark[d] to mark[d+1] - 1, and the first
mark is 0. Multimodal corpora add one byte for each sequence, which is not read here.
"""

import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
UINT16_LIMIT = 65500
"""Vocabularies below this are written as uint16, as Megatron does; larger ones as int32."""


def pair(prefix: str | Path) -> tuple[Path, Path]:
    """The two files of a corpus: `.bin`, `.idx`."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class TokenFile:
    """A corpus, memory-mapped."""

    def __init__(self, prefix: str | Path) -> None:
        """Open `prefix.bin` and `prefix.idx`.

        Raises:
            ValueError: a file is missing, cut short, of a foreign format, or the two disagree.
        """
        self.prefix = str(prefix)
        bin_path, idx_path = pair(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; a corpus is {bin_path.name} and {idx_path.name}"
                )
        dtype, lengths, pointers, marks = _read_index(idx_path)
        num_tokens = _check_layout(idx_path, dtype, lengths, pointers, marks)
        _check_size(bin_path, bin_path.stat().st_size, num_tokens * dtype.itemsize, idx_path)
        self.tokens: NDArray[Any] = np.memmap(bin_path, dtype=dtype, mode="r")
        """All tokens of the corpus, one after the other."""
        starts = np.append(pointers, num_tokens * dtype.itemsize) // dtype.itemsize
        self.offsets: NDArray[np.int64] = starts[marks]
        """Document d is tokens[offsets[d] : offsets[d + 1]]."""

    @property
    def num_documents(self) -> int:
        """Documents of the corpus."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the corpus."""
        return len(self.tokens)

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document (a view of the file)."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Number format, sequence lengths, sequence places in bytes, document marks."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise ValueError(
            f"{path}: begins with {header[:9]!r}, not {MAGIC!r}; this is no Megatron index"
        )
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: {size} bytes, cut short within the header of {HEADER.size}")
    _, version, code, num_sequences, num_marks = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{path}: version {version} of the index format; only {VERSION} is known")
    dtype = np.dtype(DTYPES[code]) if code in DTYPES else None
    if dtype is None or dtype.kind not in "iu":
        named = f"{dtype}" if dtype is not None else "unknown"
        raise ValueError(f"{path}: number format {code} ({named}); tokens must be integers")
    need = HEADER.size + 12 * num_sequences + 8 * num_marks
    if size not in (need, need + num_sequences):
        state = "cut short" if size < need else "too long"
        raise ValueError(
            f"{path}: {size} bytes, {state}: {num_sequences} sequences and {num_marks} document "
            f"marks take {need}"
        )
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    first, second = HEADER.size + 4 * num_sequences, HEADER.size + 12 * num_sequences
    lengths = np.frombuffer(raw, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", num_sequences, first)
    return dtype, lengths, pointers, np.frombuffer(raw, "<i8", num_marks, second)


def _check_layout(
    path: Path,
    dtype: np.dtype[Any],
    lengths: NDArray[Any],
    pointers: NDArray[Any],
    marks: NDArray[Any],
) -> int:
    """Check that sequences follow each other and documents cover them; count the tokens."""
    if not len(lengths) or not len(marks):
        raise ValueError(f"{path}: holds no documents")
    if lengths.min() < 0:
        raise ValueError(f"{path}: a sequence has a negative length")
    sizes = lengths.astype(np.int64) * dtype.itemsize
    if pointers[0] != 0 or not np.array_equal(pointers[1:], pointers[:-1] + sizes[:-1]):
        raise ValueError(f"{path}: its sequences do not follow each other in the .bin")
    if marks[0] != 0 or marks[-1] != len(lengths) or (np.diff(marks) < 0).any():
        raise ValueError(
            f"{path}: its document marks go from {marks[0]} to {marks[-1]}; they must rise from 0 "
            f"to its {len(lengths)} sequences"
        )
    num_tokens = int(pointers[-1] + sizes[-1]) // dtype.itemsize
    if num_tokens == 0:
        raise ValueError(f"{path}: holds no tokens")
    return num_tokens


def _check_size(path: Path, size: int, need: int, idx_path: Path) -> None:
    if size != need:
        state = "cut short" if size < need else "too long"
        raise ValueError(f"{path}: {size} bytes, {state}: {idx_path.name} speaks of {need}")


class TokenWriter:
    """Writes a corpus, one sequence a document; use as a context manager.

    Both files grow under temporary names and take their own, the .idx last, when all went well.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.dtype = np.dtype("<u2" if vocab_size < UINT16_LIMIT else "<i4")
        self._paths = pair(prefix)
        self._temporary = pair(f"{prefix}.tmp")
        self._lengths: list[int] = []
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._temporary[0].open("wb")

    def add(self, tokens: NDArray[Any]) -> None:
        """Append one document."""
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(len(tokens))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bin.close()
        if kind is not None:
            self._temporary[0].unlink()
            return
        self._write_index(self._temporary[1])
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            temporary.replace(path)

    def _write_index(self, path: Path) -> None:
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        pointers = ends - lengths * np.int64(self.dtype.itemsize)
        code = {np.dtype(name): code for code, name in DTYPES.items()}[self.dtype]
        header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1)
        marks = np.arange(len(lengths) + 1, dtype="<i8")
        path.write_bytes(header + lengths.tobytes() + pointers.tobytes() + marks.tobytes())
