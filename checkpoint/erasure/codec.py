"""Reed-Solomon over bytes: k units of data, m of parity, any m of the k + m may be lost.

Parities can be made at once, or by and by as units come in, in any order. The code is linear and
works byte by byte: units may be cut anywhere, if all are cut alike. Arithmetic is a library's with
SIMD, or NumPy's with the same bytes. Torch-free.
"""

import mmap
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from phalanx.checkpoint.erasure.field import Bytes, matrix_inverse, matrix_product, parity_matrix
from phalanx.checkpoint.erasure.isal import IsaL, candidates
from phalanx.checkpoint.erasure.portable import Backend, Portable

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | npt.NDArray[Any]
"""Memory of one unit; contiguous. What is written may not be bytes."""


class Codec:
    """Makes parities and rebuilds what is lost; units are numbered data first (0 to k - 1), then
    parity (k to k + m - 1).

    Units are anything with the buffer protocol, contiguous, of one length in each call; nothing is
    copied. What is written may overlap nothing else. Parity 0 is the XOR of the data, so m = 1 is
    XOR alone. Any number of threads may use a codec; the GIL is free while bytes are worked on.

    Args:
        k: units of data.
        m: units of parity; 0 or more.
        backend: whose arithmetic; None = the best that works here.

    Raises:
        ValueError: k < 1, m < 0 or k + m > 255. Methods raise it for units of unequal lengths, and
            for read-only memory to write to.
    """

    def __init__(self, k: int, m: int, *, backend: Backend | None = None) -> None:
        self.k, self.m = k, m
        self.backend = best_backend() if backend is None else backend
        self._parity = parity_matrix(k, m)

    def encode(self, sources: Sequence[Buffer | None], parities: Sequence[Buffer]) -> None:
        """Make all parities of all k units of data; None = a unit of zeros."""
        if len(sources) != self.k or len(parities) != self.m:
            raise ValueError(
                f"{len(sources)} units of data and {len(parities)} of parity given to a codec of "
                f"{self.k} + {self.m}"
            )
        self._multiply(self._parity, sources, parities)

    def fold(
        self,
        index: int,
        source: Buffer | None,
        parity: int,
        target: Buffer,
        *,
        first: bool,
    ) -> None:
        """Add unit `index` of the data to parity `parity` (0 to m - 1), which `target` holds.

        When each of the k units has been added once, in any order, the parity is what `encode`
        makes of them. Added a second time, a unit is taken out again.

        Args:
            source: None = a unit of zeros.
            first: what is in `target` is of no account and is overwritten.
        """
        if not (0 <= index < self.k and 0 <= parity < self.m):
            raise ValueError(
                f"no unit {index} of data or no parity {parity} in a codec of {self.k} + {self.m}"
            )
        if first:
            self._multiply(self._parity[parity, index].reshape(1, 1), [source], [target])
        elif source is not None:
            read, written = _readable(source), _writable(target)
            _check_lengths([read], [written])
            self.backend.add(int(self._parity[parity, index]), read, written)

    def rebuild(self, present: Mapping[int, Buffer | None], missing: Mapping[int, Buffer]) -> None:
        """Fill the `missing` units from k of those present; None = a unit of zeros.

        Raises:
            ValueError: fewer than k are present, or one is both present and missing, or unknown.
        """
        known = range(self.k + self.m)
        if len(present) < self.k:
            raise ValueError(
                f"{len(present)} units cannot be rebuilt from: a codec of {self.k} + {self.m} "
                f"needs {self.k}"
            )
        if present.keys() & missing.keys() or not all(
            unit in known for unit in (*present, *missing)
        ):
            raise ValueError(
                f"present {sorted(present)}, missing {sorted(missing)}: must be different units "
                f"of 0 to {self.k + self.m - 1}"
            )
        used = sorted(present)[: self.k]
        matrix = _decoder(self.k, self.m, tuple(used), tuple(missing))
        self._multiply(matrix, [present[unit] for unit in used], list(missing.values()))

    def _multiply(
        self, matrix: Bytes, sources: Sequence[Buffer | None], targets: Sequence[Buffer]
    ) -> None:
        reads = [_readable(source) for source in sources if source is not None]
        writes = [_writable(target) for target in targets]
        _check_lengths(reads, writes)
        if not writes or not len(writes[0]):
            return
        if reads:
            if len(reads) < len(sources):
                matrix = matrix[:, [source is not None for source in sources]]
            self.backend.multiply(matrix, reads, writes)
        else:
            for target in writes:
                target[:] = 0


@lru_cache(maxsize=256)
def _decoder(k: int, m: int, used: tuple[int, ...], missing: tuple[int, ...]) -> Bytes:
    """The matrix that makes missing units of k used ones."""
    rows = np.concatenate([np.eye(k, dtype=np.uint8), parity_matrix(k, m)])
    return matrix_product(rows[list(missing)], matrix_inverse(rows[list(used)]))


@cache
def best_backend() -> Backend:
    """The fastest library that works here, tried once a process; else NumPy, with a warning.

    A library that is there but fails is warned of too, with the reason.
    """
    for path in candidates():
        try:
            return IsaL(path)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or "/" in path:  # no such system library is no news
                warnings.warn(f"ISA-L is not used from {path}: {error}", stacklevel=2)
    warnings.warn(
        "no working ISA-L was found: snapshots' parities are made by NumPy, several times slower; "
        "`pip install pyeclib` (Linux), or install the system's libisal",
        stacklevel=2,
    )
    return Portable()


def _readable(buffer: Buffer) -> Bytes:
    """The buffer's bytes, where they are."""
    return np.frombuffer(buffer, np.uint8)


def _writable(buffer: Buffer) -> Bytes:
    row = np.frombuffer(buffer, np.uint8)
    if not row.flags.writeable:
        raise ValueError("a unit to be written lies in read-only memory")
    return row


def _check_lengths(reads: Sequence[Bytes], writes: Sequence[Bytes]) -> None:
    lengths = {*map(len, reads), *map(len, writes)}
    if len(lengths) > 1:
        raise ValueError(f"units of unequal lengths: {', '.join(map(str, sorted(lengths)))} bytes")
