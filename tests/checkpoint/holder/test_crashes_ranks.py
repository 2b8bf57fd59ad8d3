"""Crashes at random moments: what was committed everywhere is always found again, bit by bit.

Ranks are threads here, with the protocol that trainers follow; holders are real processes, killed
with SIGKILL. After each crash, a new start finds the newest snapshot, rebuilds what was lost, and
goes on in a new epoch.
"""

import random
import threading
import time
from pathlib import Path

import pytest

from phalanx.checkpoint.holder.client import HolderClient, HolderError, HolderGone
from phalanx.checkpoint.holder.inventory import Inventory
from phalanx.checkpoint.load import choice
from tests.checkpoint.holder.nodes import Cluster, content

pytestmark = pytest.mark.holders

KIB = 1 << 10


class Run:
    """One start of a job, until it crashes."""

    def __init__(self, cluster: Cluster, *, step: int, old: list[str], seed: int) -> None:
        self.cluster = cluster
        self.first = step
        self.old = old
        """Epochs to forget after the first commit."""
        self.rng = random.Random(seed)
        ranks = [rank for node in cluster.nodes for rank in cluster.ranks(node)]
        self.meeting = threading.Barrier(len(ranks))
        self.stopped = threading.Event()
        self.commits: dict[int, set[int]] = {}
        """Nodes that have committed, by step."""
        self.digests = [0] * len(cluster.nodes)
        self.clients: list[HolderClient] = []
        self.errors: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._rank, args=(node, rank))
            for node in cluster.nodes
            for rank in cluster.ranks(node)
        ]

    def crash(self, after_s: float, kill: list[int]) -> int:
        """Let it run, then end it; the newest step that was committed everywhere."""
        for thread in self.threads:
            thread.start()
        time.sleep(after_s)
        for node in kill:
            self.cluster.kill(node)
        self.stopped.set()
        self.meeting.abort()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not self.errors, self.errors
        everywhere = [
            step for step, nodes in self.commits.items() if nodes == set(self.cluster.nodes)
        ]
        return max(everywhere, default=0)

    def _rank(self, node: int, rank: int) -> None:
        client = None
        try:
            client = self.cluster.connect(node)
            memory = client.attach(self.cluster.epoch, rank)
            self._steps(node, rank, client, memory)
        except (HolderGone, HolderError, threading.BrokenBarrierError):
            self.meeting.abort()
        except BaseException as error:
            self.errors.append(error)
            self.meeting.abort()
        finally:
            if client is not None:
                client.close()

    def _steps(self, node: int, rank: int, client: HolderClient, memory: list[memoryview]) -> None:
        epoch, leader = self.cluster.epoch, self.cluster.ranks(node)[0] == rank
        for step in range(self.first + 1, self.first + 1000):
            slot = step % 2
            data = content(len(memory[slot]), rank, step)
            client.begin(epoch, slot, step)
            for piece in range(4):
                begin, end = len(data) * piece // 4, len(data) * (piece + 1) // 4
                if self.stopped.is_set():
                    return  # died between two pieces
                memory[slot][begin:end] = data[begin:end]
                client.filled(epoch, rank, slot, end)
            self.meeting.wait()
            if leader:
                self.digests[node] = client.protect(epoch, slot, step)["digest"]
            self.meeting.wait()
            if leader:
                digests = list(self.digests)
                client.commit(epoch, slot, step, digests=digests, meta={"step": step})
                self.commits.setdefault(step, set()).add(node)
                for old in self.old if step == self.first + 1 else ():
                    client.forget(old)


def restart(cluster: Cluster, killed: list[int], *, at_least: int) -> int:
    """Find the newest snapshot, rebuild what was lost, compare all of it; its step."""
    inventories: list[Inventory | None] = [
        None if node in killed else cluster.clients[node].inventory() for node in cluster.nodes
    ]
    found, reasons = choice.newest(inventories)
    if found is None:
        assert not at_least, reasons
        for node in killed:
            cluster.start(node)
        return 0
    assert found.step >= at_least, (found.step, at_least, reasons)
    for node in killed:
        cluster.start(node).listen("127.0.0.1")
    homes = choice.new_homes(found, len(cluster.nodes))
    where = {member: node for member, (node, _) in found.where.items()}
    digests = _digests(inventories, found)
    for member, home in homes.items():
        cluster.clients[home].rebuild(
            found.spec,
            member=member,
            step=found.step,
            meta=found.meta,
            digests=digests,
            sources={
                other: cluster.clients[node].inventory().address for other, node in where.items()
            },
        )
    for member, node in {**where, **homes}.items():
        client = cluster.connect(node)
        slot = found.where[member][1] if member in found.where else found.step % 2
        assert client.verify(found.epoch, member, slot)
        for rank in found.spec.ranks[member]:
            view = client.attach_member(found.epoch, member, rank, slot)
            assert view == content(len(view), rank, found.step), (member, rank, found.step)
        client.close()
    assert found.meta == {"step": found.step}
    return found.step


def _digests(inventories: list[Inventory | None], found: choice.Recoverable) -> list[int]:
    for inventory in inventories:
        for epoch in inventory.epochs if inventory else ():
            for slots in epoch.members.values() if epoch.epoch == found.epoch else ():
                for slot in slots:
                    if slot.step == found.step and slot.digests:
                        return list(slot.digests)
    raise AssertionError("nobody has committed it")


@pytest.mark.parametrize(
    ("parts", "parity", "seed", "crashes"),
    [
        ([[900 * KIB], [1500 * KIB, 3], [70 * KIB]], 1, 0, 4),
        pytest.param([[900 * KIB], [1500 * KIB, 3], [70 * KIB]], 1, 1, 20, marks=pytest.mark.slow),
        pytest.param(
            [[KIB], [300 * KIB, 9], [0], [2000 * KIB], [7]], 2, 2, 15, marks=pytest.mark.slow
        ),
        pytest.param([[100], [64], [90], [10]], 2, 3, 15, marks=pytest.mark.slow),
    ],
)
def test_nothing_committed_is_lost(
    tmp_path: Path, parts: list[list[int]], parity: int, seed: int, crashes: int
) -> None:
    rng = random.Random(seed)
    step, epochs = 0, []
    with Cluster(tmp_path) as cluster:
        for crash in range(crashes):
            cluster.open(parts, parity=parity, epoch=f"epoch{crash}", populate=0)
            cluster.memory.clear()
            run = Run(cluster, step=step, old=list(epochs), seed=seed)
            killed = rng.sample(list(cluster.nodes), rng.randint(0, parity))
            everywhere = run.crash(rng.uniform(0.02, 0.6), killed)
            step = restart(cluster, killed, at_least=max(everywhere, step))
            epochs.append(f"epoch{crash}")
        assert step > crashes / 2
