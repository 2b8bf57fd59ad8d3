"""Parameters that are gathered, freed and reduced together: a transformer block, say.

See `partition` for what is divided among whom, `layout` for slices and slots. A unit's master
slices are DTensors that optimizer, checkpoints and norms see; its modules compute with `whole`
parameters, whose memory is there from a gather to the next free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from phalanx.parallel.zero.collectives import Hop, Lane, Steps, Transfer
from phalanx.parallel.zero.config import Quantization, ZeroConfig
from phalanx.parallel.zero.groups import Groups
from phalanx.parallel.zero.layout import SliceLayout
from phalanx.parallel.zero.parameter import UnitParameter, shard_parameter
from phalanx.parallel.zero.partition import Extent
from phalanx.parallel.zero.quantize import BlockFormat
from phalanx.parallel.zero.wire import Wire


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Number formats of one run."""

    params: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """Where transfers run, beside the computing."""

    params: Lane
    grads: Lane


class Unit:
    """The parameters of `modules` that no other unit has."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        taken: set[int],
        groups: Groups,
        config: ZeroConfig,
        dtypes: Dtypes,
        lanes: Lanes,
        device: torch.device,
        keep_gathered: bool = False,
        unused_in_backward: bool = False,
    ) -> None:
        """Cut the parameters, in place; `taken` holds the ids of parameters of other units."""
        self.modules = modules
        self.keep_gathered = keep_gathered
        self.unused_in_backward = unused_in_backward
        self.ready = False
        """Whether the whole parameters are there."""
        self._groups, self._dtypes, self._lanes = groups, dtypes, lanes
        self._device = device
        self._extents = config.extents
        self._params = _shard(modules, groups, taken)
        self.layout = SliceLayout(
            [p.shape for p in self._params],
            across=groups.across.size,
            local=groups.local.size,
            block=_block(config),
        )
        self._param_wire = Wire(
            self.layout, dtypes.compute, _format(config.quantize_weights, config)
        )
        self._grad_wire = Wire(
            self.layout, dtypes.reduce, _format(config.quantize_gradients, config)
        )
        self._error_feedback = config.error_feedback and self._grad_wire.is_quantized
        self.residuals: dict[str, Tensor] = {}
        """What rounding took from gradients, by hop; see zero.error_feedback."""
        self._memory: Tensor | None = None
        self._wholes: list[Tensor] = []
        self._gathering: Transfer[Tensor] | None = None
        self._node_copy: Tensor | None = None
        self._summed: Tensor | None = None
        self._reductions: list[Transfer[None]] = []

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._params)

    @property
    def _is_alias(self) -> bool:
        """Whether the master is what modules compute with."""
        return (
            self._groups.num_slices == 1
            and self._dtypes.params == self._dtypes.compute
            and (self._params[0].local.device == self._device)
        )

    @property
    def _keeps_whole(self) -> bool:
        """Whether whole parameters stay for all of a step."""
        return self._extents.params is Extent.none or self._groups.num_slices == 1

    # --- parameters -------------------------------------------------------------------------------

    def start_gather(self) -> None:
        """Begin to gather, where that has not been done."""
        if not self.ready and self._gathering is None:
            self._take_over()
            if not self.ready:
                self._gathering = self._lanes.params.begin(self._gather)

    @torch.no_grad()
    def gather(self) -> None:
        """Have the whole parameters."""
        if self.ready:
            return
        self.start_gather()
        if self._gathering is not None:
            rows = self._lanes.params.finish(self._gathering)
            self._gathering = None
            assert self._memory is not None
            self._memory.untyped_storage().resize_(self._memory.nbytes)
            slots = self._param_wire.unpack(rows).view(
                self.layout.local, self.layout.across, self.layout.numel
            )
            self.layout.unpack(slots, self._wholes)
        self.ready = True

    def free(self) -> None:
        """Give the whole parameters' memory back, where they do not stay for the step."""
        if not self._keeps_whole:
            self._drop()

    def forget(self) -> None:
        """The masters may have changed: nothing that was gathered holds any more."""
        if self._gathering is not None:
            self._lanes.params.finish(self._gathering)
            self._gathering = None
        self._node_copy = None
        self._drop()

    def _drop(self) -> None:
        if self._memory is not None:
            self._memory.untyped_storage().resize_(0)
            self.ready = False

    def _take_over(self) -> None:
        """Once: give modules whole parameters in place of the masters."""
        if self._params[0].whole is not None:
            return
        for param in self._params:
            param.find()
        if self._is_alias:
            for param in self._params:
                param.hand_over(param.local)
            self.ready = True
            return
        sizes = [prod(p.shape) for p in self._params]
        self._memory = torch.empty(sum(sizes), dtype=self._dtypes.compute, device=self._device)
        self._wholes = [
            flat.view(p.shape)
            for flat, p in zip(self._memory.split(sizes), self._params, strict=True)
        ]
        for param, whole in zip(self._params, self._wholes, strict=True):
            # Another version counter: filling the memory anew is no change that autograd must see.
            param.hand_over(whole.data)
        self._memory.untyped_storage().resize_(0)

    @torch.no_grad()
    def _gather(self) -> Steps[Tensor]:
        """Slots of the whole unit as rows of bytes, (L R, W)."""
        groups, rows = self._groups, self._node_copy
        if rows is None:
            rows = yield from groups.across.gather("params", self._own_slice()[0])
            if self._extents.params is Extent.node and groups.across.size > 1:
                self._node_copy = rows
        everything = yield from groups.local.gather("params", rows.view(-1))
        return everything.view(-1, self._param_wire.nbytes)

    def _own_slice(self) -> Tensor:
        """This rank's slice as it travels, (1, W)."""
        wire = self._param_wire
        dtype = self._dtypes.params if wire.is_quantized else self._dtypes.compute
        own = torch.empty(1, self.layout.numel, dtype=dtype, device=self._device)
        self.layout.fill_slice([p.local for p in self._params], own[0])
        return wire.pack(own)

    # --- gradients --------------------------------------------------------------------------------

    @torch.no_grad()
    def take_gradients(self, *, last: bool) -> None:
        """Take up what a backward pass left; `last`: of the step."""
        if not self._params or self._params[0].whole is None:
            return
        waits = self._extents.grads is Extent.none and not last
        if waits and self._dtypes.reduce == self._dtypes.compute and self._summed is None:
            return  # autograd adds the next ones to them
        grads = [p.take_gradient() for p in self._params]
        if all(grad is None for grad in grads) and self._summed is None:
            return
        if self._extents.grads is Extent.none:
            slots = self._packed(grads, onto=self._summed)
            self._summed = slots
            if waits:
                return
            self._summed = None
            self._lanes.grads.uses(slots)
            transfer = self._lanes.grads.begin(lambda: self._reduce(slots, last=True))
        else:
            for grad in grads:
                if grad is not None:
                    self._lanes.grads.uses(grad)
            transfer = self._lanes.grads.begin(lambda: self._reduce_anew(grads, last=last))
        self._reductions = [t for t in (*self._reductions, transfer) if not t.done]

    def settle_gradients(self) -> None:
        """After a step's last backward pass: the masters' gradients are there."""
        for transfer in self._reductions:
            self._lanes.grads.finish(transfer)
        self._reductions = []

    def _packed(self, grads: list[Tensor | None], onto: Tensor | None = None) -> Tensor:
        """Whole gradients as slots (L, R, N), added to those before."""
        layout, new = self.layout, onto is None
        if onto is None:
            onto = torch.empty(
                layout.local,
                layout.across,
                layout.numel,
                dtype=self._dtypes.reduce,
                device=self._device,
            )
        layout.pack(grads, onto, add=not new)
        return onto

    def _reduce_anew(self, grads: list[Tensor | None], *, last: bool) -> Steps[None]:
        slots = self._packed(grads)
        grads.clear()
        yield from self._reduce(slots, last=last)

    @torch.no_grad()
    def _reduce(self, slots: Tensor, *, last: bool) -> Steps[None]:
        """Sum slots over ranks, as far as this microbatch asks for it."""
        groups, extent = self._groups, self._extents.grads
        node_sum = yield from self._sum_hop(groups.local, slots, "local")
        if extent is Extent.node:
            node_sum = self._add_up(node_sum)
            if not last:
                return
            self._summed = None
        own = yield from self._sum_hop(groups.across, node_sum, "across")
        own = own.view(-1)
        if extent is Extent.all:
            own = self._add_up(own)
            if not last:
                return
            self._summed = None
        own = yield from groups.copies.all_reduce("replicas", own)
        parts = self.layout.parts_of(own, groups.slice_index)
        for param, part in zip(self._params, parts, strict=True):
            param.set_gradient(part)

    def _add_up(self, values: Tensor) -> Tensor:
        """Add to the sum over microbatches so far."""
        self._summed = values if self._summed is None else self._summed.add_(values)
        return self._summed

    def _sum_hop(self, hop: Hop, values: Tensor, name: str) -> Steps[Tensor]:
        """Sum over a hop's n ranks of what is for this one: (n, m, N) in any shape -> (m N,)."""
        wire = self._grad_wire
        if hop.size == 1 or not wire.is_quantized:
            summed = yield from hop.reduce_scatter("grads", values.view(hop.size, -1))
            return summed
        rows = values.view(-1, self.layout.numel)
        packed = wire.pack(rows, self._residual(name, rows))
        received = yield from hop.exchange("grads", packed.view(hop.size, -1))
        received = received.view(hop.size, -1, wire.nbytes)
        out = rows.new_empty(received.shape[1], self.layout.numel)
        for index, row in enumerate(out):
            wire.unpack_sum(received[:, index], row)
        return out.view(-1)

    def _residual(self, name: str, rows: Tensor) -> Tensor | None:
        if not self._error_feedback:
            return None
        if name not in self.residuals:
            self.residuals[name] = rows.new_zeros(rows.shape[0], self._grad_wire.residual_numel)
        return self.residuals[name]


def _shard(modules: Sequence[nn.Module], groups: Groups, taken: set[int]) -> list[UnitParameter]:
    """Cut the parameters of modules that are not `taken` yet, each once."""
    found: dict[int, UnitParameter] = {}
    replaced: dict[int, nn.Parameter] = {}
    for top in modules:
        for module in top.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in taken:
                    continue
                if id(parameter) not in found:
                    replaced[id(parameter)], found[id(parameter)] = shard_parameter(
                        parameter, groups.spec, groups.slice_index
                    )
                found[id(parameter)].places.append((module, name))
    for key, param in found.items():
        for module, name in param.places:
            module.register_parameter(name, replaced[key])
            taken.add(id(replaced[key]))
    return list(found.values())


def _block(config: ZeroConfig) -> int:
    quantized = {config.quantize_weights, config.quantize_gradients} != {Quantization.none}
    return config.block_size if quantized else 1


def _format(kind: Quantization, config: ZeroConfig) -> BlockFormat | None:
    return None if kind is Quantization.none else BlockFormat(kind=kind, block=config.block_size)
