"""Optimizers by name."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from phalanx.train.optim.adamw import AdamW
from phalanx.train.optim.config import OptimConfig, OptimizerName
from phalanx.train.optim.low_bit import LowBitAdamW


class Optimizer(Protocol):
    """What steps one rank's parameters, wherever they lie."""

    def step(self, lr: float, *, keep_gradients: bool = False) -> None:
        """Update every parameter that has a gradient, then drop the gradients, or keep them."""

    def drop_gradients(self) -> None:
        """Free every parameter's gradient."""

    def state_tensors(self) -> dict[str, Tensor]:
        """States by name, laid out as the parameters are; views, there from the start."""


OPTIMIZERS: dict[OptimizerName, Callable[[Mapping[str, nn.Parameter], OptimConfig], Optimizer]] = {
    OptimizerName.adamw: AdamW,
    OptimizerName.adamw8bit: LowBitAdamW,
    OptimizerName.adamw4bit: LowBitAdamW,
}
"""By optim.name; made from parameters by the whole model's names."""


def make_optimizer(named_parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    """The configured optimizer of this rank's parameters.

    Raises:
        ValueError: it cannot take the parameters as the ranks cut them.
    """
    return OPTIMIZERS[config.name](named_parameters, config)
