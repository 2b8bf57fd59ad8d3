"""What a model tells about itself so that it can be parallelized without knowing how."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle


@dataclass(kw_only=True)
class ModelPlan:
    """The seams of one model, or of one pipeline stage of it."""

    blocks: list[nn.Module]
    """Units of activation checkpointing, compilation and sharding, in the order they run."""
    shard_units: list[list[nn.Module]] = field(default_factory=list)
    """Further groups of modules whose parameters are gathered together; what is in no unit goes
    with the root."""
    tensor: dict[str, ParallelStyle] = field(default_factory=dict)
    """Tensor-parallel styles by the module's name relative to the root."""
    tie_weights: Callable[[], None] = lambda: None
    """Restores shared parameters after tensor parallelism replaced them."""
