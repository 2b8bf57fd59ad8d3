"""The only place where device meshes are made.

One world mesh with the axes `pp, dp_replicate, dp_shard, cp, tp`, outermost first: tensor-parallel
ranks are neighbours (and so on one machine), pipeline stages the farthest apart.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from phalanx.parallel.comm_meter import CommMeter
from phalanx.parallel.config import ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


class Mesh:
    """This rank's place in the layout, and the groups it talks to."""

    def __init__(self, world: DeviceMesh, *, ranks_per_node: int) -> None:
        assert world.mesh_dim_names == AXES, world.mesh_dim_names
        self.world = world
        self.ranks_per_node = ranks_per_node
        self.meter = CommMeter(rank=world.get_rank(), ranks_per_node=ranks_per_node)
        """Counts what this rank sends."""

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.world[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        return self.world.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in this axis only."""
        return self.world.get_group(axis)

    def axis(self, axis: str) -> DeviceMesh:
        """The one-dimensional mesh of an axis."""
        return self.world[axis]

    @property
    def dp_size(self) -> int:
        """Ranks that see different samples."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        """This rank's place among those that see different samples."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return self.world.device_type


def build_mesh(
    config: ParallelConfig, *, world_size: int, device_type: str, ranks_per_node: int | None = None
) -> Mesh:
    """Make the world mesh; collective. Without `ranks_per_node`, all ranks are one node.

    Raises:
        ValueError: the degrees do not multiply to `world_size`.
    """
    degrees = config.sized(world_size)
    shape = tuple(degrees[axis] for axis in AXES)
    world = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    return Mesh(world, ranks_per_node=ranks_per_node or world_size)
