"""ISA-L through ctypes: Reed-Solomon at about the speed of memory, without copies or the GIL.

The library is the one that pyeclib's wheels carry; where there is none, the system's. Nothing of
pyeclib itself is imported. Its file's name is nobody's promise, so a library is used only after it
has made the same bytes as NumPy. Torch-free.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from phalanx.checkpoint.erasure.field import Bytes, parity_matrix
from phalanx.checkpoint.erasure.portable import Portable

SYSTEM_NAMES = ("libisal.so.2", "libisal.2.dylib")
CALL_BYTES = 1 << 30
"""Bytes of a row in one call; the library counts them in a C int."""
TABLE_BYTES = 32
"""Of each coefficient, in the form that the library wants."""


class IsaL:
    """A loaded library.

    Raises:
        OSError: the file is no library, or not one for this machine.
        ValueError: it lacks a function, or makes wrong bytes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = f"ISA-L ({path})"
        library = ctypes.CDLL(path)
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        try:
            self._init_tables = library.ec_init_tables
            self._encode = library.ec_encode_data
            self._update = library.ec_encode_data_update
        except AttributeError as error:
            raise ValueError(f"{path}: {error}") from None
        self._init_tables.argtypes = [integer, integer, pointer, pointer]
        self._encode.argtypes = [integer, integer, integer, pointer, pointer, pointer]
        self._update.argtypes = [integer] * 4 + [pointer] * 3
        for function in (self._init_tables, self._encode, self._update):
            function.restype = None
        self._tables = lru_cache(maxsize=256)(self._make_tables)
        _self_test(self, path)

    def multiply(self, matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """As `Backend.multiply`."""
        rows, columns = matrix.shape
        assert (rows, columns) == (len(targets), len(sources))
        tables = self._tables(rows, columns, matrix.tobytes())
        reads = (ctypes.c_void_p * columns)(*map(_address, sources))
        writes = (ctypes.c_void_p * rows)(*map(_address, targets))
        total = len(targets[0])
        for begin in range(0, total, CALL_BYTES):
            if begin:
                _advance(reads)
                _advance(writes)
            self._encode(min(CALL_BYTES, total - begin), columns, rows, tables, reads, writes)

    def add(self, coefficient: int, source: Bytes, target: Bytes) -> None:
        """As `Backend.add`."""
        tables = self._tables(1, 1, bytes([coefficient]))
        read, writes = _address(source), (ctypes.c_void_p * 1)(_address(target))
        total = len(target)
        for begin in range(0, total, CALL_BYTES):
            if begin:
                _advance(writes)
            length = min(CALL_BYTES, total - begin)
            self._update(length, 1, 1, 0, tables, read + begin, writes)

    def _make_tables(self, rows: int, columns: int, matrix: bytes) -> "ctypes.Array[ctypes.c_char]":
        tables = ctypes.create_string_buffer(TABLE_BYTES * rows * columns)
        self._init_tables(columns, rows, matrix, tables)
        return tables


def candidates() -> Iterator[str]:
    """Libraries to try, best first: files that exist, and names that the system may know."""
    spec = find_spec("pyeclib")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from map(str, sorted(Path(folder).with_name("pyeclib.libs").glob("libisal*")))
    yield from SYSTEM_NAMES


def _address(row: Bytes) -> int:
    return int(row.__array_interface__["data"][0])


def _advance(addresses: "ctypes.Array[ctypes.c_void_p]") -> None:
    """To where the next call begins."""
    addresses[:] = [address + CALL_BYTES for address in addresses]  # type: ignore[operator]


def _self_test(library: IsaL, path: str) -> None:
    """Compare it with NumPy: whole and odd lengths, odd addresses, bytes beyond the end.

    Raises:
        ValueError: they differ.
    """
    random = np.random.default_rng(20)
    for length in (0, 1, 31, 63, 64, 65, 1000, 4096 + 7):
        matrix = random.integers(0, 256, (7, 5), np.uint8)
        matrix[:3] = parity_matrix(5, 3)
        sources = list(random.integers(0, 256, (5, length + 3), np.uint8)[:, 3:])
        ours = random.integers(0, 256, (8, length + 64), np.uint8)
        theirs = ours.copy()
        for backend, found in ((Portable(), ours), (library, theirs)):
            rows = [row[5 : 5 + length] for row in found]
            backend.multiply(matrix, sources, rows[:-1])
            for coefficient in (1, 0x8E):
                backend.add(coefficient, sources[0], rows[-1])
        if not np.array_equal(ours, theirs):
            raise ValueError(f"{path}: makes wrong bytes of rows of {length}")
