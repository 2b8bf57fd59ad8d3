"""Parity between real holder processes: made while parts are filled, and what can be lost."""

from itertools import combinations
from pathlib import Path

import pytest

from phalanx.checkpoint.holder.client import HolderError
from tests.checkpoint.holder.nodes import Cluster, content, snapshot_memory

pytestmark = pytest.mark.holders

MIB = 1 << 20


@pytest.mark.parametrize(
    ("parts", "parity"),
    [
        ([[300_000], [300_000], [300_000]], 1),
        ([[5 * MIB + 11, 3], [MIB], [2 * MIB + 7, MIB, 100]], 1),
        ([[0], [3 * MIB + 1], [10]], 1),
        ([[100], [0, 0], [4 * MIB + 9], [3 * MIB, 77]], 2),
        pytest.param(
            [[100], [0, 0], [4 * MIB + 9], [3 * MIB, 77], [5], [MIB]], 2, marks=pytest.mark.slow
        ),
        ([[2 * MIB + 5], [70_000, 8]], 1),
        ([[0], [0]], 1),
    ],
)
def test_parity_is_what_one_call_makes(tmp_path: Path, parts: list[list[int]], parity: int) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(parts, parity=parity)
        for step in (1, 2, 3):  # the third overwrites the first
            cluster.snapshot(step % 2, step)
            for node in cluster.nodes:
                files = cluster.files(node, step % 2, step, name=f"{node}-{step}")
                assert files.pop(f"parity-{node:05d}.bin") == cluster.expected_parity(node, step)
                assert files.keys() == {
                    f"part-{rank:05d}.safetensors" for rank in cluster.ranks(node)
                }
                for rank in cluster.ranks(node):
                    data = content(len(cluster.memory[rank][0]), rank, step)
                    assert files[f"part-{rank:05d}.safetensors"].endswith(data)


@pytest.mark.parametrize(("k", "m"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_every_set_of_members_can_be_rebuilt(tmp_path: Path, k: int, m: int) -> None:
    parts = [[70_001 * (node + 1), 13 * node] for node in range(k + m)]
    with Cluster(tmp_path) as cluster:
        cluster.open(parts, parity=m)
        cluster.snapshot(0, 6)
        digests = cluster.snapshot(1, 7)
        before = {node: cluster.files(node, 1, 7, name=f"{node}") for node in cluster.nodes}
        lost_sets = [lost for size in range(1, m + 1) for lost in combinations(cluster.nodes, size)]
        for lost in lost_sets:
            for node in lost:
                cluster.kill(node)
            left = [node for node in cluster.nodes if node not in lost]
            sources = {node: cluster.clients[node].inventory().address for node in left}
            for node in lost:
                address = cluster.start(node).listen("127.0.0.1")
                cluster.clients[node].rebuild(
                    cluster.spec,
                    member=node,
                    step=7,
                    meta={"step": 7},
                    digests=digests,
                    sources=sources,
                )
                assert address == cluster.clients[node].inventory().address
                (slot,) = cluster.slots(node)
                assert (slot.slot, slot.step, slot.state) == (1, 7, "committed")
                assert slot.meta == {"step": 7}
                assert slot.digests == tuple(digests)
                name = f"{node} after {lost}"
                assert cluster.files(node, 1, 7, name=name) == before[node]


@pytest.mark.parametrize(("k", "m"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_memory_is_data_and_its_share_of_parity(tmp_path: Path, k: int, m: int) -> None:
    each, slots = 8 * MIB + 1000, 2
    with Cluster(tmp_path) as cluster:
        cluster.open([[each]] * (k + m), parity=m, slots=slots, populate=0)
        pids = [client.inventory().pid for client in cluster.clients.values()]
        assert sum(map(snapshot_memory, pids)) == 0
        cluster.snapshot(0, 1)
        cluster.snapshot(1, 2)
        cluster.snapshot(0, 3)
        used = sum(map(snapshot_memory, pids))
        assert used / (each * (k + m) * slots) == pytest.approx((k + m) / k, rel=0.05)
        for client in cluster.clients.values():
            client.forget("first")
        assert sum(map(snapshot_memory, pids)) == 0


def test_more_lost_than_parity(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[1000]] * 4, parity=1)
        digests = cluster.snapshot(0, 1)
        cluster.kill(1)
        cluster.kill(2)
        sources = {node: cluster.clients[node].inventory().address for node in (0, 3)}
        with pytest.raises(HolderError, match=r"member 1 of step 1 cannot be rebuilt: 3 of the 4"):
            cluster.start(1).rebuild(
                cluster.spec, member=1, step=1, meta={}, digests=digests, sources=sources
            )
        assert cluster.clients[1].inventory().epochs == ()
