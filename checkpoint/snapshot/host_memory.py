"""Whether a node has the host memory that its snapshots need, asked before training begins."""

from phalanx.checkpoint.holder.memory import GIB, available_bytes
from phalanx.checkpoint.holder.of_node import NodeHolder


def check_host_memory(nbytes: int, *, node_holder: NodeHolder, num_nodes: int, held: int) -> None:
    """Compare what this machine's snapshots will take with what is free.

    Args:
        nbytes: of one copy of the node's state.
        num_nodes: of the group that it is protected in.
        held: bytes taken by snapshots of an earlier start, given up when the first new one stands.

    Raises:
        ValueError: it is too little; says how much is needed.
    """
    node, config, snapshot = node_holder.node, node_holder.config, node_holder.config.snapshot
    factor = num_nodes / (num_nodes - node_holder.num_parity)
    same_machine = node.same_machine
    needed = int(nbytes * factor * node_holder.slots) * same_machine
    free = available_bytes() + held * same_machine
    if needed <= free:
        return
    nodes = f" for {same_machine} nodes on this machine" if same_machine > 1 else ""
    setting = (
        f"checkpoint.snapshot.every={snapshot.every}, parity={snapshot.parity}"
        if snapshot.every
        else f"checkpoint.every={config.every}, save_last={str(config.save_last).lower()}"
    )
    raise ValueError(
        f"{setting}: {needed / GIB:.2f} GiB of host memory are needed{nodes} "
        f"({node_holder.slots} generations of {nbytes * factor / GIB:.2f} GiB), but "
        f"{free / GIB:.2f} GiB are free; use more nodes, less parity, or zero.partition.states=all"
    )
