"""One holder process: its life, its memory, and who may use it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from phalanx.checkpoint.holder import sockets
from phalanx.checkpoint.holder.client import HolderClient, HolderError, HolderGone
from phalanx.checkpoint.holder.sockets import socket_path
from phalanx.checkpoint.holder.start import find_holders, start_holder
from phalanx.checkpoint.holder.transport import RefusedError, dial
from tests.checkpoint.holder.nodes import Cluster, content, snapshot_memory, together
from tests.killed_run import alive, wait_until

MIB = 1 << 20

FILL_HALF = """
import sys, time
from phalanx.checkpoint.holder.client import HolderClient
job, epoch, rank, slot, step = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
client = HolderClient.connect(job, 0)
memory = client.attach(epoch, rank)[slot]
client.begin(epoch, slot, step)
half = len(memory) // 2
memory[:half] = b"x" * half
client.filled(epoch, rank, slot, half)
print("half", flush=True)
time.sleep(60)
"""


def who_maps(epoch: str) -> set[int]:
    """Processes that have an epoch's memory; the kernel frees it with the last of them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"memfd:phalanx-{epoch}-" in (process / "maps").read_text():
                found.add(int(process.name))
    return found


def test_torch_free() -> None:
    code = "import sys, phalanx.checkpoint.holder.__main__;assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_of_many_starters_wins(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        together(lambda _: start_holder(cluster.job, 0, linger_s=9, log=cluster.log(0)), range(4))
        clients = [cluster.connect(0) for _ in range(3)]
        assert len({client.inventory().pid for client in clients}) == 1
        assert (cluster.job, 0) in find_holders()
        assert (cluster.job, 1) not in find_holders()
        cluster.start(0)
        for client in clients:
            client.close()


def test_finish_frees_everything(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        epoch = f"finish{os.getpid()}"
        cluster.open([[40 * MIB]], populate=2, epoch=epoch)
        client = cluster.clients[0]
        pid = client.inventory().pid
        assert snapshot_memory(pid) == 80 * MIB
        assert who_maps(epoch) == {pid, os.getpid()}
        cluster.memory.clear()
        assert who_maps(epoch) == {pid}
        client.finish()
        wait_until(lambda: not alive(pid), within_s=10)
        assert not who_maps(epoch)
        assert not socket_path(cluster.job, 0).exists()
        assert not socket_path(cluster.job, 0).with_suffix(".lock").exists()
        with pytest.raises(HolderGone):
            client.inventory()
        with pytest.raises(HolderGone):
            cluster.connect(0)


def test_lingers_for_ranks_but_not_for_tools(tmp_path: Path) -> None:
    with Cluster(tmp_path, linger_s=0.3) as cluster:
        cluster.open([[MIB]])
        tool = cluster.connect(0)
        pid = tool.inventory().pid
        time.sleep(0.6)  # longer than it lingers, were the rank not there
        assert tool.inventory().pid == pid
        cluster.clients.pop(0).close()
        start = time.monotonic()
        wait_until(lambda: not alive(pid), within_s=10)
        assert time.monotonic() - start > 0.25
        with pytest.raises(HolderGone):
            tool.inventory()
        assert "no rank for 0.3 s" in cluster.log(0).read_text()


def test_ends_on_sigterm(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB]])
        pid = cluster.clients[0].inventory().pid
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not alive(pid), within_s=10)
        assert not socket_path(cluster.job, 0).exists()


def test_killed_holder_is_noticed_and_replaced(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB]])
        client, waiting = cluster.clients[0], cluster.connect(0)
        cluster.begin(0, 1)
        found: list[tuple[float, BaseException]] = []

        def protect() -> None:
            try:
                waiting.protect("first", 0, 1)
            except HolderGone as error:
                found.append((time.monotonic(), error))

        thread = threading.Thread(target=protect)
        thread.start()
        pid = client.inventory().pid
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        with suppress(HolderGone):
            while True:
                client.inventory()
        thread.join(5)
        assert time.monotonic() - start < 2
        assert len(found) == 1
        assert socket_path(cluster.job, 0).exists()  # its leftover
        assert (cluster.job, 0) not in find_holders()
        fresh = cluster.start(0)
        assert fresh.inventory().epochs == ()
        assert fresh.inventory().pid != pid


def test_killed_rank_leaves_what_was_committed(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB, 2 * MIB]])
        cluster.snapshot(0, 4)
        command = [sys.executable, "-c", FILL_HALF, cluster.job, "first", "1", "1", "5"]
        # The rank's own process is the only one that speaks for it.
        cluster.clients[0].close()
        client = cluster.clients[0] = cluster.connect(0)
        cluster.memory[0] = client.attach("first", 0)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "half\n"
            client.begin("first", 1, 5)
            client.filled("first", 0, 1, MIB)
            start = time.monotonic()
            rank.kill()
            with pytest.raises(HolderError, match="step 5: rank 1 of member 0 is gone"):
                client.protect("first", 1, 5)
            assert time.monotonic() - start < 2
        states = [(slot.step, slot.state) for slot in cluster.slots(0)]
        assert states == [(4, "committed"), (5, "filling")]
        with pytest.raises(HolderError, match="not in slot 1"):
            client.attach_member("first", 0, 1, 1)
        view = client.attach_member("first", 0, 1, 0)
        assert view.readonly
        assert view == content(2 * MIB, 1, 4)
        assert client.verify("first", 0, 0)
        cluster.memory[1] = client.attach("first", 1)  # its successor
        cluster.snapshot(1, 6)
        assert [slot.state for slot in cluster.slots(0)] == ["committed", "committed"]


def test_new_epoch_keeps_the_old_ones_snapshot(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[10 * MIB]], epoch="old")
        cluster.snapshot(0, 8)
        cluster.begin(1, 9)
        cluster.clients[0].filled("old", 0, 1, MIB)
        late = cluster.clients[0]
        cluster.clients[0] = cluster.connect(0)
        pid = late.inventory().pid
        cluster.memory.clear()
        cluster.open([[MIB]], epoch="new", populate=0)
        assert snapshot_memory(pid) == 10 * MIB  # what step 9 had is gone
        with pytest.raises(HolderError, match="epoch old is over"):
            late.begin("old", 1, 10)
        late.close()
        old, new = cluster.clients[0].inventory().epochs
        assert (old.epoch, old.frozen, new.epoch) == ("old", True, "new")
        assert [slot.step for slot in old.members[0]] == [8]
        view = cluster.clients[0].attach_member("old", 0, 0, 0)
        assert view == content(10 * MIB, 0, 8)
        cluster.snapshot(0, 9)
        cluster.clients[0].forget("old")
        cluster.clients[0].forget("old")
        assert view == content(10 * MIB, 0, 8)  # who maps it keeps it
        assert snapshot_memory(pid) <= 2 * MIB
        assert [held.epoch for held in cluster.clients[0].inventory().epochs] == ["new"]


def test_new_epoch_keeps_no_more_than_it_may_need(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[4 * MIB]], slots=3, epoch="old")
        for slot in (0, 1, 2):
            cluster.snapshot(slot, slot + 1)
        cluster.begin(0, 4)
        cluster.fill(0, 4)
        cluster.protect(0, 4)  # complete; whether others have committed it is not known here
        cluster.memory.clear()
        cluster.open([[MIB]], epoch="new", populate=0)
        old = cluster.clients[0].inventory().epochs[0]
        states = [(slot.step, slot.state) for slot in old.members[0]]
        assert states == [(4, "complete"), (3, "committed")]
        assert old.bytes == 8 * MIB


def test_newest_committed_is_never_overwritten(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB]])
        cluster.snapshot(0, 1)
        cluster.begin(1, 2)
        cluster.fill(1, 2)
        (report,) = cluster.protect(1, 2)
        ahead = cluster.connect(0)
        thread = threading.Thread(target=ahead.begin, args=("first", 0, 3))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert cluster.slots(0)[0].state == "committed"
        cluster.commit(1, 2, [report["digest"]])
        thread.join(5)
        assert not thread.is_alive()
        states = [(slot.step, slot.state) for slot in cluster.slots(0)]
        assert states == [(3, "filling"), (2, "committed")]
        ahead.close()


def test_refusals(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[MIB]])
        client = cluster.clients[0]
        digests = cluster.snapshot(0, 5)
        for wrong, match in (
            (lambda: client.begin("first", 1, 5), "steps of an epoch only grow"),
            (lambda: client.begin("first", 2, 6), "no slot 2"),
            (lambda: client.begin("none", 0, 6), "no epoch none"),
            (lambda: client.filled("first", 0, 1, 3), "not begun by this client"),
            (lambda: client.attach("first", 1), "rank 1 is not of member 0"),
            (lambda: client.protect("first", 1, 6), "slot 1 holds nothing"),
            (lambda: client.commit("first", 1, 6, digests=[1], meta={}), "not complete"),
            (lambda: client.commit("first", 0, 5, digests=[1], meta={}), "has digest"),
            (
                lambda: client._call("open", spec={"epoch": 1}, member=0, populate=0),
                "no epoch",
            ),
        ):
            with pytest.raises(HolderError, match=match):
                wrong()
        client.commit("first", 0, 5, digests=digests, meta={"again": True})
        client.begin("first", 1, 6)
        client.begin("first", 1, 6)
        client.filled("first", 0, 1, 10)
        with pytest.raises(HolderError, match="filled 9 of"):
            client.filled("first", 0, 1, 9)
        with pytest.raises(HolderError, match="filled 1048577 of 1048576"):
            client.filled("first", 0, 1, MIB + 1)


def test_too_little_memory(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster, pytest.raises(HolderError, match=r"\d GiB of host memory"):
        cluster.open([[10**14]], populate=2)


def test_damage_is_found(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[3 * MIB]])
        cluster.snapshot(0, 1)
        cluster.memory[0][0][2 * MIB + 5] ^= 4
        assert not cluster.clients[0].verify("first", 0, 0)
        assert cluster.slots(0)[0].state == "damaged"
        with pytest.raises(HolderError, match="not in slot 0"):
            cluster.clients[0].attach_member("first", 0, 0, 0)


def test_two_jobs_do_not_meet(tmp_path: Path) -> None:
    with Cluster(tmp_path / "a") as one, Cluster(tmp_path / "b") as other:
        one.open([[MIB]])
        other.open([[MIB]])
        digests = one.snapshot(0, 3)
        other.snapshot(0, 3)
        one_pid = one.clients[0].inventory().pid
        other.clients[0].finish()
        wait_until(lambda: (other.job, 0) not in find_holders(), within_s=10)
        assert one.clients[0].inventory().pid == one_pid
        assert one.slots(0)[0].digest == digests[0]


def test_callers_without_the_token(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[1000], [1000]], parity=1)
        host, port = cluster.clients[0].inventory().address
        greeting = {"epoch": "first", "token": "guess", "role": "fetch"}
        with pytest.raises(RefusedError, match="wrong token"):
            dial((host, port), greeting, patience_s=5)
        with pytest.raises(RefusedError, match="no epoch"):
            dial((host, port), {**greeting, "epoch": "other"}, patience_s=0)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b"\0\0\0\1"):
            with socket.create_connection((host, port)) as sock:
                with suppress(OSError):  # it may hang up before all of this
                    sock.sendall(noise)
                    sock.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    assert sock.recv(100) == b""
        cluster.snapshot(0, 1)


def test_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path

    def elsewhere(path: str) -> Path:
        return tmp_path / "sockets" if path.startswith("/tmp/phalanx-") else real(path)

    monkeypatch.setattr(sockets, "Path", elsewhere)
    assert socket_path("job", 3) == tmp_path / "sockets" / "job-3.sock"
    (tmp_path / "sockets").chmod(0o755)
    with pytest.raises(PermissionError, match="mode 0755"):
        HolderClient.connect("job", 3)
    (tmp_path / "sockets").rmdir()
    (tmp_path / "sockets").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="must be a folder of user"):
        find_holders()
    with pytest.raises(ValueError, match="job='../x'"):
        socket_path("../x", 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_other_users_are_refused(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster, tempfile.TemporaryDirectory(dir="/tmp") as open_folder:
        cluster.open([[MIB]])
        path = socket_path(cluster.job, 0)
        code = (
            "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
            "sock = socket.socket(socket.AF_UNIX)\n"
            "try: sock.connect(sys.argv[1])\n"
            "except PermissionError: sys.exit(7)\n"
            "try:\n"
            '    sock.sendall(bytes([0, 0, 0, 18]) + b\'{"do":"inventory"}\')\n'
            "    answer = sock.recv(10)\n"
            "except ConnectionError: sys.exit(8)\n"
            "sys.exit(8 if not answer else 9)\n"
        )
        assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 7
        # Were the folder open to all, the holder itself would not answer.
        Path(open_folder).chmod(0o755)
        linked = Path(open_folder) / "sock"
        os.link(path, linked)
        linked.chmod(0o777)
        assert subprocess.run([sys.executable, "-c", code, str(linked)]).returncode == 8
        path.chmod(0o700)
        assert cluster.clients[0].inventory().pid
