"""Which nodes protect each other: groups laid across failure domains. Torch-free."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice


def make_groups(
    racks: Sequence[str], *, parity: int, group_size: int
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Divide nodes into groups that protect each other: their numbers by group, and warnings.

    Groups are as large as group_size allows, of nearly equal size. A group has at most `parity`
    nodes of a rack, so that a rack may be lost whole; where that takes smaller groups, they are
    smaller, and where nothing helps, a warning names the rack. Every node that knows the racks
    finds the same groups.

    Args:
        racks: by node, the label of what it shares its fate with; "" = it shares with nobody.
        parity: nodes of a group that may be lost; 0 = every node for itself.
        group_size: most nodes of a group.

    Raises:
        ValueError: no such groups can be made of so many nodes.
    """
    num_nodes = len(racks)
    if not parity:
        return [(node,) for node in range(num_nodes)], []
    fewest, most = -(-num_nodes // group_size), num_nodes // (parity + 1)
    if fewest > most:
        raise ValueError(_impossible(num_nodes, parity, group_size))
    by_rack = {rack: count for rack, count in sorted(Counter(racks).items()) if rack}

    def crowded(num_groups: int) -> list[str]:
        return [rack for rack, count in by_rack.items() if count > parity * num_groups]

    num_groups = min(range(fewest, most + 1), key=lambda number: (len(crowded(number)), number))
    # Dealt like cards, rack by rack: of c nodes of a rack, no group gets more than c / groups,
    # rounded up, and sizes differ by one at most.
    order = sorted(range(num_nodes), key=lambda node: (racks[node], node))
    groups = sorted(
        tuple(sorted(islice(order, first, None, num_groups))) for first in range(num_groups)
    )
    return groups, [_crowded_warning(rack, groups, racks, parity) for rack in crowded(num_groups)]


def _impossible(num_nodes: int, parity: int, group_size: int) -> str:
    if num_nodes <= parity:
        advice = f"take launch.nodes={parity + 1} or more, or less parity"
    else:
        advice = f"take another number of nodes, less parity, or a larger group_size ({num_nodes})"
    return (
        f"checkpoint.snapshot.parity: {parity} parities need groups of at least {parity + 1} "
        f"nodes, of at most checkpoint.snapshot.group_size={group_size}; launch.nodes={num_nodes} "
        f"cannot be divided so: {advice}"
    )


def _crowded_warning(
    rack: str, groups: Iterable[tuple[int, ...]], racks: Sequence[str], parity: int
) -> str:
    shared = max(([node for node in group if racks[node] == rack] for group in groups), key=len)
    return (
        f"rack {rack} holds {len(shared)} nodes of one group ({', '.join(map(str, shared))}), of "
        f"which checkpoint.snapshot.parity lets {parity} be lost: losing the rack loses the "
        "snapshots in memory; use more racks or more parity"
    )
