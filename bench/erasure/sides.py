"""Who makes parities and rebuilds units: our codec, ISA-L called bare, pyeclib, a plain copy."""

import ctypes
import mmap
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from phalanx.checkpoint.erasure.codec import Codec, best_backend
from phalanx.checkpoint.erasure.field import Bytes
from phalanx.checkpoint.erasure.isal import IsaL

OURS, ISAL, PYECLIB, MEMCPY = "ours", "isal", "pyeclib", "memcpy"
SEGMENT = 1 << 20
"""Bytes that pyeclib's functions are given at a time: it copies, and is fastest with about so many
(measured from 256 KiB to 64 MiB)."""


class Side(Protocol):
    """Works on the memory that it was made with, of which the first m units count as lost."""

    def encode(self) -> None:
        """Make all parities."""

    def rebuild(self) -> None:
        """Make the lost units of what remains; parities must have been made."""

    def check(self) -> bool:
        """Whether what was rebuilt last is what was lost."""


@dataclass(frozen=True)
class Memory:
    """What all sides read and write in turn, so that none has better pages than another."""

    data: list[Bytes]
    parities: list[Bytes]
    rebuilt: list[Bytes]
    copies: list[Bytes]

    @classmethod
    def make(cls, k: int, m: int, length: int) -> "Memory":
        """Units of random bytes and room for the rest, row behind row as in a snapshot."""
        memory = np.frombuffer(mmap.mmap(-1, (2 * k + 2 * m) * length), np.uint8)
        memory[:] = 1  # every page is there before anything is timed
        rows = list(memory.reshape(2 * k + 2 * m, length))
        random = np.random.default_rng(k)
        for row in rows[:k]:
            row[:] = np.frombuffer(random.bytes(length), np.uint8)
        return cls(rows[:k], rows[k : k + m], rows[k + m : k + 2 * m], rows[k + 2 * m :])

    def is_rebuilt(self) -> bool:
        """Whether what was rebuilt is what was lost; forgets it."""
        same = all(map(np.array_equal, self.rebuilt, self.data))
        for row in self.rebuilt:
            row[:] = 1
        return same


class Ours:
    """Our codec, as it comes."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._codec = Codec(len(memory.data), len(memory.parities))
        units = enumerate([*memory.data, *memory.parities])
        self._present = {unit: row for unit, row in units if unit >= self._codec.m}
        self._missing = dict(enumerate(memory.rebuilt))

    def encode(self) -> None:
        """As `Side.encode`."""
        self._codec.encode(self._memory.data, self._memory.parities)

    def fold(self) -> None:
        """Make all parities from one unit after the other."""
        for index, row in enumerate(self._memory.data):
            for number, parity in enumerate(self._memory.parities):
                self._codec.fold(index, row, number, parity, first=index == 0)

    def rebuild(self) -> None:
        """As `Side.rebuild`."""
        self._codec.rebuild(self._present, self._missing)

    def check(self) -> bool:
        """As `Side.check`."""
        return self._memory.is_rebuilt()


class BareIsal:
    """ISA-L's own matrices, and all that can be prepared prepared: each turn is one call of it."""

    def __init__(self, memory: Memory) -> None:
        backend = best_backend()
        assert isinstance(backend, IsaL)
        self._memory, self._library = memory, ctypes.CDLL(backend.path)
        data, parities = memory.data, memory.parities
        self._k, self._m, self._length = len(data), len(parities), len(data[0])
        self._pointers = [
            (ctypes.c_void_p * len(rows))(*(row.ctypes.data for row in rows))
            for rows in (data, parities, [*data[self._m :], *parities], memory.rebuilt)
        ]
        m = self._m
        k, size = self._k, self._k + m
        matrix = np.zeros((size, k), np.uint8)
        self._library.gf_gen_cauchy1_matrix(_pointer(matrix), size, k)
        remaining, decoder = matrix[m:].copy(), np.zeros((k, k), np.uint8)
        assert self._library.gf_invert_matrix(_pointer(remaining), _pointer(decoder), k) == 0
        self._encoder_tables = self._tables(matrix[k:].copy())
        self._decoder_tables = self._tables(decoder[:m].copy())

    def _tables(self, matrix: Bytes) -> Bytes:
        tables = np.zeros(32 * matrix.size, np.uint8)
        self._library.ec_init_tables(self._k, self._m, _pointer(matrix), _pointer(tables))
        return tables

    def encode(self) -> None:
        """As `Side.encode`."""
        self._call(self._encoder_tables, *self._pointers[:2])

    def rebuild(self) -> None:
        """As `Side.rebuild`."""
        self._call(self._decoder_tables, *self._pointers[2:])

    def _call(self, tables: Bytes, reads: Any, writes: Any) -> None:
        self._library.ec_encode_data(
            self._length, self._k, self._m, _pointer(tables), reads, writes
        )

    def check(self) -> bool:
        """As `Side.check`."""
        return self._memory.is_rebuilt()


class PyEclib:
    """pyeclib's functions over segments of the data; they give new bytes each time."""

    def __init__(self, memory: Memory) -> None:
        from pyeclib.ec_iface import ECDriver

        m = len(memory.parities)
        self._driver = ECDriver(k=len(memory.data), m=m, ec_type="isa_l_rs_cauchy")
        self._lost = list(range(m))
        whole = np.concatenate(memory.data)
        begins = range(0, len(whole), SEGMENT)
        self._segments = [whole[begin : begin + SEGMENT].tobytes() for begin in begins]
        encoded = [self._driver.encode(segment) for segment in self._segments]
        self._present = [fragments[m:] for fragments in encoded]
        self._last_lost = encoded[-1][:m]
        self._last_rebuilt: list[bytes] = []

    def encode(self) -> None:
        """As `Side.encode`."""
        for segment in self._segments:
            self._driver.encode(segment)

    def rebuild(self) -> None:
        """As `Side.rebuild`."""
        for fragments in self._present:
            self._last_rebuilt = self._driver.reconstruct(fragments, self._lost)

    def check(self) -> bool:
        """As `Side.check`, of the last segment."""
        return bool(self._last_rebuilt == self._last_lost)


class Copy:
    """The data copied, whatever is asked for."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def encode(self) -> None:
        """Copy all of the data."""
        for row, copy in zip(self._memory.data, self._memory.copies, strict=True):
            ctypes.memmove(_pointer(copy), _pointer(row), len(row))

    rebuild = encode

    def check(self) -> bool:
        """Whether the copies are the data."""
        return all(map(np.array_equal, self._memory.copies, self._memory.data))


def sides() -> tuple[dict[str, Any], list[str]]:
    """What can be measured on this machine, by name, and who is left out, with the reason."""
    found: dict[str, Any] = {OURS: Ours, MEMCPY: Copy}
    missing = []
    if isinstance(best_backend(), IsaL):
        found[ISAL] = BareIsal
    else:
        missing.append("ISA-L (no library that works)")
    if find_spec("pyeclib"):
        found[PYECLIB] = PyEclib
    else:
        missing.append("pyeclib (not installed)")
    return found, missing


def _pointer(row: Bytes) -> ctypes.c_void_p:
    return ctypes.c_void_p(row.ctypes.data)
