"""The groups that a model's data-parallel ranks talk in, by the extent of its optimizer states."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from phalanx.parallel.mesh import Mesh
from phalanx.parallel.zero.collectives import Hop
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import Extent, data_ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Who divides a model with this rank, and who holds copies of what this rank holds."""

    across: Hop
    """Ranks at this one's place in each node."""
    local: Hop
    """Ranks of this node."""
    copies: Hop
    """Ranks that hold the same slice."""
    spec: DeviceMesh
    """(copies, slices): what masters are laid out over."""

    @property
    def num_slices(self) -> int:
        """Slices that a model is cut into."""
        return self.across.size * self.local.size

    @property
    def slice_index(self) -> int:
        """The slice that this rank owns."""
        return self.across.rank * self.local.size + self.local.rank


def zero_groups(mesh: Mesh, config: ZeroConfig) -> Groups:
    """Make the groups; collective.

    Raises:
        ValueError: see `ZeroConfig.check_nodes`.
    """
    assert mesh.size("cp") == 1, "context-parallel ranks would have to add up gradients too"
    size, world, states = mesh.size("dp_shard"), mesh.world, config.extents.states
    per_node = data_ranks_per_node(size, mesh.size("tp"), mesh.ranks_per_node)
    config.check_nodes(size, per_node)
    local = config.secondary_shard or per_node or size
    if states is Extent.all:
        spec = world["dp_replicate", "dp_shard"]
        across, inside = _two_levels(world["dp_shard"], local)
        return Groups(
            across=_hop(across, mesh),
            local=_hop(inside, mesh),
            copies=_hop(world["dp_replicate"], mesh),
            spec=spec if mesh.size("dp_replicate") > 1 else world["dp_shard"],
        )
    flat = world["dp_replicate", "dp_shard"]._flatten("dp")
    slices = local if states is Extent.node else 1
    spec = flat._unflatten(0, (flat.size() // slices, slices), ("dp_copies", "dp_slices"))
    return Groups(
        across=_hop(None, mesh),
        local=_hop(spec["dp_slices"], mesh),
        copies=_hop(spec["dp_copies"], mesh),
        spec=spec,
    )


def _two_levels(ranks: DeviceMesh, local: int) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """(across, local): `local` neighbours each; a level of one rank is None."""
    if local == ranks.size():
        return None, ranks
    if local == 1:
        return ranks, None
    levels = ranks._unflatten(0, (ranks.size() // local, local), ("dp_across", "dp_local"))
    return levels["dp_across"], levels["dp_local"]


def _hop(ranks: DeviceMesh | None, mesh: Mesh) -> Hop:
    group: dist.ProcessGroup | None = None
    if ranks is not None and ranks.size() > 1:
        group = ranks.get_group()
    return Hop(group, mesh.meter)
