"""Snapshots written to storage by the holder, while ranks come, go and take the next ones."""

import os
import time
from pathlib import Path

import pytest
import xxhash
from safetensors.numpy import load_file

from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.holder.client import HolderClient, HolderError
from tests.checkpoint.holder.nodes import Cluster, content, together

MIB = 1 << 20
SLOW = {"limit_mb_s": 4.0, "piece_mb": 5}


def drain(client: HolderClient, cluster: Cluster, slot: int, step: int, **storage: object) -> dict:
    """Into a folder of the cluster's."""
    url = str(cluster.folder / "storage")
    return client.drain(cluster.epoch, slot, step, url=url, folder=f"step{step}", storage=storage)


def test_files_are_what_is_reported(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[3 * MIB + 5, 0], [MIB]], parity=1)
        cluster.snapshot(0, 7)
        reports = [drain(cluster.clients[node], cluster, 0, 7) for node in cluster.nodes]
        folder = tmp_path / "storage" / "step7"
        for report in reports:
            for item in (*report["parts"], *report["parity"]):
                data = (folder / item["file"]).read_bytes()
                assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (
                    item["size"],
                    item["xxh3_64"],
                )
            assert report["bytes"] == sum(
                item["size"] for item in (*report["parts"], *report["parity"])
            )
            assert report["seconds"] > 0
        parts = [StoredPart.from_json(item) for r in reports for item in r["parts"]]
        parity = [StoredParity.from_json(item) for r in reports for item in r["parity"]]
        assert [(part.file, part.member) for part in parts] == [
            ("part-00000.safetensors", 0),
            ("part-00001.safetensors", 0),
            ("part-00002.safetensors", 1),
        ]
        assert [(item.file, item.member) for item in parity] == [
            ("parity-00000.bin", 0),
            ("parity-00001.bin", 1),
        ]
        expected = content(MIB, 2, 7)
        assert load_file(folder / "part-00002.safetensors")["w2"].tobytes() == expected
        assert {path.name for path in folder.iterdir()} == {item.file for item in (*parts, *parity)}


def test_asked_again_it_goes_on(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB, MIB]])
        cluster.snapshot(0, 1)
        blocker = tmp_path / "storage" / "step1" / "part-00001.safetensors"
        (blocker / "in the way").mkdir(parents=True)
        with pytest.raises(HolderError, match=r"part-00001\.safetensors"):
            drain(cluster.clients[0], cluster, 0, 1)
        first = tmp_path / "storage" / "step1" / "part-00000.safetensors"
        before = first.stat().st_ino
        (blocker / "in the way").rmdir()
        blocker.rmdir()
        report = drain(cluster.clients[0], cluster, 0, 1)
        assert first.stat().st_ino == before  # not written anew
        assert len(report["parts"]) == 2
        assert drain(cluster.clients[0], cluster, 0, 1) == report


def test_goes_on_without_the_rank_and_keeps_the_slot(tmp_path: Path) -> None:
    with Cluster(tmp_path, linger_s=0.2) as cluster:
        cluster.open([[6 * MIB]], slots=3)
        cluster.snapshot(0, 1)
        pid = cluster.clients[0].inventory().pid
        other, again = cluster.connect(0), cluster.connect(0)

        def write(client: HolderClient) -> float:
            try:
                drain(client, cluster, 0, 1, **SLOW)
            finally:
                client.close()
            return time.monotonic()

        def train(_: HolderClient) -> float:
            while not (cluster.folder / "storage").exists():
                time.sleep(0.01)
            cluster.snapshot(1, 2)
            cluster.snapshot(2, 3)
            cluster.snapshot(1, 4)
            between = time.monotonic()
            cluster.begin(0, 5)  # waits for the slot to be written
            begun = time.monotonic()
            cluster.clients.pop(0).close()
            return begun if between < begun - 0.1 else 0.0

        written, joined, begun = together(
            lambda job: job[0](job[1]), [(write, other), (write, again), (train, other)]
        )
        assert abs(begun - written) < 1
        assert abs(joined - written) < 1
        assert (
            (tmp_path / "storage/step1/part-00000.safetensors")
            .read_bytes()
            .endswith(content(6 * MIB, 0, 1))
        )
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}/maps").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "no rank for 0.2 s" in cluster.log(0).read_text()


def test_stays_until_what_a_dead_rank_asked_for_is_written(tmp_path: Path) -> None:
    with Cluster(tmp_path, linger_s=0.2) as cluster:
        cluster.open([[4 * MIB]])
        cluster.snapshot(0, 1)
        pid = os.fork()
        if pid == 0:
            drain(cluster.connect(0), cluster, 0, 1, **SLOW)
            os._exit(0)
        while not (cluster.folder / "storage").exists():
            time.sleep(0.01)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        cluster.clients.pop(0).close()
        cluster.memory.clear()
        file = tmp_path / "storage/step1/part-00000.safetensors"
        deadline = time.monotonic() + 10
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.read_bytes().endswith(content(4 * MIB, 0, 1))


def test_nothing_that_is_not_whole(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB]])
        cluster.snapshot(0, 1)
        cluster.begin(1, 2)
        for slot, step in ((1, 2), (0, 2), (1, 1)):
            with pytest.raises(HolderError, match=f"step {step} is not in slot {slot}"):
                drain(cluster.clients[0], cluster, slot, step)
        with pytest.raises(HolderError, match="s4"):
            cluster.clients[0].drain("first", 0, 1, url="s4://nowhere/x", folder="f", storage={})
