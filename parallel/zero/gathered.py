"""The parameters' side of a unit: gathered before use, freed after.

This rank's slice goes in its wire form to the ranks at the same place of other nodes, then what has
come together to those of the node, and is read out into whole parameters at the end: every rank
computes with the same values, rounded or not.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from phalanx.parallel.zero.collectives import Steps, Transfer
from phalanx.parallel.zero.parameter import UnitParameter
from phalanx.parallel.zero.partition import Extent
from phalanx.parallel.zero.settings import Settings
from phalanx.parallel.zero.wire import Wire


class Gathered:
    """Whole parameters of one unit, whose memory comes and goes."""

    def __init__(self, params: Sequence[UnitParameter], wire: Wire, settings: Settings) -> None:
        self.ready = False
        """Whether the whole parameters are there."""
        self._params, self._wire, self._groups = params, wire, settings.groups
        self._dtypes, self._device = settings.dtypes, settings.device
        self._lane = settings.param_lane
        groups, extent = settings.groups, settings.config.extents.params
        self._keeps_node_copy = extent is Extent.node and groups.across.size > 1
        self._keeps_whole = extent is Extent.none or groups.num_slices == 1
        self._memory: Tensor | None = None
        self._wholes: list[Tensor] = []
        self._node_copy: Tensor | None = None
        self._transfer: Transfer[None] | None = None

    def start(self) -> None:
        """Begin to gather, where that has not been done."""
        if self.ready or self._transfer is not None:
            return
        self._take_over()
        if not self.ready:
            self._transfer = self._lane.begin(self._gather)

    @torch.no_grad()
    def finish(self) -> None:
        """Have the whole parameters."""
        self.start()
        if self.ready:
            return
        assert self._transfer is not None
        self._lane.finish(self._transfer)
        self._transfer = None
        self.ready = True

    def free(self) -> None:
        """Give the whole parameters' memory back, where they do not stay for the step."""
        if not self._keeps_whole:
            self._drop()

    def forget(self) -> None:
        """The masters may have changed: nothing that was gathered holds any more."""
        self._drop()
        self._node_copy = None

    def _drop(self) -> None:
        if self._transfer is not None:  # begun ahead and not used: it would fill what is freed
            self._lane.finish(self._transfer)
            self._transfer = None
        if self._memory is not None:
            self._memory.untyped_storage().resize_(0)
            self.ready = False

    def _take_over(self) -> None:
        """Once: give modules whole parameters in place of the masters."""
        if self._params[0].whole is not None:
            return
        for param in self._params:
            param.find()
        if self._is_alias():
            for param in self._params:
                param.hand_over(param.local)
            self.ready = True
            return
        sizes = [prod(param.shape) for param in self._params]
        with self._lane.beside:  # where it will come from again
            self._memory = torch.empty(sum(sizes), dtype=self._dtypes.compute, device=self._device)
        for flat, param in zip(self._memory.split(sizes), self._params, strict=True):
            self._wholes.append(flat.view(param.shape))
            # Another version counter: filling the memory anew is no change that autograd must see.
            param.hand_over(self._wholes[-1].data)
        self._memory.untyped_storage().resize_(0)

    def _is_alias(self) -> bool:
        """Whether the masters are whole, and in the format that modules compute with."""
        same_format = self._dtypes.params == self._dtypes.compute
        on_device = self._params[0].local.device == self._device
        return self._groups.num_slices == 1 and same_format and on_device

    @torch.no_grad()
    def _gather(self) -> Steps[None]:
        """Fill the whole parameters, beside the computing up to the last copy."""
        rows = self._node_copy
        if rows is None:
            rows = yield from self._groups.across.gather("params", self._own_slice()[0])
            if self._keeps_node_copy:
                self._node_copy = rows
        everything = yield from self._groups.local.gather("params", rows.view(-1))
        assert self._memory is not None
        # Freed memory comes back to the lane's stream, which waits for the computing whenever a
        # transfer begins: it is not filled while it is still read.
        self._memory.untyped_storage().resize_(self._memory.nbytes)
        slots = self._wire.unpack(everything.view(-1, self._wire.nbytes))
        self._wire.layout.unpack(slots, self._wholes)

    def _own_slice(self) -> Tensor:
        """This rank's slice as it travels, (1, W)."""
        dtype = self._dtypes.params if self._wire.is_quantized else self._dtypes.compute
        own = torch.empty(1, self._wire.layout.numel, dtype=dtype, device=self._device)
        self._wire.layout.fill_slice([param.local for param in self._params], own[0])
        return self._wire.pack(own)
