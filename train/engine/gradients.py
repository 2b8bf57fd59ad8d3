"""What a backward pass says of its step."""

import math
from typing import NamedTuple


class Gradients(NamedTuple):
    """Over all ranks, and the same on every rank; or, before a pipeline's ranks have heard of each
    other (pipeline.post_validation), over the pipeline ranks up to this one."""

    loss: float
    norm: float
    """Before clipping."""
    num_tokens: int
    """Learned tokens over all ranks."""
    stop: bool
    """Some rank was asked to stop."""

    @classmethod
    def of(cls, sums: list[float], num_tokens: int) -> "Gradients":
        """From summed losses, squared norms and ranks that were asked to stop."""
        loss, square_norm, stops = sums
        return cls(loss, math.sqrt(square_norm), num_tokens, stops > 0)

    @property
    def finite(self) -> bool:
        """Whether an optimizer may step on them."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)
