"""A model or pipeline stage whose parameters the data-parallel ranks divide.

Modules' hooks gather a unit before it runs and free it after, forward and backward, and take up its
gradients when its backward pass is through; the next unit is gathered meanwhile. Gradients are
summed, never averaged: the loss is already divided by the global number of tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from phalanx.parallel.mesh import Mesh
from phalanx.parallel.plan import ModelPlan, ShardUnit
from phalanx.parallel.zero.collectives import Lane
from phalanx.parallel.zero.config import Offload, ZeroConfig
from phalanx.parallel.zero.groups import zero_groups
from phalanx.parallel.zero.settings import Dtypes, Settings
from phalanx.parallel.zero.unit import Unit, cut_parameters


class Sharder:
    """What all of a rank's models or stages share: groups, lanes and formats."""

    def __init__(self, mesh: Mesh, config: ZeroConfig, dtypes: Dtypes) -> None:
        """Collective.

        Raises:
            ValueError: the ranks of a node do not fit `config`.
        """
        device = torch.device(mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self.master_device = torch.device("cpu") if config.offload is Offload.cpu else device
        """Where master parameters and optimizer states lie."""
        self._settings = Settings(
            config=config,
            groups=zero_groups(mesh, config),
            dtypes=dtypes,
            device=device,
            param_lane=Lane(device),
            grad_lane=Lane(device),
        )
        self._taken: set[int] = set()
        # A single rank is left as it is where that changes nothing.
        self._has_work = (
            mesh.dp_size * mesh.size("cp") > 1
            or dtypes.params != dtypes.compute
            or self.master_device != device
        )

    def shard(self, model: nn.Module, plan: ModelPlan) -> "Sharding":
        """Divide a model's parameters, in place; it may lie on the meta device."""
        if not self._has_work:
            return Sharding([])
        units: dict[nn.Module, Unit] = {}
        for group in (
            *(ShardUnit(modules=[block]) for block in plan.blocks),
            *plan.shard_units,
            ShardUnit(modules=[model], keep_gathered=True),  # what no other has
        ):
            params = cut_parameters(group.modules, self._settings.groups, self._taken)
            if params:
                units[group.modules[0]] = Unit(
                    group.modules,
                    params,
                    self._settings,
                    keep_gathered=group.keep_gathered,
                    unused_in_backward=group.unused_in_backward,
                )
        return Sharding([units[module] for module in model.modules() if module in units])


class Sharding:
    """The units of one model or stage, in the order they run; none where nothing is divided."""

    def __init__(self, units: list[Unit]) -> None:
        self.units = units
        self._last = True
        self._deferring = False
        self._open: list[Unit] | None = None
        """Units whose backward pass is not through; None outside of a backward pass."""
        for place, unit in enumerate(units):
            _Hooks(self, unit, units[place - 1 : place], units[place + 1 : place + 2])

    def before_backward(self, *, last: bool) -> None:
        """Say which backward pass comes; `last`: of the step."""
        self._last, self._deferring, self._open = last, False, None

    def before_input_gradient(self) -> None:
        """A backward pass comes that defers its weight gradients: nothing is reduced in it."""
        self._deferring, self._open = True, None

    def after_weight_gradient(self, *, last: bool) -> None:
        """Take up the deferred weight gradients of a microbatch; `last`: of the step."""
        for unit in reversed(self.units):
            unit.reduced.take(last=last)
        if last:
            self._end_step()

    def forget(self) -> None:
        """Free all that was gathered, for the masters may have changed."""
        for unit in self.units:
            unit.gathered.forget()

    def enter_backward(self) -> None:
        """A unit's backward pass begins."""
        if self._open is None:
            self._open = list(self.units)
            Variable._execution_engine.queue_callback(self._leave_backward)

    def leave(self, unit: Unit) -> None:
        """A unit's backward pass is through."""
        if self._open is None or unit not in self._open:
            return
        self._open.remove(unit)
        if not self._deferring:
            unit.reduced.take(last=self._last)
        if self._last and not self._deferring:
            unit.gathered.forget()  # not used again before the optimizer comes
        else:
            unit.gathered.free()

    def _leave_backward(self) -> None:
        for unit in reversed(self._open or ()):
            self.leave(unit)
        self._open = None
        if self._last and not self._deferring:
            self._end_step()

    def _end_step(self) -> None:
        for unit in reversed(self.units):
            unit.reduced.settle()
        # The optimizer comes next.
        self.forget()


class _Hooks:
    """What happens around a unit's modules."""

    def __init__(
        self, sharding: Sharding, unit: Unit, before: list[Unit], after: list[Unit]
    ) -> None:
        self._sharding, self._unit = sharding, unit
        self._before = [other for other in before if not other.unused_in_backward]
        self._after = after
        first, last = unit.modules[0], unit.modules[-1]
        first.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        last.register_forward_hook(self._after_forward)

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._unit.gathered.finish()
        for other in self._after:
            other.gathered.start()
        if not torch.is_grad_enabled():
            return args, kwargs
        watched = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad]
        if watched:
            passed = _AfterBackward.apply(self, *(args[i] for i in watched))
            args = tuple(
                passed[watched.index(i)] if i in watched else arg for i, arg in enumerate(args)
            )
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._unit.keep_gathered:
            self._unit.gathered.free()
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._before_backward)

    def _before_backward(self, grad: Tensor) -> None:
        self._sharding.enter_backward()
        if self._unit.unused_in_backward:
            return
        self._unit.gathered.finish()
        for other in self._before:
            other.gathered.start()

    def after_backward(self) -> None:
        """Every gradient of the unit's inputs, and so of its parameters, is there."""
        self._sharding.leave(self._unit)


class _AfterBackward(torch.autograd.Function):
    """Hands its inputs on; its backward pass comes when that of what uses them is through."""

    @staticmethod
    def forward(ctx: Any, hooks: _Hooks, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.hooks = hooks
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.hooks.after_backward()
        return None, *grads
