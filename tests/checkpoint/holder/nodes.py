"""Real holder processes for tests: the nodes of a job, on this machine."""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from phalanx.checkpoint.boxes import TensorInfo, whole
from phalanx.checkpoint.erasure.codec import Codec
from phalanx.checkpoint.erasure.stripes import Stripes
from phalanx.checkpoint.format.table import PartTable, lay_out
from phalanx.checkpoint.holder.client import HolderClient, HolderGone
from phalanx.checkpoint.holder.inventory import SlotInventory
from phalanx.checkpoint.holder.spec import Spec
from phalanx.checkpoint.holder.start import start_holder

T = TypeVar("T")
_count = itertools.count()


def table_of(nbytes: int, *, rank: int = 0) -> PartTable:
    """A part of so many bytes: one tensor of 64-bit numbers and one of bytes, as far as they go."""
    wide, narrow = divmod(nbytes, 8)
    shapes = {f"w{rank}": ("F64", (wide,)), f"b{rank}": ("U8", (narrow,))}
    return lay_out(
        {
            name: [(TensorInfo(dtype=dtype, shape=shape), whole(shape))]
            for name, (dtype, shape) in shapes.items()
            if shape[0]
        }
    )


class Cluster:
    """The holders of a job and, in this process, all of its ranks."""

    def __init__(self, folder: Path, *, linger_s: float = 20.0) -> None:
        self.job = f"test-{os.getpid()}-{next(_count)}"
        self.folder = folder
        self.linger_s = linger_s
        self.directory = ""
        """Where the job saves, as holders say it."""
        self.clients: dict[int, HolderClient] = {}
        self.memory: dict[int, list[memoryview]] = {}
        """By rank."""
        self.hosts: dict[int, str] = {}
        """By node, where it is not this machine's own address."""
        self.spec: Spec
        """Of the epoch in use."""

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.clear()
        for client in self.clients.values():
            with suppress(HolderGone):
                client.finish()
            client.close()

    def start(self, node: int) -> HolderClient:
        """Start a node's holder, and connect to it anew."""
        if node in self.clients:
            self.clients[node].close()
        start_holder(
            self.job,
            node,
            directory=self.directory,
            linger_s=self.linger_s,
            log=self.log(node),
        )
        self.clients[node] = self.connect(node)
        return self.clients[node]

    def connect(self, node: int) -> HolderClient:
        """One more connection."""
        return HolderClient.connect(self.job, node)

    def log(self, node: int) -> Path:
        """A holder's log."""
        return self.folder / f"holder{node}.log"

    def open(
        self,
        parts: Sequence[Sequence[int]],
        *,
        parity: int = 0,
        slots: int = 2,
        populate: int = 1,
        epoch: str = "first",
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Begin an epoch on all nodes and attach all ranks; `parts`: bytes by node and rank."""
        nodes = range(len(parts))
        for node in nodes:
            if node not in self.clients:
                self.start(node)
        ranks, first = [], 0
        for some in parts:
            ranks.append(tuple(range(first, first + len(some))))
            first += len(some)
        sizes = [size for some in parts for size in some]
        self.spec = Spec(
            epoch=epoch,
            token=f"secret of {self.job}",
            parity=parity,
            num_slots=slots,
            groups=tuple(map(tuple, groups or _groups(len(parts), parity))),
            addresses=tuple(
                self.clients[node].listen(self.hosts.get(node, "127.0.0.1")) if parity else None
                for node in nodes
            ),
            ranks=tuple(ranks),
            parts=[table_of(size, rank=rank).to_json() for rank, size in enumerate(sizes)],
        )
        for node in nodes:
            self.clients[node].open(self.spec, member=node, populate=populate)
            for rank in ranks[node]:
                self.memory[rank] = self.clients[node].attach(epoch, rank)

    @property
    def epoch(self) -> str:
        """The one in use."""
        return self.spec.epoch

    @property
    def nodes(self) -> range:
        """Of the epoch."""
        return range(len(self.spec.ranks))

    def ranks(self, node: int) -> tuple[int, ...]:
        """Of a node."""
        return self.spec.ranks[node]

    def begin(self, slot: int, step: int, *, nodes: Iterable[int] | None = None) -> None:
        """As the ranks of these nodes."""
        for node in self.nodes if nodes is None else nodes:
            self.clients[node].begin(self.epoch, slot, step)

    def fill(
        self, slot: int, step: int, *, nodes: Iterable[int] | None = None, pieces: int = 3
    ) -> None:
        """Write what `content` gives, piece by piece."""
        for node in self.nodes if nodes is None else nodes:
            for rank in self.ranks(node):
                view = self.memory[rank][slot]
                data = content(len(view), rank, step)
                for piece in range(1, pieces + 1):
                    begin, end = len(view) * (piece - 1) // pieces, len(view) * piece // pieces
                    view[begin:end] = data[begin:end]
                    self.clients[node].filled(self.epoch, rank, slot, end)

    def protect(self, slot: int, step: int) -> list[dict[str, Any]]:
        """On all nodes at a time; by node."""
        return together(lambda node: self.clients[node].protect(self.epoch, slot, step), self.nodes)

    def commit(self, slot: int, step: int, digests: Sequence[int]) -> None:
        """On all nodes."""
        for node in self.nodes:
            self.clients[node].commit(self.epoch, slot, step, digests=digests, meta={"step": step})

    def snapshot(self, slot: int, step: int) -> list[int]:
        """All of it; the digests."""
        self.begin(slot, step)
        self.fill(slot, step)
        digests = [report["digest"] for report in self.protect(slot, step)]
        self.commit(slot, step, digests)
        return digests

    def slots(self, node: int, *, member: int | None = None) -> tuple[SlotInventory, ...]:
        """What a node's holder says of a member (its own) in this epoch."""
        epochs = self.clients[node].inventory().epochs
        held = next(held for held in epochs if held.epoch == self.epoch)
        return held.members[node if member is None else member]

    def kill(self, node: int) -> None:
        """kill -9 of a holder."""
        client = self.clients.pop(node)
        pid = client.inventory().pid
        os.kill(pid, signal.SIGKILL)
        with suppress(HolderGone):
            while True:
                client.inventory()
        client.close()

    def flip_parity(self, node: int, slot: int, *, at: int = 0) -> None:
        """Change one bit of a member's parity, as failing memory does."""
        pid = self.clients[node].inventory().pid
        flip_bit(pid, f"phalanx-{self.epoch}-parity{node}-slot{slot}", at)

    def files(self, node: int, slot: int, step: int, *, name: str) -> dict[str, bytes]:
        """What the holder writes to storage of a snapshot, by file."""
        folder = self.folder / name
        self.clients[node].drain(
            self.epoch, slot, step, url=str(self.folder), folder=name, storage={}
        )
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def expected_parity(self, member: int, step: int) -> bytes:
        """A member's parity of a snapshot, made in one go from all data."""
        spec = self.spec
        group = spec.group_of(member)
        stripes = Stripes.for_lengths([spec.length(other) for other in group], spec.parity)
        units = [_units(spec, other, step, stripes) for other in group]
        codec, made = Codec(stripes.k, stripes.m), bytearray()
        for unit in range(stripes.m):
            stripe = stripes.stripe_of_parity(group.index(member), unit)
            sources = [
                units[place][index] for index, place in enumerate(stripes.data_members(stripe))
            ]
            parities = [bytearray(stripes.unit_bytes) for _ in range(stripes.m)]
            codec.encode(sources, parities)
            made += parities[unit]
        return bytes(made)


def content(nbytes: int, rank: int, step: int) -> bytes:
    """What a rank has to save."""
    return random.Random(f"{rank} {step}").randbytes(nbytes)


def flip_bit(pid: int, name: str, at: int) -> None:
    """Change one bit of a process's memory that has this name."""
    descriptors = Path(f"/proc/{pid}/fd").iterdir()
    found = [path for path in descriptors if str(path.readlink()).startswith(f"/memfd:{name} ")]
    with found[0].open("r+b", buffering=0) as memory:
        [byte] = os.pread(memory.fileno(), 1, at)
        os.pwrite(memory.fileno(), bytes([byte ^ 16]), at)


def snapshot_memory(pid: int) -> int:
    """Bytes of the snapshots' memory that a process has mapped and that are there."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            ours = "memfd:phalanx" in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def together(do: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """The results by item; each in a thread, the first error is raised when all have ended."""
    items = list(items)
    with ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(do, item) for item in items]
    return [future.result() for future in futures]


def _groups(count: int, parity: int) -> list[list[int]]:
    return [list(range(count))] if parity else [[node] for node in range(count)]


def _units(spec: Spec, member: int, step: int, stripes: Stripes) -> list[bytes]:
    data = b"".join(content(spec.table(rank).nbytes, rank, step) for rank in spec.ranks[member])
    unit = stripes.unit_bytes
    return [data[j * unit : (j + 1) * unit].ljust(unit, b"\0") for j in range(stripes.k)]
