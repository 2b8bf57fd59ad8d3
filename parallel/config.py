"""What a user may ask of the layout: mesh degrees, activation checkpointing, compile.

Torch-free, so that a wrong key is answered before anything heavy is imported.
"""

from dataclasses import dataclass
from enum import Enum
from math import prod


class ActivationCheckpoint(Enum):
    """What a block keeps for its backward pass."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of the mesh and what is applied to every block."""

    pp: int = 1
    """Pipeline stages' ranks: the layers are cut into `pp * pipeline.stages_per_rank` stages."""
    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP): gradients are all-reduced across them."""
    dp_shard: int = -1
    """Ranks that one model's parameters, gradients and states are sharded over; -1 = what the
    other degrees leave of the world."""
    cp: int = 1
    """Context-parallel ranks, that one sequence is cut over. Only 1 works in this version."""
    tp: int = 1
    """Tensor-parallel ranks, that one matrix is cut over; norms run sequence-parallel."""
    ep: int = 1
    """Expert-parallel ranks, folded out of dp_shard x cp x tp. Only 1 works in this version."""
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint.none
    """none: keep every activation. selective: keep attention and every second matmul, recompute
    the rest. full: keep a block's input only."""
    compile: bool = False
    """torch.compile each transformer block (the first step then takes a minute or more). Under a
    zero-bubble schedule with tp > 1 or selective checkpointing, blocks compute their weight
    gradients together with their input gradients: right, but nothing is gained by the split."""

    def __post_init__(self) -> None:
        for axis in ("pp", "dp_replicate", "cp", "tp", "ep"):
            if getattr(self, axis) < 1:
                raise ValueError(
                    f"parallel.{axis}={getattr(self, axis)}: a degree is a whole number from 1"
                )
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(
                f"parallel.dp_shard={self.dp_shard}: use a whole number from 1, "
                "or -1 for what the other degrees leave of the world"
            )
        for axis, what in (("cp", "context"), ("ep", "expert")):
            if getattr(self, axis) != 1:
                raise ValueError(
                    f"parallel.{axis}={getattr(self, axis)}: {what} parallelism is not part of "
                    f"this version; use parallel.{axis}=1"
                )

    @property
    def fixed_degree(self) -> int:
        """Ranks that one dp_shard slice takes: the product of the other degrees."""
        return prod((self.pp, self.dp_replicate, self.cp, self.tp))

    def sized(self, world_size: int) -> dict[str, int]:
        """The degree of every mesh axis, `dp_shard` filled in.

        Raises:
            ValueError: the degrees do not multiply to `world_size`.
        """
        dp_shard = self.dp_shard
        if dp_shard == -1:
            if world_size % self.fixed_degree:
                raise ValueError(
                    f"parallel: pp={self.pp} x dp_replicate={self.dp_replicate} x cp={self.cp} x "
                    f"tp={self.tp} = {self.fixed_degree} does not divide the {world_size} ranks "
                    "of this run; change a degree or launch.ranks_per_node"
                )
            dp_shard = world_size // self.fixed_degree
        if dp_shard * self.fixed_degree != world_size:
            raise ValueError(
                f"parallel: pp={self.pp} x dp_replicate={self.dp_replicate} x dp_shard={dp_shard} "
                f"x cp={self.cp} x tp={self.tp} = {dp_shard * self.fixed_degree}, but this run "
                f"has {world_size} ranks (launch.nodes x launch.ranks_per_node); make them equal, "
                "or set parallel.dp_shard=-1"
            )
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": dp_shard,
            "cp": self.cp,
            "tp": self.tp,
        }
