"""Memory that changes behind a snapshot's back: nothing of it is written, nothing made of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.holder.client import HolderError
from phalanx.checkpoint.load import choice
from phalanx.checkpoint.snapshot import durable
from phalanx.checkpoint.snapshot.request import Taken
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.holder.nodes import Cluster, content, flip_bit, snapshot_memory
from tests.checkpoint.ranks import Events, Run, holder_pids, manager_of, step_names

MIB = 1 << 20
PARTS = [[MIB], [0, 2 * MIB + 9], [100]]


def drain(cluster: Cluster, node: int) -> dict:
    """Slot 0's snapshot of step 7, into a folder of the cluster's."""
    url = str(cluster.folder / "storage")
    client = cluster.clients[node]
    return client.drain(cluster.epoch, 0, 7, url=url, folder="step7", storage={})


def lost(cluster: Cluster) -> tuple[int, ...]:
    """Members that a new start would rebuild."""
    found, _ = choice.newest([client.inventory() for _, client in sorted(cluster.clients.items())])
    assert found is not None
    return found.lost


@pytest.mark.parametrize("at", [0, MIB + 77, 2 * MIB + 8])
def test_changed_data_is_not_written(tmp_path: Path, at: int) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        digests = cluster.snapshot(0, 7)
        assert len(drain(cluster, 0)["parts"]) == 1
        cluster.memory[2][0][at] ^= 16
        said = (
            "step 7: the memory of rank 2's part on node 1 has changed since the snapshot was com"
        )
        for _ in range(2):  # asked again, it is no better
            with pytest.raises(HolderError, match=said):
                drain(cluster, 1)
        assert not (tmp_path / "storage/step7/part-00002.safetensors").exists()
        assert cluster.slots(1)[0].state == "damaged"
        assert lost(cluster) == (1,)
        rebuild(cluster, 1, digests)
        assert cluster.clients[1].attach_member("first", 1, 2, 0) == content(2 * MIB + 9, 2, 7)


def rebuild(cluster: Cluster, member: int, digests: list[int]) -> None:
    """At its own node, of all others."""
    others = [node for node in cluster.nodes if node != member and node in cluster.clients]
    cluster.clients[member].rebuild(
        cluster.spec,
        member=member,
        step=7,
        meta={},
        digests=digests,
        sources={node: cluster.clients[node].inventory().address for node in others},
    )


def test_changed_parity_is_not_written(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        digests = cluster.snapshot(0, 7)
        cluster.flip_parity(1, 0, at=MIB)
        with pytest.raises(
            HolderError, match="step 7: the memory of the parity on node 1 has chan"
        ):
            drain(cluster, 1)
        assert not (tmp_path / "storage/step7/parity-00001.bin").exists()
        assert lost(cluster) == (1,)
        rebuild(cluster, 1, digests)
        files = cluster.files(1, 0, 7, name="again")
        assert files["parity-00001.bin"] == cluster.expected_parity(1, 7)


def test_what_was_rebuilt_is_compared_too(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open(PARTS, parity=1)
        digests = cluster.snapshot(0, 7)
        cluster.kill(1)
        pid = cluster.start(1).inventory().pid
        for name, what in (("rank2", "rank 2's part"), ("parity1", "the parity")):
            rebuild(cluster, 1, digests)
            flip_bit(pid, f"phalanx-first-{name}-slot0", 50)
            with pytest.raises(HolderError, match=f"the memory of {what} on node 1 has changed"):
                cluster.files(1, 0, 7, name=name)
        rebuild(cluster, 1, digests)
        cluster.files(1, 0, 7, name="good")
        assert snapshot_memory(pid) < 6 * MIB  # nothing is left of those before: 2 + 2 MiB each


def test_changed_parity_is_not_rebuilt_from(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([*PARTS, [MIB]], parity=2)
        digests = cluster.snapshot(0, 7)
        cluster.kill(3)
        cluster.start(3)
        cluster.flip_parity(1, 0)
        rebuild(cluster, 3, digests)  # of the two others
        files = cluster.files(3, 0, 7, name="rebuilt")
        assert files["part-00004.safetensors"].endswith(content(MIB, 3 + 1, 7))
        assert files["parity-00003.bin"] == cluster.expected_parity(3, 7)
        assert cluster.slots(1)[0].state == "committed"  # its data is as it was
        cluster.flip_parity(2, 0)
        with pytest.raises(HolderError, match=r"member [12]: its parity of step 7 has changed"):
            rebuild(cluster, 3, digests)


def change_and_save(ranks: Ranks, root: Path) -> Events:
    """A bit of a committed snapshot flips before it goes to storage; the run then starts again."""
    events: Events = []
    drain = durable._drain

    def changed(taken: Taken, *args: Any, **named: Any) -> dict[str, Any]:
        if taken.step == 2:
            [pid] = holder_pids(root).values()
            flip_bit(pid, f"phalanx-{taken.epoch.name}-rank0-slot{taken.slot}", 44)
        return drain(taken, *args, **named)

    with process_group(ranks), pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "_drain", changed)
        manager = manager_of(ranks, root, events=events)
        tensors = {"x": torch.zeros(1000)}
        for step in (1, 2):
            tensors["x"] += 1
            manager.save(step, tensors, {})
        with pytest.raises(CheckpointError, match="rank 0's part on node 0 has changed"):
            manager.close()
        again = manager_of(ranks, root, events=events)
        resumed = again.resume(lambda step, names, meta: tensors)
        again.close()
    assert resumed is not None
    assert (resumed.step, float(tensors["x"].mean())) == (1, 1.0)
    return events


def test_no_checkpoint_comes_of_it_and_no_start_goes_on_from_it(
    run_ranks: Run, tmp_path: Path
) -> None:
    [events] = run_ranks(change_and_save, tmp_path, world_size=1)
    assert ("checkpoint_failed", 2) in [(name, facts.get("step")) for name, facts in events]
    folders = [
        name for name in step_names(tmp_path) if (tmp_path / name / "manifest.json").exists()
    ]
    assert folders == ["step_00000001"]
