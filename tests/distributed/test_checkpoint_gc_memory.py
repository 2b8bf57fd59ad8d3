"""`phalanx checkpoint ls` and `gc --memory` with real holders: found, freed, but not while used."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoint.holder_client import HolderClient
from phalanx.checkpoint.holder_socket import socket_path
from phalanx.checkpoint.job import directory_of, job_name
from phalanx.checkpoint.storage import open_storage
from phalanx.checkpoint.tool import gc_memory
from phalanx.launch.cli import main
from tests.holding import Cluster, snapshot_memory

MIB = 1 << 20
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_memory, "QUIET_S", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def cluster(tmp_path: Path, run: Path) -> Iterator[Cluster]:
    """The holders of its two nodes, with a snapshot."""
    with Cluster(tmp_path) as found:
        storage = open_storage(run / "checkpoints")
        found.job, found.directory = job_name(storage), directory_of(storage)
        found.open([[2 * MIB], [MIB]], parity=1, populate=1)
        found.snapshot(0, 7)
        yield found


def leave(cluster: Cluster) -> None:
    """All ranks die."""
    cluster.memory.clear()
    for client in cluster.clients.values():
        client.close()
    for node in cluster.nodes:
        with cluster.connect(node) as client:
            while client.in_use(0.0) is not None:
                pass


def ask(captured: Captured, *argv: str) -> tuple[int, Any]:
    """Exit code, and the JSON."""
    try:
        code = main(["checkpoint", *argv, "--json", "-"])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(captured.readouterr().out)


def alive(cluster: Cluster) -> list[int]:
    return [node for node in cluster.nodes if socket_path(cluster.job, node).exists()]


def test_ls_says_whose_memory_it_is(run: Path, cluster: Cluster, capsys: Captured) -> None:
    for place in ((), (str(run),)):
        found = [
            item for item in ask(capsys, "ls", *place)[1]["memory"] if item["job"] == cluster.job
        ]
        assert [(item["step"], item["node"]) for item in found] == [(7, 0), (7, 1)]
        assert {item["directory"] for item in found} == {str(run / "checkpoints")}
        assert not any(item["forgotten"] for item in found)
    cluster.start(2)
    found = ask(capsys, "ls", str(run))[1]["memory"]
    assert [item["step"] for item in found] == [7, 7, None]  # a holder without a snapshot


def test_lingering_holders_are_ended(run: Path, cluster: Cluster, capsys: Captured) -> None:
    pids = [client.hello() for client in cluster.clients.values()]
    taken = sum(map(snapshot_memory, pids))
    assert taken > 5 * MIB
    leave(cluster)
    code, found = ask(capsys, "gc", str(run), "--memory", "--dry-run")
    assert (code, found["freed"], alive(cluster)) == (0, 0, [0, 1])
    assert sum(item["bytes"] for item in found["holders"]) == taken
    code, found = ask(capsys, "gc", str(run), "--memory")
    assert (code, found["freed"], alive(cluster)) == (0, taken, [])
    assert [(item["node"], item["pid"]) for item in found["holders"]] == list(enumerate(pids))
    assert ask(capsys, "gc", str(run), "--memory")[1]["holders"] == []
    assert (run / "checkpoints" / "job.json").exists()


def test_a_run_in_use_keeps_all_its_holders(
    run: Path, cluster: Cluster, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*why: str) -> None:
        for flags in ((), ("--dry-run",)):
            code, found = ask(capsys, "gc", str(run), "--memory", *flags)
            assert (code, found["freed"], alive(cluster)) == (1, 0, [0, 1])
            assert [item["why"] for item in found["holders"]] == list(why)

    refused("ranks are connected", "ranks are connected")
    leave(cluster)
    with cluster.connect(1) as rank:
        rank.attach("first", 1)
        refused("its run is in use, see node 1", "ranks are connected")
    with cluster.connect(0) as start:  # of a new start that reads what is left
        start.attach_member("first", 0, 0, 0)
        refused("ranks are connected", "its run is in use, see node 0")
    leave(cluster)
    monkeypatch.setattr(gc_memory, "QUIET_S", 100.0)
    code, found = ask(capsys, "gc", str(run), "--memory")
    assert (code, alive(cluster)) == (1, [0, 1])
    assert "s ago, and may be again; wait 100 s" in found["holders"][0]["why"]


def test_a_rank_that_comes_in_between_keeps_its_holder(
    run: Path, cluster: Cluster, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(cluster)
    came: list[HolderClient] = []
    look = gc_memory._look

    def late(holder: Any) -> Any:
        found = look(holder)
        if holder.node == 0:
            came.append(cluster.connect(0))
            came[0].attach("first", 0)
        return found

    monkeypatch.setattr(gc_memory, "_look", late)
    code, found = ask(capsys, "gc", str(run), "--memory")
    assert (code, alive(cluster)) == (1, [0])
    assert found["holders"][0]["why"] == "ranks are connected"
    came[0].close()


def test_of_a_run_that_was_deleted_or_has_forgotten_its_name(
    tmp_path: Path, run: Path, cluster: Cluster, capsys: Captured
) -> None:
    leave(cluster)
    other = tmp_path / "other"
    shutil.copytree(run, other)  # a copy is another run, whose memory it is not
    assert ask(capsys, "gc", str(other), "--memory")[1]["holders"] == []
    (run / "checkpoints" / "job.json").unlink()
    fresh = job_name(open_storage(run / "checkpoints"))
    assert fresh != cluster.job
    found = ask(capsys, "ls", str(run))[1]["memory"]
    assert [(item["job"], item["forgotten"]) for item in found] == [(cluster.job, True)] * 2
    shutil.rmtree(run)
    assert ask(capsys, "gc", str(run), "--memory", "--dry-run")[1]["holders"][0]["bytes"] > 0
    code, found = ask(capsys, "gc", str(run / "checkpoints"), "--memory")
    assert (code, len(found["holders"]), alive(cluster)) == (0, 2, [])


def test_people_are_told_what_was_freed(run: Path, cluster: Cluster, capsys: Captured) -> None:
    leave(cluster)
    assert main(["checkpoint", "gc", str(run), "--memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}/checkpoints, in this machine's memory"
    assert lines[1].split() == ["job", cluster.job, "node", "0", *lines[1].split()[4:6], "ended"]
    assert lines[-1].startswith("2 holders ended, ")
    assert lines[-1].endswith(" MB freed")
