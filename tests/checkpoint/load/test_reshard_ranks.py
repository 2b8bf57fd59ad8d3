"""Any cut of tensors loads into any other, each stored box read once; damage stops all ranks."""

import random
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from phalanx.checkpoint.boxes import Box, TensorInfo, whole
from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.format.table import PartTable, lay_out
from phalanx.checkpoint.load import forward, loading, reshard
from phalanx.checkpoint.load.reads import locate, needed, plan_reads, volume
from phalanx.checkpoint.load.reshard import Moved, load
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.torch_types import TORCH_TYPES
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.load.cuts import (
    Cuts,
    MemorySource,
    Run,
    cut,
    distinct_bytes,
    empty_chunk,
    random_layout,
    random_wants,
    same_bytes,
    some_tensors,
)


def load_random(
    ranks: Ranks, seeds: list[int], round_bytes: int, alone: int, direct: bool
) -> list[Any]:
    with process_group(ranks):
        if not direct:  # as for tensors of a GPU
            loading._takes_bytes = lambda target, dtype: False
        reshard.ROUND_BYTES = round_bytes
        forward.ALONE_BYTES = alone
        peers = Peers(dist.new_group(backend="gloo"))
        found = []
        for seed in seeds:
            rng = random.Random(seed)
            tensors = some_tensors(rng)
            source = MemorySource(tensors, random_layout(rng, tensors, rng.randint(1, 6)))
            wants = random_wants(rng, tensors, ranks.world_size)
            mine = wants[ranks.rank]
            chunks = {
                name: empty_chunk(tensors[name], box, strided=rng.random() < 0.3)
                for name, box in mine.items()
            }
            told: list[int] = []
            moved = load(source, chunks, peers=peers, on_bytes=told.append)
            for name, chunk in chunks.items():
                assert same_bytes(chunk.local, cut(tensors[name], mine[name])), (seed, name)
            assert sum(told) == moved.read
            touched = {
                (located.part, located.index)
                for number in {
                    number for want in wants for number in needed(locate(source.tables), want)
                }
                for located in [locate(source.tables)[number]]
            }
            found.append((moved, source.reads, touched, distinct_bytes(tensors, wants)))
        return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("round_bytes", "alone", "direct"),
    [(1 << 26, 1 << 20, True), (3000, 500, True), (3000, 500, False)],
)
def test_any_cut_loads_into_any_other(
    run_ranks: Run, world_size: int, round_bytes: int, alone: int, direct: bool
) -> None:
    seeds = list(range(world_size * 10, world_size * 10 + 6))
    by_rank = run_ranks(load_random, seeds, round_bytes, alone, direct, world_size=world_size)
    for at in range(len(seeds)):
        _, _, touched, distinct = by_rank[0][at]
        reads = [read for found in by_rank for read in found[at][1]]
        assert sorted(reads) == sorted(touched), "each needed box once in the job, no other"
        moved: list[Moved] = [found[at][0] for found in by_rank]
        assert sum(one.needed for one in moved) == distinct
        assert (sum(one.forwarded for one in moved) > 0) == (world_size > 1)


def load_replicas(ranks: Ranks) -> tuple[Moved, int]:
    """Four equal copies of a model that was saved in four parts of its rows."""
    with process_group(ranks):
        tensors = {f"w{i}": torch.randn(8, 50) for i in range(10)}
        dist.broadcast_object_list(holder := [tensors])
        tensors = holder[0]
        parts = [{name: [Box((2 * r, 0), (2, 50))] for name in tensors} for r in range(4)]
        source = MemorySource(tensors, parts)
        chunks = {name: empty_chunk(t, whole(t.shape)) for name, t in tensors.items()}
        moved = load(source, chunks, peers=Peers(dist.group.WORLD))
        assert all(torch.equal(chunks[name].local, t) for name, t in tensors.items())
        return moved, sum(table.nbytes for table in source.tables)


def test_replicas_read_once_and_evenly(run_ranks: Run) -> None:
    found = run_ranks(load_replicas)
    total = found[0][1]
    for moved, _ in found:
        assert moved.read == moved.needed == total // 4
        assert moved.forwarded == 3 * total // 4


def load_near(ranks: Ranks) -> list[tuple[int, int]]:
    """Parts in the memory of two nodes: only the ranks of a node can read its own."""
    with process_group(ranks):
        tensors = {"a": torch.arange(100), "b": torch.arange(100.0).view(10, 10)}
        parts: list[Cuts] = [
            {"a": [Box((0,), (60,))], "b": [Box((0, 0), (5, 10))]},
            {"a": [Box((60,), (40,))], "b": [Box((5, 0), (5, 10))]},
        ]
        source = MemorySource(tensors, parts, near={0: [0, 1], 1: [2, 3]})
        want = {0: [], 1: ["b"], 2: ["a"], 3: ["a", "b"]}[ranks.rank]
        chunks = {name: empty_chunk(tensors[name], whole(tensors[name].shape)) for name in want}
        load(source, chunks, peers=Peers(dist.group.WORLD))
        assert all(torch.equal(chunk.local, tensors[name]) for name, chunk in chunks.items())
        return source.reads


def test_only_near_ranks_read(run_ranks: Run) -> None:
    found = run_ranks(load_near)
    assert sorted(read for reads in found for read in reads) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(part == rank // 2 for rank, reads in enumerate(found) for part, _ in reads)
    assert (0, 1) in found[1], "a rank that needs the box reads it before one that does not"


def load_converted(ranks: Ranks) -> None:
    with process_group(ranks):
        values = torch.tensor([1.0, 1.0 + 2**-20, -3.5, 1e-3])
        tensors = {
            "wide": values,
            "narrow": values.bfloat16(),
            "tiny": values.to(TORCH_TYPES["F8_E4M3"]),
        }
        source = MemorySource(tensors, [{name: [whole((4,))] for name in tensors}])
        into = {"wide": torch.bfloat16, "narrow": torch.float64, "tiny": torch.float32}
        loaded = {name: torch.zeros(4, dtype=dtype) for name, dtype in into.items()}
        chunks = {
            name: Chunk(local=local, size=local.shape, offsets=torch.Size([0]))
            for name, local in loaded.items()
        }
        load(source, chunks, peers=Peers(dist.group.WORLD))
        for name, local in loaded.items():
            assert torch.equal(local, tensors[name].to(into[name]))


def test_floating_types_are_converted_on_every_rank(run_ranks: Run) -> None:
    run_ranks(load_converted, world_size=2)


# --- failures -------------------------------------------------------------------------------------


def load_broken(ranks: Ranks, what: str) -> str:
    with process_group(ranks):
        reshard.ROUND_BYTES = 100
        tensors = {f"w{i}": torch.arange(40.0).view(4, 10) + i for i in range(8)}
        parts: list[Cuts] = [
            {name: [Box((2 * part, 0), (2, 10))] for name in tensors} for part in range(2)
        ]
        source = MemorySource(tensors, parts)
        chunks = {name: empty_chunk(t, whole(t.shape)) for name, t in tensors.items()}
        if what == "flip":
            source.bytes[1][5][17] ^= 4
        elif what == "lost":
            source.bytes[0][2] = bytearray()
        elif what == "gap" and ranks.rank == 1:
            source.tables.pop()
        elif what == "other" and ranks.rank == 1:
            table = source.tables[0]
            source.tables[0] = PartTable(table.entries[::-1])
        elif what == "type" and ranks.rank == 1:
            local = torch.zeros(4, 10, dtype=torch.int32)
            chunks["w3"] = Chunk(local=local, size=local.shape, offsets=torch.Size([0, 0]))
        elif what == "name" and ranks.rank == 1:
            chunks["gone"] = chunks["w3"]
        with pytest.raises(CheckpointError) as caught:
            load(source, chunks, peers=Peers(dist.group.WORLD))
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("load")]
        assert not threads
        return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("flip", r"load: rank \d: BrokenCheckpointError: part 1 is damaged: w5\[2:4,0:10\]"),
        ("lost", r"load: rank \d: ValueError: "),
        ("gap", r"rank 1: w0: the 40 elements of \[4, 10\] at \[0, 0\] are not stored"),
        ("other", "the ranks see different checkpoints"),
        ("type", "rank 1: w3 is torch.float32 there and torch.int32 here"),
        ("name", r"rank 1: it lacks 1 of 9 tensors: gone \[4, 10\]; it was saved from another"),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_one_rank_s_failure_is_known_to_all(
    run_ranks: Run, what: str, message: str, world_size: int
) -> None:
    texts = run_ranks(load_broken, what, world_size=world_size)
    assert len(set(texts)) == 1
    assert re.search(message, texts[0]), texts[0]


def test_what_is_stored_twice_is_refused() -> None:
    tensors = {"a": torch.arange(6)}
    halves = [Box((0,), (3,)), Box((2,), (3,))]  # as many elements as are wanted, one of them twice
    source = MemorySource(tensors, [{"a": halves}])
    chunks = {"a": empty_chunk(tensors["a"], whole((6,)))}
    with pytest.raises(CheckpointError, match="a: the 6 elements .* hold 6 of them"):
        load(source, chunks, peers=Peers(None))


# --- the plan -------------------------------------------------------------------------------------


def grid(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return (tuple(map(int, index)) for index in torch.ones(shape).nonzero())


def test_volume_counts_every_element_once() -> None:
    rng = random.Random(3)
    for _ in range(100):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        boxes = []
        for _ in range(rng.randint(0, 5)):
            begins = [rng.randint(0, size) for size in shape]
            ends = [rng.randint(begin, size) for begin, size in zip(begins, shape, strict=True)]
            sizes = (end - begin for begin, end in zip(begins, ends, strict=True))
            boxes.append(Box(tuple(begins), tuple(sizes)))
        inside = sum(
            any(box.overlap(Box(at, (1,) * len(at))) is not None for box in boxes)
            for at in grid(shape)
        )
        assert volume(boxes) == inside


def test_rounds_are_bounded_and_reads_balanced() -> None:
    sizes = [10, 300, 20, 120, 500, 40, 70, 90, 250, 130]
    table = lay_out(
        {f"w{i}": [(TensorInfo(dtype="U8", shape=(n,)), whole((n,)))] for i, n in enumerate(sizes)}
    )
    boxes = locate([table])
    everything = list(range(len(sizes)))
    rounds = plan_reads(boxes, [everything] * 3, near=lambda part: (), round_bytes=256)
    reads = [read for some in rounds for read in some]
    assert sorted(read.located.index for read in reads) == everything
    by_rank = [
        sum(read.located.entry.nbytes for read in reads if read.reader == rank) for rank in range(3)
    ]
    assert max(by_rank) - min(by_rank) <= 20
    assert len(rounds) > 1
    for in_round in rounds:
        for rank in range(3):
            some = [read.located.entry.nbytes for read in in_round if read.reader == rank]
            assert sum(some) <= 256 or len(some) == 1


# --- accelerators ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_are_filled_through_host_memory() -> None:
    tensors = {"a": torch.randn(1000, 300), "b": torch.randn(50).bfloat16()}
    source = MemorySource(tensors, [{name: [whole(t.shape)] for name, t in tensors.items()}])
    wide = torch.zeros(1000, 600, device="cuda")
    loaded = {"a": wide[:, ::2], "b": torch.zeros(50, device="cuda")}
    chunks = {
        name: Chunk(local=local, size=local.shape, offsets=torch.Size([0] * local.ndim))
        for name, local in loaded.items()
    }
    load(source, chunks, peers=Peers(None))
    assert torch.equal(loaded["a"].cpu(), tensors["a"])
    assert torch.equal(loaded["b"].cpu(), tensors["b"].float())
    assert not bool(wide[:, 1::2].any())
