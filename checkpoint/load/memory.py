"""A snapshot in the holders' memory, found again by a new start of the job and read like a file."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.holder.client import HolderClient, HolderGone
from phalanx.checkpoint.holder.inventory import Inventory
from phalanx.checkpoint.holder.of_node import NodeHolder
from phalanx.checkpoint.load import choice
from phalanx.checkpoint.load.choice import Recoverable
from phalanx.checkpoint.peers import Peers


class MemorySource:
    """The parts of a snapshot; each is read by the ranks of the node that holds it."""

    def __init__(
        self, found: Recoverable, *, node_holder: NodeHolder, client: HolderClient | None
    ) -> None:
        """`client`: of this rank's node, where that holds any of it; it is this source's then."""
        self._found = found
        self._node_holder = node_holder
        self._client = client
        self._tables = found.spec.tables()
        self._member = {
            rank: member for member, ranks in enumerate(found.spec.ranks) for rank in ranks
        }
        self._memory: dict[int, memoryview] = {}
        for part, member in self._member.items():
            node, slot = found.where[member]
            if node == node_holder.node.number:
                assert client is not None
                self._memory[part] = client.attach_member(found.epoch, member, part, slot)

    def parts(self) -> list[PartTable]:
        """Tables of the ranks that took the snapshot."""
        return self._tables

    def near(self, part: int) -> Sequence[int]:
        """The ranks of the node whose memory it is in."""
        return self._node_holder.node.ranks_of(self._found.where[self._member[part]][0])

    def read(self, part: int, index: int, out: memoryview) -> None:
        """Copy an entry; the node's memory was compared with its digest before."""
        entry = self._tables[part].entries[index]
        out[:] = self._memory[part][entry.begin : entry.begin + entry.nbytes]

    def check_unchanged(self, peers: Peers) -> None:
        """Prove that nothing was written while it was checked and read; collective.

        Ranks of the start before may still be alive (torchrun leaves them behind when it is
        killed) and go on with newer steps in the same memory.

        Raises:
            CheckpointError: a holder has begun to overwrite it, or is gone.
        """
        inventories = _inventories(self._node_holder, peers)

        def look() -> None:
            where = choice.again(inventories, self._found).where
            if where != self._found.where:
                raise ValueError(f"step {self._found.step} was overwritten while it was read")

        peers.agree("look whether the snapshot is unchanged", look)

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.clear()
        if self._client is not None:
            self._client.close()


def find(
    node_holder: NodeHolder,
    peers: Peers,
    *,
    without: Collection[tuple[str, int]] = (),
    durable: int = -1,
) -> tuple[Recoverable | None, list[str]]:
    """The newest snapshot that the nodes' holders can give, and why newer ones cannot; collective.

    Nothing is read yet: see `recover`; and `choice.newest` for the arguments.
    """
    found, reasons = choice.newest(
        _inventories(node_holder, peers), without=without, durable=durable
    )
    if found is not None:
        parts = _parts(found, node_holder=node_holder, peers=peers)
        found = replace(found, spec=replace(found.spec, parts=parts))
    return found, reasons


def _parts(found: Recoverable, *, node_holder: NodeHolder, peers: Peers) -> list[Any]:
    """The tables of all ranks that took the snapshot, from one of the holders that have them."""
    first = min(node for node, _ in found.where.values())

    def ask() -> list[Any]:
        if not node_holder.node.leader or node_holder.node.number != first:
            return []
        inventory = _inventory(node_holder)
        if inventory is None:
            raise HolderGone("the holder has died")
        specs = {held.epoch: held.spec for held in inventory.epochs}
        if found.epoch not in specs:
            raise HolderGone(f"the holder has let go of epoch {found.epoch}")
        return list(specs[found.epoch].parts)

    answers = peers.agree("read the snapshot's tables", ask)
    return answers[node_holder.node.leaders[first]]


def _inventory(node_holder: NodeHolder) -> Inventory | None:
    """What this node's holder has; None where there is none, or it is just ending."""
    try:
        with node_holder.connect() as client:
            return client.inventory()
    except HolderGone:
        return None


def _inventories(node_holder: NodeHolder, peers: Peers) -> list[Inventory | None]:
    """What each node's holder has, by node; None where there is no holder.

    Without the parts' tables: of n nodes, each would tell all others those of all n.
    """

    def ask() -> Inventory | None:
        inventory = _inventory(node_holder) if node_holder.node.leader else None
        return None if inventory is None else inventory.without_tables()

    answers = peers.agree("ask the holders", ask)
    return [answers[rank] for rank in node_holder.node.leaders]


def recover(found: Recoverable, *, node_holder: NodeHolder, peers: Peers) -> MemorySource:
    """Make a snapshot readable: check every node's memory, rebuild what is lost; collective.

    Raises:
        CheckpointError: more of it is lost than parity makes up for.
    """
    found = _without_damaged(found, node_holder=node_holder, peers=peers)
    if found.lost:
        found = _rebuild(found, node_holder=node_holder, peers=peers)
    source: list[MemorySource] = []

    def attach() -> None:
        holds = any(node == node_holder.node.number for node, _ in found.where.values())
        source.append(
            MemorySource(
                found, node_holder=node_holder, client=node_holder.connect() if holds else None
            )
        )

    peers.agree("attach to the snapshot", attach)
    return source[0]


def _without_damaged(found: Recoverable, *, node_holder: NodeHolder, peers: Peers) -> Recoverable:
    """Count members whose bytes no longer have their digest as lost.

    Raises:
        CheckpointError: then more are lost than can be.
    """

    def damaged() -> list[int]:
        mine = [m for m, (node, _) in found.where.items() if node == node_holder.node.number]
        if not node_holder.node.leader or not mine:
            return []
        with node_holder.connect() as client:
            return [m for m in mine if not client.verify(found.epoch, m, found.where[m][1])]

    bad = {m for part in peers.agree("check the snapshot", damaged) for m in part}
    if not bad:
        return found
    left = {m: at for m, at in found.where.items() if m not in bad}
    lost = tuple(sorted({*found.lost, *bad}))

    def check() -> None:
        for group in found.spec.groups:
            gone = [m for m in group if m in lost]
            if len(gone) > found.spec.parity:
                raise ValueError(
                    f"the snapshot of step {found.step} is damaged in nodes {sorted(bad)}, more "
                    f"than its parity ({found.spec.parity} of a group) makes up for"
                )

    peers.agree("check the snapshot", check)
    return replace(found, where=left, lost=lost)


def _rebuild(found: Recoverable, *, node_holder: NodeHolder, peers: Peers) -> Recoverable:
    """Have lost members rebuilt from the rest of their groups, on the nodes that hold least."""
    homes = choice.new_homes(found, node_holder.node.count)

    def listen() -> Any:
        """Where this node's holder, started if it was lost, is reached."""
        if not node_holder.node.leader:
            return None
        with node_holder.start_holder() as client:
            return client.listen(node_holder.node.host)

    answers = peers.agree("start the holders", listen)
    address = [answers[rank] for rank in node_holder.node.leaders]

    def rebuild() -> None:
        mine = [m for m, node in homes.items() if node == node_holder.node.number]
        if not node_holder.node.leader or not mine:
            return
        with node_holder.connect() as client:
            for member in mine:
                group = found.spec.group_of(member)
                client.rebuild(
                    found.spec,
                    member=member,
                    step=found.step,
                    meta=found.meta,
                    digests=found.digests,
                    sources={m: address[found.where[m][0]] for m in group if m in found.where},
                )

    peers.agree("rebuild the lost nodes' snapshots", rebuild)
    inventories = _inventories(node_holder, peers)
    rebuilt: list[Recoverable] = []

    def look() -> None:
        rebuilt.append(choice.again(inventories, found))
        if rebuilt[0].lost:
            raise ValueError(f"nodes {rebuilt[0].lost} were lost while others were rebuilt")

    peers.agree("look for the rebuilt snapshot", look)
    return rebuilt[0]
