"""Holders and ranks that die, lag or run ahead while a snapshot is protected."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoint.holder.client import HolderError
from tests.checkpoint.holder.nodes import Cluster, content, together

MIB = 1 << 20
PARTS = [[3 * MIB + 5], [MIB, MIB], [2 * MIB]]


def outcome(cluster: Cluster, node: int, slot: int, step: int) -> str:
    """What `protect` raises."""
    with pytest.raises(HolderError) as caught:
        cluster.clients[node].protect(cluster.epoch, slot, step)
    return str(caught.value)


def check_parity(cluster: Cluster, slot: int, step: int) -> None:
    """Every member's parity is that of the step's content."""
    for node in cluster.nodes:
        files = cluster.files(node, slot, step, name=f"check-{cluster.epoch}-{step}-{node}")
        parity = files[f"parity-{node:05d}.bin"]
        assert parity == cluster.expected_parity(node, step), node


def test_pushes_before_others_begin(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        cluster.snapshot(0, 1)
        for node in (2, 0, 1):  # one after the other, whole
            assert cluster.slots(node)[0].state == "committed"
            cluster.begin(1, 2, nodes=[node])
            cluster.fill(1, 2, nodes=[node])
            time.sleep(0.1)
        digests = [report["digest"] for report in cluster.protect(1, 2)]
        check_parity(cluster, 1, 2)
        cluster.commit(1, 2, digests)


def test_who_is_ahead_waits_for_the_others_commit(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        cluster.snapshot(0, 1)
        cluster.begin(1, 2)
        cluster.fill(1, 2)
        digests = [report["digest"] for report in cluster.protect(1, 2)]
        cluster.clients[0].commit("first", 1, 2, digests=digests, meta={})
        cluster.begin(0, 3, nodes=[0])
        cluster.fill(0, 3, nodes=[0])
        time.sleep(0.3)
        for node in (1, 2):  # step 1 stands there, and its parity
            states = [(slot.step, slot.state) for slot in cluster.slots(node)]
            assert states == [(1, "committed"), (2, "complete")]
            files = cluster.files(node, 0, 1, name=f"old{node}")
            assert files[f"parity-{node:05d}.bin"] == cluster.expected_parity(node, 1)
        for node in (1, 2):
            cluster.clients[node].commit("first", 1, 2, digests=digests, meta={})
        cluster.begin(0, 3, nodes=[1, 2])
        cluster.fill(0, 3, nodes=[1, 2])
        cluster.protect(0, 3)
        check_parity(cluster, 0, 3)


def test_killed_holder_fails_the_others_at_once(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        digests = cluster.snapshot(0, 1)
        cluster.begin(1, 2)
        cluster.fill(1, 2, nodes=[0, 2])
        threads: list[threading.Thread] = []
        found: dict[int, str] = {}

        def wait(node: int) -> None:
            found[node] = outcome(cluster, node, 1, 2)

        for node in (0, 2):
            threads.append(threading.Thread(target=wait, args=(node,)))
            threads[-1].start()
        time.sleep(0.2)
        start = time.monotonic()
        cluster.kill(1)
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - start < 3
        assert found.keys() == {0, 2}
        assert all("member 1" in why and "gone" in why for why in found.values()), found
        # Later steps of the epoch fail as fast, and the committed one stands.
        start = time.monotonic()
        cluster.begin(1, 3, nodes=[0, 2])
        cluster.fill(1, 3, nodes=[0, 2])
        for node in (0, 2):
            assert "member 1" in outcome(cluster, node, 1, 3)
        assert time.monotonic() - start < 3
        assert [slot.state for slot in cluster.slots(0)] == ["committed", "filling"]
        # A new epoch with a new holder works, and what was lost is rebuilt of the old one.
        spec = cluster.spec
        cluster.memory.clear()
        cluster.open(PARTS, parity=1, epoch="second")
        sources = {node: cluster.clients[node].inventory().address for node in (0, 2)}
        cluster.clients[1].rebuild(
            spec, member=1, step=1, meta={}, digests=digests, sources=sources
        )
        for rank in (1, 2):
            view = cluster.clients[1].attach_member("first", 1, rank, 0)
            assert view == content(MIB, rank, 1)
        epochs = [held.epoch for held in cluster.clients[1].inventory().epochs]
        assert epochs == ["first", "second"]
        cluster.snapshot(0, 2)
        check_parity(cluster, 0, 2)


def test_dead_rank_fails_all_members_and_the_next_step_works(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        cluster.snapshot(0, 1)
        victim = cluster.connect(1)  # speaks for rank 2, alone
        cluster.clients[1].close()
        cluster.clients[1] = cluster.connect(1)
        cluster.memory[1] = cluster.clients[1].attach("first", 1)
        memory = victim.attach("first", 2)[1]
        cluster.begin(1, 2)
        victim.begin("first", 1, 2)
        cluster.fill(1, 2, nodes=[0, 2])
        cluster.clients[1].filled("first", 1, 1, MIB)
        memory[: MIB // 2] = bytes(MIB // 2)
        victim.filled("first", 2, 1, MIB // 2)
        start = time.monotonic()
        victim.close()
        for node in cluster.nodes:
            assert "rank 2 of member 1 is gone" in outcome(cluster, node, 1, 2)
        assert time.monotonic() - start < 3
        cluster.memory[2] = cluster.clients[1].attach("first", 2)
        cluster.snapshot(1, 3)
        check_parity(cluster, 1, 3)
        cluster.snapshot(0, 4)
        check_parity(cluster, 0, 4)


def test_abandoned_step_leaves_nothing_in_the_parity(tmp_path: Path) -> None:
    """A step that some members began and others never did gives way to the next in its slot."""
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        cluster.snapshot(0, 1)
        cluster.begin(1, 2, nodes=[0, 1])
        cluster.fill(1, 2, nodes=[0, 1], pieces=7)
        cluster.snapshot(1, 3)
        check_parity(cluster, 1, 3)


def test_source_that_dies_while_rebuilding_is_left_out(tmp_path: Path) -> None:
    parts = [[300_000], [200_000, 7], [100_000], [250_000]]
    with Cluster(tmp_path) as cluster:
        cluster.open(parts, parity=2)
        digests = cluster.snapshot(0, 1)
        address = {node: cluster.clients[node].inventory().address for node in cluster.nodes}
        cluster.kill(3)
        cluster.kill(0)
        sources: dict[int, Any] = {node: address[node] for node in (0, 1, 2)}
        client = cluster.start(3)
        client.rebuild(cluster.spec, member=3, step=1, meta={}, digests=digests, sources=sources)
        assert client.attach_member("first", 3, 4, 0) == content(250_000, 4, 1)
        wrong = [digest ^ 1 for digest in digests]
        with pytest.raises(HolderError, match="does not have its digest"):
            cluster.start(0).rebuild(
                cluster.spec, member=0, step=1, meta={}, digests=wrong, sources=sources
            )
        assert cluster.clients[0].inventory().epochs == ()


def test_damaged_member_is_rebuilt_in_place(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        digests = cluster.snapshot(0, 1)
        cluster.memory[1][0][100] ^= 1
        assert not cluster.clients[1].verify("first", 1, 0)
        sources = {node: cluster.clients[node].inventory().address for node in (0, 2)}
        cluster.clients[1].rebuild(
            cluster.spec, member=1, step=1, meta={}, digests=digests, sources=sources
        )
        assert cluster.clients[1].verify("first", 1, 0)
        assert cluster.clients[1].attach_member("first", 1, 1, 0) == content(MIB, 1, 1)


def test_groups_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB]] * 4, parity=1, groups=[[0, 2], [1, 3]])
        cluster.begin(0, 1, nodes=[0, 2])
        cluster.fill(0, 1, nodes=[0, 2])
        together(lambda node: cluster.clients[node].protect("first", 0, 1), [0, 2])
        cluster.begin(0, 1, nodes=[1, 3])
        cluster.fill(0, 1, nodes=[1, 3])
        digests = [report["digest"] for report in cluster.protect(0, 1)]
        cluster.commit(0, 1, digests)
        check_parity(cluster, 0, 1)
