"""A node that is cut off without a word: its holder lives, but nothing comes through."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phalanx.checkpoint.holder.client import HolderError
from tests.checkpoint.holder.nodes import Cluster, together

pytestmark = pytest.mark.holders

MIB = 1 << 20
NODES = 3


def run(command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[tuple[Callable[[int], str], Callable[[int, str], None]]]:
    """Network namespaces on a bridge: (name of a node's, set a node's link "up" or "down")."""
    tag = f"phx{os.getpid() % 100_000}"
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        run(f"ip link add {tag} type bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        run(f"ip link set {tag} up")
        for node in range(NODES):
            space = f"{tag}n{node}"
            run(f"ip netns add {space}")
            run(f"ip link add {tag}v{node} type veth peer name eth0 netns {space}")
            run(f"ip link set {tag}v{node} master {tag} up")
            run(f"ip -n {space} addr add 10.213.0.{node + 1}/24 dev eth0")
            run(f"ip -n {space} link set eth0 up")
        yield lambda node: f"{tag}n{node}", lambda node, to: run(f"ip link set {tag}v{node} {to}")
    finally:
        for node in range(NODES):
            subprocess.run(["ip", "netns", "del", f"{tag}n{node}"], capture_output=True)
        run(f"ip link del {tag}")


@pytest.mark.slow
def test_cut_off_node_is_noticed_and_comes_back(
    tmp_path: Path, network: tuple[Callable[[int], str], Callable[[int, str], None]]
) -> None:
    space, link = network
    start = (
        "import sys; from phalanx.checkpoint.holder.start import start_holder;"
        "start_holder(sys.argv[1], int(sys.argv[2]), linger_s=20, log=None)"
    )
    with Cluster(tmp_path) as cluster:
        for node in range(NODES):
            command = ["ip", "netns", "exec", space(node), sys.executable, "-c", start]
            subprocess.run([*command, cluster.job, str(node)], check=True)
            cluster.clients[node] = cluster.connect(node)
            cluster.hosts[node] = f"10.213.0.{node + 1}"
        cluster.open([[20 * MIB]] * NODES, parity=1)
        cluster.snapshot(0, 1)
        cluster.begin(1, 2)
        cluster.fill(1, 2, nodes=[0, 1])
        link(2, "down")
        cluster.fill(1, 2, nodes=[2])

        def protect(node: int) -> tuple[str, float]:
            begun = time.monotonic()
            with pytest.raises(HolderError) as caught:
                cluster.clients[node].protect("first", 1, 2)
            return str(caught.value), time.monotonic() - begun

        for node, (why, seconds) in enumerate(together(protect, range(NODES))):
            assert "is gone" in why
            # Who has no link left is told by its own sending alone, which takes longer.
            assert seconds < (60 if node == 2 else 20), (node, seconds)
            assert node == 2 or "member 2" in why
        assert [slot.state for slot in cluster.slots(0)] == ["committed", "filling"]
        link(2, "up")
        deadline = time.monotonic() + 30
        step = 3
        while not came_back(cluster, step):  # the nodes may take a moment to find each other
            assert time.monotonic() < deadline
            step += 1


def came_back(cluster: Cluster, step: int) -> bool:
    """Whether the step's snapshot was complete everywhere; returns when it is settled."""
    cluster.begin(1, step)
    cluster.fill(1, step)

    def protect(node: int) -> bool:
        try:
            cluster.clients[node].protect("first", 1, step)
        except HolderError:
            time.sleep(0.1)
            return False
        return True

    return all(together(protect, range(NODES)))
