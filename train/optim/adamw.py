"""AdamW over named parameters, with state that can be saved by name.

The update is torch's fused kernel, run on each rank's own shards: no DTensor dispatch in the step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phalanx.train.optim.config import OptimConfig
from phalanx.train.optim.rollback import undo_adamw
from phalanx.train.optim.sharded import laid_out_like, local_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Optimizer of one rank's parameters.

    Matrices decay, vectors (norms, biases) do not. State exists from the start, so that a
    checkpoint loads into it in place.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self._config = config
        self._parameters = dict(named_parameters)
        self._shards = {name: nn.Parameter(local_of(p)) for name, p in self._parameters.items()}
        decayed = [s for n, s in self._shards.items() if self._parameters[n].dim() >= 2]
        plain = [s for n, s in self._shards.items() if self._parameters[n].dim() < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if params
        ]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        for shard in self._shards.values():
            self._optimizer.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                **{moment: torch.zeros_like(shard) for moment in MOMENTS},
            }

    @torch.no_grad()
    def step(self, lr: float, *, keep_gradients: bool = False) -> None:
        """Update every parameter that has a gradient, then drop the gradients.

        `keep_gradients`: leave them in place, so that `rollback` can take the step back.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._attach()
        self._optimizer.step()
        for shard in self._shards.values():
            shard.grad = None
        if not keep_gradients:
            self.drop_gradients()

    @torch.no_grad()
    def rollback(self, lr: float) -> None:
        """Take the last step back, in place and up to rounding (see `undo_adamw`).

        Its gradients must be there still, and `lr` be its learning rate.
        """
        self._attach()
        for group in self._optimizer.param_groups:
            for shard in group["params"]:
                if shard.grad is not None:
                    undo_adamw(
                        shard.data,
                        shard.grad,
                        self._optimizer.state[shard],
                        self._config,
                        lr=lr,
                        weight_decay=group["weight_decay"],
                    )
                shard.grad = None

    def drop_gradients(self) -> None:
        """Free every parameter's gradient."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def _attach(self) -> None:
        """Let the optimizer's view of each parameter see its data and gradient of now."""
        for name, shard in self._shards.items():
            parameter = self._parameters[name]
            grad = parameter.grad
            shard.data = local_of(parameter)
            shard.grad = None if grad is None else local_of(grad)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by name, laid out as the parameters are; views, not copies."""
        tensors: dict[str, Tensor] = {}
        for name, shard in self._shards.items():
            state = self._optimizer.state[shard]
            for moment in MOMENTS:
                tensors[f"optim.{moment}.{name}"] = laid_out_like(
                    self._parameters[name], state[moment]
                )
            tensors[f"optim.step.{name}"] = state["step"]
        return tensors
