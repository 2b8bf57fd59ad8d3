"""A restore in a process of its own that counts what it asks of the source, in memory that stays
when it is killed: `python -m tests.checkpoint.tool.counted_restore COUNTER RANKS SRC DST ...`."""

import mmap
import sys
import threading
from pathlib import Path

import numpy as np

from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.storage.metered import Metered
from phalanx.checkpoint.tool.reading import tensors_of
from phalanx.checkpoint.tool.restore.plan import Cutting
from phalanx.launch.cli import main
from phalanx.launch.verbs.checkpoint import verb
from tests.checkpoint.stored import cut


def new_counter(path: Path) -> np.ndarray:
    """A counter at 0, shared with the processes that are given its path."""
    path.write_bytes(bytes(8))
    return _counter(path)


def _counter(path: Path) -> np.ndarray:
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 8), np.uint64)


def _count_reads(path: Path) -> None:
    counter, lock, read_into = _counter(path), threading.Lock(), Metered.read_into

    def counted(self: Metered, name: str, offset: int, view: memoryview) -> None:
        with lock:  # before it is read: a kill in between counts all of it
            counter[0] += np.uint64(len(view))
        read_into(self, name, offset, view)

    Metered.read_into = counted  # type: ignore[method-assign]


def cut_by_columns(ranks: int) -> None:
    """Let --layout mean: every tensor by columns over so many ranks; without importing torch."""

    def cut_for(manifest: Manifest, wanted: dict[str, str]) -> Cutting:
        shapes = {
            name: np.lib.stride_tricks.as_strided(
                np.zeros(1, KINDS[info.dtype]), info.shape, [0] * len(info.shape)
            )
            for name, info in tensors_of(manifest).items()
        }
        return Cutting(
            text=str(wanted), tables=tuple(cut(shapes, ranks, dim=1)), layout={"tp": ranks}
        )

    verb._cut_for = cut_for


KINDS = {"F32": "f4", "F64": "f8", "U8": "u1", "BF16": "u2", "I64": "i8"}

if __name__ == "__main__":
    _count_reads(Path(sys.argv[1]))
    cut_by_columns(int(sys.argv[2]))
    sys.exit(main(["checkpoint", "restore", *sys.argv[3:]]))
