"""What a user may ask of ZeRO sharding."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class ZeroConfig:
    """How the data-parallel ranks divide parameters, gradients and optimizer states."""

    stage: int = 3
    """0: everything replicated, gradients all-reduced. 1: optimizer states sharded, gradients
    reduced once a step. 2: gradients sharded too, reduced at each microbatch. 3: parameters
    sharded too, gathered again for the backward pass."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero.stage={self.stage}: choose 0, 1, 2 or 3")
