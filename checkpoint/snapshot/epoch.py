"""One set-up of every node's holder: who keeps what, in which memory, protected by which groups.

Every start of a job opens a new one. What the one before holds stays until the new one has its
first committed snapshot.
"""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.holder.client import HolderClient
from phalanx.checkpoint.holder.of_node import NodeHolder
from phalanx.checkpoint.holder.spec import Spec
from phalanx.checkpoint.holder.transport import Address
from phalanx.checkpoint.nodes.groups import make_groups
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.snapshot.copier import Copier
from phalanx.checkpoint.snapshot.host_memory import check_host_memory
from phalanx.checkpoint.snapshot.shares import share
from phalanx.checkpoint.torch_types import name_of

OTHERS_S = 10.0
"""Seconds that ranks of an earlier start may take to be gone."""


@dataclass(kw_only=True)
class Epoch:
    """An epoch as this rank sees it."""

    name: str
    tables: list[PartTable]
    """The part of every rank."""
    table: PartTable
    """This rank's."""
    groups: list[tuple[int, ...]]
    warnings: list[str]
    """Of the placement."""
    client: HolderClient
    """Of the thread that takes snapshots."""
    memory: list[memoryview] = field(repr=False)
    """This rank's part, by slot."""
    offered: frozenset[str]
    """Names of all that this rank had to give, copies of what others keep included."""
    first: bool = True
    """Whether no snapshot of it was committed so far."""

    def sources(self, chunks: Mapping[str, Chunk]) -> list[Tensor]:
        """What this rank keeps, in the order of its part."""
        return [chunks[entry.name].local for entry in self.table.entries]

    def fits(self, chunks: Mapping[str, Chunk]) -> bool:
        """Whether the chunks are those that the epoch was opened for."""
        if chunks.keys() != self.offered:
            return False
        return all(
            (chunk.box, name_of(chunk.local.dtype)) == (entry.box, entry.info.dtype)
            for entry in self.table.entries
            for chunk in (chunks[entry.name],)
        )

    def close(self) -> None:
        """Let go of the memory."""
        self.memory.clear()
        self.client.close()


def open_epoch(
    chunks: Mapping[str, Chunk], *, node_holder: NodeHolder, peers: Peers, copier: Copier
) -> Epoch:
    """Set up all holders for snapshots of `chunks`; collective.

    Raises:
        CheckpointError: on every rank, where one node has too little memory or no holder.
        ValueError: the nodes cannot be protected as asked.
    """
    node = node_holder.node
    tables = share(chunks, peers=peers)
    groups, warnings = make_groups(
        node.racks, parity=node_holder.num_parity, group_size=node_holder.config.snapshot.group_size
    )

    held: list[int] = []

    def start() -> tuple[str, str, Address | None]:
        address = None
        if node.leader:
            needed = sum(tables[rank].nbytes for rank in node.ranks_of(node.number))
            group = next(group for group in groups if node.number in group)
            address = _start(needed, node_holder=node_holder, num_nodes=len(group), held=held)
        return secrets.token_hex(8), secrets.token_hex(32), address

    answers = peers.agree("start the snapshots' holders", start)
    name, token, _ = answers[0]
    spec = Spec(
        epoch=name,
        token=token,
        parity=node_holder.num_parity,
        num_slots=node_holder.slots,
        groups=tuple(groups),
        addresses=tuple(answers[leader][2] for leader in node.leaders),
        ranks=tuple(tuple(node.ranks_of(number)) for number in range(node.count)),
        parts=[table.to_json() for table in tables],
    )

    def open_here() -> None:
        if node.leader:
            # What was held before goes with the first commit; the second generation comes then.
            populate = 1 if held[0] else node_holder.populated
            with node_holder.connect() as client:
                client.open(spec, member=node.number, populate=populate)

    peers.agree("reserve memory for snapshots", open_here)
    attached: list[tuple[HolderClient, list[memoryview]]] = []
    peers.agree(
        "attach to the snapshots' memory",
        partial(
            _attach, attached, node_holder=node_holder, epoch=name, rank=peers.rank, copier=copier
        ),
    )
    client, memory = attached[0]
    return Epoch(
        name=name,
        tables=tables,
        table=tables[peers.rank],
        groups=groups,
        warnings=warnings,
        client=client,
        memory=memory,
        offered=frozenset(chunks),
    )


def _start(
    nbytes: int, *, node_holder: NodeHolder, num_nodes: int, held: list[int]
) -> Address | None:
    """Start this node's holder; its address where it has to do with others. Adds to `held` the
    bytes that it has taken for an earlier start: what was never taken is free already."""
    with node_holder.start_holder() as client:
        _check_unused(client, node_holder)
        held.append(client.inventory().taken)
        check_host_memory(nbytes, node_holder=node_holder, num_nodes=num_nodes, held=held[0])
        return client.listen(node_holder.node.host) if node_holder.num_parity else None


def _check_unused(client: HolderClient, node_holder: NodeHolder) -> None:
    """Wait until the ranks of the start before are gone; they may just be dying.

    Raises:
        ValueError: they live on, and would write to the same checkpoints.
    """
    deadline = time.monotonic() + OTHERS_S
    while ranks := sorted({r for epoch in client.inventory().epochs for r in epoch.attached}):
        if time.monotonic() > deadline:
            raise ValueError(
                f"checkpoint.dir={node_holder.config.dir}: another start of this run is alive on "
                f"node {node_holder.node.number} (ranks {', '.join(map(str, ranks))}); end it "
                "first, or choose another run.dir"
            )
        time.sleep(0.05)


def _attach(
    attached: list[tuple[HolderClient, list[memoryview]]],
    *,
    node_holder: NodeHolder,
    epoch: str,
    rank: int,
    copier: Copier,
) -> None:
    client = node_holder.connect()
    memory = client.attach(epoch, rank)
    copier.unpin()
    attached.append((client, memory))
