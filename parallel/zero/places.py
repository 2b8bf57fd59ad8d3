"""With whom a rank divides a model, and who holds copies of its share; by numbers, without a group.

What `groups` makes process groups of. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import Extent, data_ranks_per_node


@dataclass(frozen=True, kw_only=True)
class GroupRanks:
    """World ranks that one rank talks to, itself among them, in order."""

    rank: int
    ranks_per_node: int
    across: tuple[int, ...]
    """Ranks at this one's place in each node."""
    local: tuple[int, ...]
    """Ranks of this node."""
    copies: tuple[int, ...]
    """Ranks that hold the same slice."""

    @property
    def num_slices(self) -> int:
        """Slices that a model is cut into."""
        return len(self.across) * len(self.local)


def place_of(
    rank: int, degrees: Mapping[str, int], ranks_per_node: int, config: ZeroConfig
) -> GroupRanks:
    """The place of world rank `rank`; `degrees` as ParallelConfig.sized gives them.

    Raises:
        ValueError: the ranks of a node do not fit `config`.
    """
    shards, tp, replicas = degrees["dp_shard"], degrees["tp"], degrees["dp_replicate"]
    per_node = data_ranks_per_node(shards, tp, ranks_per_node)
    config.check_nodes(shards, per_node)
    local = config.secondary_shard or per_node or shards
    first = rank - rank % (shards * replicas * tp) + rank % tp
    mine = (rank - first) // tp  # of the data-parallel ranks, replica by replica

    def world(*places: int) -> tuple[int, ...]:
        return tuple(first + tp * place for place in places)

    states = config.extents.states
    if states is Extent.all:
        model = mine - mine % shards
        near = mine - (mine - model) % local
        return GroupRanks(
            rank=rank,
            ranks_per_node=ranks_per_node,
            across=world(*range(model + (mine - near), model + shards, local)),
            local=world(*range(near, near + local)),
            copies=world(*range(mine % shards, shards * replicas, shards)),
        )
    slices = local if states is Extent.node else 1
    near = mine - mine % slices
    return GroupRanks(
        rank=rank,
        ranks_per_node=ranks_per_node,
        across=world(mine),
        local=world(*range(near, near + slices)),
        copies=world(*range(mine % slices, shards * replicas, slices)),
    )
