"""`phalanx checkpoint ls` and `gc --memory` with real holders: found, freed, but not while used."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoint.format.job import directory_of, job_name
from phalanx.checkpoint.holder.client import HolderClient
from phalanx.checkpoint.holder.sockets import Lock, remove_left, socket_path
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool import gc_memory, holders
from phalanx.launch.cli import main
from tests.checkpoint.holder.nodes import Cluster, snapshot_memory

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


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """The process answers nobody meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


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
    assert (code, found["freed"], alive(cluster)) == (1, 0, [0, 1])
    assert [item["why"] for item in found["holders"]] == [
        "ranks are connected",
        "its run is in use, see node 0",  # it would lose half of its snapshot
    ]
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


@pytest.mark.parametrize("stands_still", [0, 1])
def test_a_holder_that_does_not_answer_is_told(
    run: Path,
    cluster: Cluster,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    stands_still: int,
) -> None:
    monkeypatch.setattr(holders, "PATIENCE_S", 0.5)
    other = 1 - stands_still
    pid = cluster.clients[stands_still].hello()
    leave(cluster)
    with standing_still(pid):
        said = (
            f"the holder of job {cluster.job}, node {stands_still} does not answer: "
            f"process {pid} has answered nobody for a while"
        )
        code, found = ask(capsys, "ls", str(run))
        assert (code, found["silent"]) == (1, [said])
        assert [item["node"] for item in found["memory"]] == [other]
        code, found = ask(capsys, "gc", str(run), "--memory")
        assert (code, found["silent"], found["freed"]) == (1, [said], 0)
        assert [item["why"] for item in found["holders"]] == [
            f"node {stands_still} does not answer"
        ]
        assert alive(cluster) == [0, 1]
    assert ask(capsys, "gc", str(run), "--memory")[0] == 0
    assert alive(cluster) == []


def test_one_that_stops_answering_in_between_keeps_the_others(
    run: Path, cluster: Cluster, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc_memory, "PATIENCE_S", 0.5)
    pid = cluster.clients[0].hello()
    leave(cluster)
    look = gc_memory._look

    def stopped(holder: Any) -> Any:
        if holder.node != 0:
            return look(holder)
        with standing_still(pid):
            return look(holder)

    monkeypatch.setattr(gc_memory, "_look", stopped)
    code, found = ask(capsys, "gc", str(run), "--memory")
    assert (code, found["freed"], alive(cluster)) == (1, 0, [0, 1])
    assert found["holders"][0]["why"].startswith("it does not answer: ")
    assert found["holders"][1]["why"] == "its run is in use, see node 0"


def test_what_killed_holders_left_is_removed(run: Path, cluster: Cluster, capsys: Captured) -> None:
    cluster.kill(1)
    left = socket_path(cluster.job, 1)
    assert left.exists()
    assert left.with_suffix(".lock").exists()
    starting = Lock(left.with_suffix(".lock"))
    while not starting.take():  # the kernel has not ended it yet
        pass
    assert [item["node"] for item in ask(capsys, "ls", str(run))[1]["memory"]] == [0]
    assert left.exists()  # who has the lock will need the name
    os.close(starting._fd)
    code, found = ask(capsys, "ls", str(run))
    assert (code, found["silent"]) == (0, [])
    assert not left.exists()
    assert not left.with_suffix(".lock").exists()
    living = socket_path(cluster.job, 0)
    living.with_suffix(".lock").unlink()  # as what cleans /tmp does
    assert [item["node"] for item in ask(capsys, "ls", str(run))[1]["memory"]] == [0]
    remove_left(cluster.job, 0)
    assert living.exists()


def test_a_place_that_no_holder_knows(run: Path, cluster: Cluster, capsys: Captured) -> None:
    assert main(["checkpoint", "gc", f"{run}x", "--memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  no holder on this machine knows this place", "  what others know:"]
    assert f"    {run}/checkpoints" in lines
    leave(cluster)
    assert main(["checkpoint", "gc", str(run), "--memory", "--dry-run"]) == 0
    assert "no holder" not in capsys.readouterr().out
