"""Where the ranks of a job run: which node each belongs to, and where its holder is found."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phalanx.checkpoint.peers import Peers

PATIENCE = timedelta(days=1)
"""How long ranks wait for others that copy, or write to slow storage; a dead one is noticed."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """This rank's node."""

    number: int
    """0 to count - 1, in rank order."""
    count: int
    """Nodes of the job."""
    ranks_per_node: int
    leader: bool
    """Whether this rank speaks for the node."""
    on_machine: int
    """Its place among the nodes that share its machine (emulated ones, or several agents)."""
    same_machine: int
    """Nodes that share its machine, itself included."""
    host: str
    """Address under which other nodes reach this one."""
    racks: tuple[str, ...]
    """Label of every node's failure domain; "" = shared with nobody. Nodes without one that share a
    machine have the machine's name."""

    @property
    def leaders(self) -> list[int]:
        """The first rank of every node, by node."""
        return [number * self.ranks_per_node for number in range(self.count)]

    def ranks_of(self, number: int) -> list[int]:
        """Ranks of a node."""
        return list(range(number * self.ranks_per_node, (number + 1) * self.ranks_per_node))


def find_node(
    peers: Peers, *, ranks_per_node: int, racks: Sequence[str], store_host: str | None
) -> Node:
    """Ask all ranks where they are; collective.

    Args:
        racks: a label for each node, or one for this machine, or none.
        store_host: where the ranks met.

    Raises:
        ValueError: ranks do not divide into such nodes, or racks are not as many as nodes; on every
            rank where nodes differ in size.
    """
    sizes = sorted(set(peers.all_gather(ranks_per_node)))
    if len(sizes) > 1:  # each rank knows its own node's
        raise ValueError(
            f"nodes have {' and '.join(map(str, sizes))} ranks: all of a job must have as many; "
            "give every node the same launch.ranks_per_node (torchrun: --nproc-per-node)"
        )
    if peers.size % ranks_per_node:
        raise ValueError(f"{peers.size} ranks do not divide into nodes of {ranks_per_node} ranks")
    count = peers.size // ranks_per_node
    if len(racks) not in (0, 1, count):
        raise ValueError(
            f"launch.racks={list(racks)}: {len(racks)} labels, but {count} nodes; give one for "
            "each node, in order, or under torchrun one for this machine"
        )
    number = peers.rank // ranks_per_node
    label = "" if not racks else racks[number if len(racks) == count else 0]
    mine = (_machine(), label, _host(store_host))
    by_node = peers.all_gather(mine)[::ranks_per_node]
    machines = [machine for machine, _, _ in by_node]
    if len(set(machines)) == 1:
        host = "127.0.0.1"
    else:
        host = by_node[number][2]
        if _is_loopback(host):  # rank 0's own name for itself: take the road to another machine
            others = (other for _, _, other in by_node if not _is_loopback(other))
            host = _host(next(others, None))
    # Nodes that share a machine fall with it; where all do (emulated ones), that says nothing.
    shared = {machine for machine in machines if 1 < machines.count(machine) < count}
    return Node(
        number=number,
        count=count,
        ranks_per_node=ranks_per_node,
        leader=peers.rank % ranks_per_node == 0,
        on_machine=machines[:number].count(machines[number]),
        same_machine=machines.count(machines[number]),
        host=host,
        racks=tuple(
            label or (str(machine[0]) if machine in shared else "") for machine, label, _ in by_node
        ),
    )


def _machine() -> tuple[str, str, int]:
    """What tells machines apart, containers and network namespaces included."""
    boot, network = "", 0
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = Path("/proc/self/ns/net").stat().st_ino
    return socket.gethostname(), boot, network


def _host(towards: str | None) -> str:
    """This machine's address on the way to another one."""
    if towards is not None:
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:  # sends nothing
                probe.connect(address)
                return str(probe.getsockname()[0])
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def leaders_of(node: Node) -> Peers | None:
    """The first ranks of all nodes, for such a rank; collective."""
    others = [r for r in range(node.count * node.ranks_per_node) if r not in node.leaders]
    group = dist.new_group(node.leaders, backend="gloo", timeout=PATIENCE)
    if others:
        # torch names a group that its ranks make among themselves (pipeline channels) by how many
        # they made before, so every rank has to make as many.
        dist.new_group(others, backend="gloo")
    return Peers(group) if node.leader else None


def store_host() -> str | None:
    """The machine where the ranks met."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "host", None)
