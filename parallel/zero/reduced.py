"""The gradients' side of a unit: taken up after each backward pass, summed over ranks.

Whole gradients become slots, which are summed inside a node first, then between nodes, then over
copies (see `layout`). How far the sum of one microbatch goes depends on the extent of gradients:
what it does not reach is added up over microbatches, and goes on at the last one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.parallel.zero.collectives import Hop, Steps, Transfer
from phalanx.parallel.zero.parameter import UnitParameter
from phalanx.parallel.zero.partition import Extent
from phalanx.parallel.zero.settings import Settings
from phalanx.parallel.zero.wire import Wire


class Reduced:
    """Gradients of one unit, on their way from whole ones to the masters'."""

    def __init__(self, params: Sequence[UnitParameter], wire: Wire, settings: Settings) -> None:
        self._params, self._wire, self._groups = params, wire, settings.groups
        self._dtypes, self._device = settings.dtypes, settings.device
        self._lane, self._extent = settings.grad_lane, settings.config.extents.grads
        self._learns = any(param.sharded.requires_grad for param in params)
        self._error_feedback = settings.config.error_feedback and wire.is_quantized
        self._residuals: dict[str, Tensor] = {}
        self._summed: Tensor | None = None
        """Over microbatches, as far as the extent lets each be reduced."""
        self._transfers: list[Transfer[None]] = []

    @property
    def cut(self) -> tuple[int, int]:
        """Nodes, and ranks of each, that slices are cut over."""
        return self._wire.layout.across, self._wire.layout.local

    def residuals(self) -> dict[str, Tensor]:
        """What rounding took from gradients so far, by hop, (rows, matrices) in the reduction's
        format; empty without zero.error_feedback."""
        groups = self._groups
        if self._error_feedback and not self._residuals:
            for name, hop, rows in (
                ("local", groups.local, groups.num_slices),
                ("across", groups.across, groups.across.size),
            ):
                if hop.size > 1:
                    self._residuals[name] = torch.zeros(
                        rows,
                        self._wire.quantized_numel,
                        dtype=self._dtypes.reduce,
                        device=self._device,
                    )
        return self._residuals

    @torch.no_grad()
    def take(self, *, last: bool) -> None:
        """Take up what a backward pass left; `last`: of the step.

        A rank whose part of the batch left nothing joins with zeros, as others may have something.
        """
        if self._params[0].whole is None or not self._learns:
            return
        at_once = self._extent is not Extent.none
        same_format = self._dtypes.reduce == self._dtypes.compute
        if not (at_once or last or self._summed is not None) and same_format:
            return  # autograd adds the next ones to them
        grads = [param.take_gradient() for param in self._params]
        if at_once:
            self._begin(grads, last=last)
            return
        self._summed = self._pack(grads, onto=self._summed)
        if last:
            slots, self._summed = self._summed, None
            self._lane.uses(slots)
            self._transfers.append(self._lane.begin(lambda: self._reduce(slots, last=True)))

    def settle(self) -> None:
        """After a step's last backward pass: have the masters' gradients."""
        for transfer in self._transfers:
            self._lane.finish(transfer)
        self._transfers.clear()

    def _begin(self, grads: list[Tensor | None], *, last: bool) -> None:
        for grad in grads:
            if grad is not None:
                self._lane.uses(grad)

        def steps() -> Steps[None]:
            slots = self._pack(grads)
            grads.clear()
            yield from self._reduce(slots, last=last)

        under_way = [transfer for transfer in self._transfers if not transfer.done]
        self._transfers = [*under_way, self._lane.begin(steps)]

    def _pack(self, grads: list[Tensor | None], onto: Tensor | None = None) -> Tensor:
        """Whole gradients as slots (L, R, N), added to those before."""
        layout, is_first = self._wire.layout, onto is None
        if onto is None:
            shape = layout.local, layout.across, layout.numel
            onto = torch.empty(shape, dtype=self._dtypes.reduce, device=self._device)
        layout.pack(grads, onto, add=not is_first)
        return onto

    @torch.no_grad()
    def _reduce(self, slots: Tensor, *, last: bool) -> Steps[None]:
        """Sum slots over ranks, as far as this microbatch asks for it."""
        groups = self._groups
        values = yield from self._sum_hop(groups.local, slots, "local")
        if self._extent is Extent.node:
            values = self._add_up(values, last=last)
            if not last:
                return
        values = yield from self._sum_hop(groups.across, values, "across")
        if self._extent is Extent.all:
            values = self._add_up(values, last=last)
            if not last:
                return
        own = yield from groups.copies.all_reduce("replicas", values)
        parts = self._wire.layout.parts_of(own, groups.slice_index)
        for param, part in zip(self._params, parts, strict=True):
            if param.sharded.requires_grad:
                param.set_gradient(part)

    def _add_up(self, values: Tensor, *, last: bool) -> Tensor:
        """Add to the sum over microbatches so far, in the masters' format; the `last` one goes on
        in the reduction's."""
        before = self._summed
        if last:
            self._summed = None
            return values if before is None else before.add_(values).to(values.dtype)
        self._summed = values.to(self._dtypes.params) if before is None else before.add_(values)
        return self._summed

    def _sum_hop(self, hop: Hop, values: Tensor, name: str) -> Steps[Tensor]:
        """Sum over a hop's n ranks of what is for this one: (n, m, N) in any shape -> (m N,)."""
        wire = self._wire
        if hop.size == 1 or not wire.is_quantized:
            summed = yield from hop.reduce_scatter("grads", values.view(hop.size, -1))
            return summed
        rows = values.view(-1, wire.layout.numel)
        packed = wire.pack(rows, self.residuals().get(name))
        received = yield from hop.exchange("grads", packed.view(hop.size, -1))
        received = received.view(hop.size, -1, wire.nbytes)
        out = rows.new_empty(received.shape[1], wire.layout.numel)
        for index, row in enumerate(out):
            wire.unpack_sum(received[:, index], row)
        return out.view(-1)
