"""Optimizers side by side: ours, torch's, and those of packages that this machine has."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from phalanx.parallel.ranks import Ranks
from phalanx.train.optim.config import OptimConfig, OptimizerName
from phalanx.train.optim.registry import make_optimizer

LR = 1e-3
PEER = "torch_fused"
"""torch.optim.AdamW with its fused kernel: what everything is compared with."""

PACKAGES = {"torchao": "torchao.optim", "deepspeed": "deepspeed.ops.adam"}
"""What is measured too where it is installed (DeepSpeed's on CPUs): where its optimizers are."""

Parameters = Mapping[str, nn.Parameter]


class Contender(Protocol):
    """An optimizer of some parameters, whose gradients stay in place."""

    def step(self) -> None:
        """Update every parameter."""

    def states(self) -> list[Tensor]:
        """All tensors that it keeps from step to step."""


class Ours:
    """An optimizer of the registry."""

    def __init__(self, name: OptimizerName, parameters: Parameters, config: OptimConfig) -> None:
        settings = {key: getattr(config, key) for key in ("beta1", "beta2", "eps", "weight_decay")}
        self._optimizer = make_optimizer(parameters, OptimConfig(name=name, **settings))

    def step(self) -> None:
        """Update every parameter."""
        self._optimizer.step(LR, keep_gradients=True)

    def states(self) -> list[Tensor]:
        """Moments or codes and scales, and step counts."""
        return list(self._optimizer.state_tensors().values())


class Theirs:
    """An optimizer with torch's interface."""

    def __init__(self, make: Callable[..., Any], parameters: Parameters, **options: Any) -> None:
        self._optimizer = make(list(parameters.values()), **options)

    def step(self) -> None:
        """Update every parameter."""
        self._optimizer.step()

    def states(self) -> list[Tensor]:
        """What stands in `state`, wrapper classes taken apart."""
        values = chain.from_iterable(state.values() for state in self._optimizer.state.values())
        return [part for value in values if isinstance(value, Tensor) for part in _parts(value)]


def contenders(config: OptimConfig, ranks: Ranks) -> dict[str, Callable[[Parameters], Contender]]:
    """What can be measured on this machine, by name; makes an optimizer of parameters."""
    options: dict[str, Any] = {
        "lr": LR,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    found: dict[str, Callable[[Parameters], Contender]] = {
        PEER: partial(Theirs, torch.optim.AdamW, fused=True, **options)
    }
    for name in OptimizerName:
        found[name.name] = partial(Ours, name, config=config)
    torchao, deepspeed = map(_package, PACKAGES.values())
    if torchao is not None:
        for bits in (8, 4):
            make = getattr(torchao, f"AdamW{bits}bit")
            found[f"torchao_{bits}bit"] = partial(Theirs, make, **options)
    if deepspeed is not None and ranks.device_type == "cpu":
        make = deepspeed.DeepSpeedCPUAdam
        found["deepspeed_cpu_adam"] = partial(Theirs, make, adamw_mode=True, **options)
    return found


def left_out() -> list[str]:
    """Packages whose optimizers would be measured too, if they were here."""
    return [name for name, module in PACKAGES.items() if _package(module) is None]


def _package(module: str) -> Any:
    """A module of a package that need not be there; None where it is not."""
    try:
        return import_module(module)
    except ImportError:
        return None


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a wrapper class is made of; tables that all share count each time."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names if name != "qmap"]
