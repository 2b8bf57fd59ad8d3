"""What a model tells about itself so that it can be parallelized without knowing how."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle


@dataclass(frozen=True, kw_only=True)
class ShardUnit:
    """Modules outside the blocks whose parameters are gathered together."""

    modules: list[nn.Module]
    keep_gathered: bool = False
    """The backward pass begins here, right after the forward pass: freeing between is waste."""
    unused_in_backward: bool = False
    """The backward pass needs no weights (an embedding's): they are not gathered for it."""


@dataclass(kw_only=True)
class ModelPlan:
    """The seams of one model, or of one pipeline stage of it."""

    blocks: list[nn.Module]
    """Units of activation checkpointing, compilation and sharding, in the order they run."""
    shard_units: list[ShardUnit] = field(default_factory=list)
    """Units of sharding beside the blocks; what is in no unit goes with the root."""
    tensor: dict[str, ParallelStyle] = field(default_factory=dict)
    """Tensor-parallel styles by the module's name relative to the root."""
    tie_weights: Callable[[], None] = lambda: None
    """Restores shared parameters after tensor parallelism replaced them."""
