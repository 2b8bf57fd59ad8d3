"""Parameters that are gathered, freed and reduced together: a transformer block, say.

A unit's master slices are DTensors that optimizer, checkpoints and norms see; its modules compute
with whole parameters, whose memory is there from a gather to the next free.
"""

from collections.abc import Sequence

import torch
from torch import nn

from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.gathered import Gathered
from phalanx.parallel.zero.groups import Groups
from phalanx.parallel.zero.layout import SliceLayout
from phalanx.parallel.zero.parameter import UnitParameter, shard_parameter
from phalanx.parallel.zero.reduced import Reduced
from phalanx.parallel.zero.settings import Settings
from phalanx.parallel.zero.slices import block_format
from phalanx.parallel.zero.wire import Wire


class Unit:
    """The parameters of some modules."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        params: Sequence[UnitParameter],
        settings: Settings,
        *,
        keep_gathered: bool = False,
        unused_in_backward: bool = False,
    ) -> None:
        self.modules = modules
        self.params = params
        self.keep_gathered = keep_gathered
        self.unused_in_backward = unused_in_backward
        config, dtypes = settings.config, settings.dtypes
        weights = _wire(params, settings, dtypes.compute, config.quantize_weights)
        self.gathered = Gathered(params, weights, settings)
        grads = _wire(params, settings, dtypes.reduce, config.quantize_gradients)
        self.reduced = Reduced(params, grads, settings)


def cut_parameters(
    modules: Sequence[nn.Module], groups: Groups, taken: set[int]
) -> list[UnitParameter]:
    """Cut the parameters of modules, each once and in place.

    Those whose ids are in `taken` belong to other units; the new ones are added to it.
    """
    found: dict[int, UnitParameter] = {}
    for module in dict.fromkeys(inner for top in modules for inner in top.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in taken:
                continue
            if id(parameter) not in found:
                found[id(parameter)] = shard_parameter(parameter, groups.spec, groups.slice_index)
            found[id(parameter)].places.append((module, name))
    for param in found.values():
        taken.add(id(param.sharded))
        for module, name in param.places:
            module.register_parameter(name, param.sharded)
    return list(found.values())


def _wire(
    params: Sequence[UnitParameter], settings: Settings, dtype: torch.dtype, kind: Quantization
) -> Wire:
    fmt = block_format(kind, settings.config, settings.groups.num_slices)
    groups = settings.groups
    layout = SliceLayout(
        [param.shape for param in params],
        across=groups.across.size,
        local=groups.local.size,
        block=1 if fmt is None else fmt.block,
    )
    return Wire(layout, dtype, fmt)
