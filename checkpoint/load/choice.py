"""Which snapshot in memory a new start of the job goes on from, by what the holders say they have.

A step can be had from an epoch when some holder saw it committed (every member had it then, with
its parity), no member that is left has let go of it, and no group has lost more members than it has
parity. Torch-free.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.checkpoint.holder.inventory import COMMITTED, Inventory, SlotInventory
from phalanx.checkpoint.holder.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Recoverable:
    """A snapshot that can be had."""

    step: int
    spec: Spec
    """The epoch's."""
    digests: Sequence[int]
    """Of every member's data."""
    meta: dict[str, Any]
    """What the trainer gave when it was committed."""
    where: dict[int, tuple[int, int]]
    """Member to (node of this job that holds it, slot)."""
    lost: tuple[int, ...]
    """Members that must be rebuilt from the others of their groups."""

    @property
    def epoch(self) -> str:
        """Its epoch's name."""
        return self.spec.epoch


def newest(
    inventories: Sequence[Inventory | None],
    *,
    without: Collection[tuple[str, int]] = (),
    durable: int = -1,
) -> tuple[Recoverable | None, list[str]]:
    """The newest snapshot that can be had, and why newer ones cannot.

    Args:
        inventories: what each node's holder has, by node; None where there was no holder.
        without: (epoch, step) of those that are not wanted.
        durable: step that is in storage; what is older is not wanted, and it alone is no loss.
    """
    reasons: list[str] = []
    specs: dict[str, Spec] = {}
    for inventory in inventories:
        for held in inventory.epochs if inventory else ():
            specs.setdefault(held.epoch, held.spec)
    candidates: list[tuple[int, str]] = []
    for epoch in specs:
        steps = {
            slot.step
            for _, slots in _members(inventories, epoch)
            for slot in slots
            if slot.state == COMMITTED and slot.step is not None
        }
        candidates += [(step, epoch) for step in steps]
    for step, epoch in sorted(candidates, reverse=True):
        if (epoch, step) in without or step < durable:
            continue
        found = _at(inventories, specs[epoch], step=step)
        if isinstance(found, Recoverable):
            return found, reasons
        if step > durable:
            reasons.append(found)
    return None, reasons


def again(inventories: Sequence[Inventory | None], found: Recoverable) -> Recoverable:
    """Where a snapshot that was found is now.

    Raises:
        ValueError: more of it was lost meanwhile than parity makes up for.
    """
    answer = _at(inventories, found.spec, step=found.step)
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _members(
    inventories: Sequence[Inventory | None], epoch: str
) -> list[tuple[tuple[int, int], Sequence[SlotInventory]]]:
    """((member, node), what the node has of it) of an epoch."""
    return [
        ((member, node), slots)
        for node, inventory in enumerate(inventories)
        if inventory
        for held in inventory.epochs
        if held.epoch == epoch
        for member, slots in held.members.items()
    ]


def _at(inventories: Sequence[Inventory | None], spec: Spec, *, step: int) -> Recoverable | str:
    """The snapshot of one step, or why it cannot be had."""
    where: dict[int, tuple[int, int]] = {}
    committed: SlotInventory | None = None
    for (member, node), slots in _members(inventories, spec.epoch):
        for slot in slots:
            if slot.step == step and slot.whole:
                where.setdefault(member, (node, slot.slot))
                if slot.state == COMMITTED:
                    committed = slot
    lost = [member for member in range(len(spec.ranks)) if member not in where]
    for group in spec.groups:
        gone = [member for member in group if member in lost]
        if len(gone) > spec.parity:
            names = ", ".join(map(str, gone))
            return (
                f"the snapshot of step {step} cannot be had: of its group of {len(group)} nodes, "
                f"{len(gone)} are lost (nodes {names}), and its parity makes up for "
                f"{spec.parity}"
            )
    if committed is None:
        return f"the snapshot of step {step} cannot be had: nobody is left that saw it committed"
    return Recoverable(
        step=step,
        spec=spec,
        digests=committed.digests,
        meta=committed.meta,
        where=where,
        lost=tuple(lost),
    )


def new_homes(found: Recoverable, num_nodes: int) -> dict[int, int]:
    """Member that is lost to the node that rebuilds it: nodes that hold least first."""
    load = [0] * num_nodes
    for node, _ in found.where.values():
        load[node] += 1
    homes: dict[int, int] = {}
    for member in found.lost:
        node = min(range(num_nodes), key=lambda node: (load[node], node))
        load[node] += 1
        homes[member] = node
    return homes
