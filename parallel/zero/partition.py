"""Over how many data-parallel ranks parameters, gradients and optimizer states are divided.

Three independent extents with params <= grads <= states (AMSP, Chen et al., 2023; PaRO, Wu et al.,
2023): what is divided finer is also held by fewer. ZeRO's stages, MiCS, and the secondary shard of
ZeRO++ are points of this space. Torch-free.
"""

from dataclasses import dataclass
from enum import Enum
from itertools import product


class Extent(Enum):
    """The ranks among which something is divided."""

    none = "none"
    node = "node"
    all = "all"

    @property
    def width(self) -> int:
        """Its place in none < node < all."""
        return list(Extent).index(self)


@dataclass(frozen=True)
class Partition:
    """What the data-parallel ranks divide."""

    params: Extent
    """Parameters in the compute format, between steps and microbatches."""
    grads: Extent
    """Gradients, from one microbatch to the next."""
    states: Extent
    """Master parameters and optimizer states."""

    @property
    def is_nested(self) -> bool:
        """Whether params <= grads <= states."""
        return self.params.width <= self.grads.width <= self.states.width

    def __str__(self) -> str:
        return f"params={self.params.name} grads={self.grads.name} states={self.states.name}"


POINTS = tuple(
    point for extents in product(Extent, repeat=3) if (point := Partition(*extents)).is_nested
)
"""The ten points of the space."""

_N, _I, _G = Extent
STAGES = (
    Partition(_N, _N, _N),
    Partition(_N, _N, _G),
    Partition(_N, _G, _G),
    Partition(_G, _G, _G),
)
"""ZeRO's stages 0 to 3 (Rajbhandari et al., 2020)."""

NAMES = {
    Partition(_N, _N, _N): "ZeRO 0, DDP",
    Partition(_N, _N, _I): "ZeRO 1 in each node",
    Partition(_N, _N, _G): "ZeRO 1",
    Partition(_N, _I, _I): "ZeRO 2 in each node",
    Partition(_N, _I, _G): "PaRO-NIG",
    Partition(_N, _G, _G): "ZeRO 2",
    Partition(_I, _I, _I): "MiCS, HSDP",
    Partition(_I, _I, _G): "PaRO-IIG",
    Partition(_I, _G, _G): "ZeRO++ hpZ",
    Partition(_G, _G, _G): "ZeRO 3",
}
"""What others call the points."""


def data_ranks_per_node(dp_shard: int, tp: int, ranks_per_node: int) -> int | None:
    """How many of the `dp_shard` ranks of one model share a node; None where nodes differ in it.

    Ranks are numbered with tensor parallelism innermost, and data-parallel ranks next.
    """
    span = dp_shard * tp
    if ranks_per_node % span == 0:
        return dp_shard
    if span % ranks_per_node == 0 and ranks_per_node % tp == 0:
        return ranks_per_node // tp
    if tp % ranks_per_node == 0:
        return 1
    return None
