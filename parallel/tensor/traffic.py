"""What tensor and sequence parallelism send, counted where DTensor hands it to torch.

DTensor moves values through three functions of `_functional_collectives`: an all-gather, a
reduce-scatter and an all-reduce. While a `TensorTraffic` is entered they are wrapped and count what
goes through them as "tensor".

What is not seen: compiled code, into which torch.compile has built the collectives themselves.
Where blocks are compiled the count would be of the rest alone, so it is NaN, not a number too
small.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh

from phalanx.parallel.comm_meter import CommMeter

KIND = "tensor"
# torch 2.13 renamed two of them; the old names call the new ones.
_GATHERS = ("all_gather_single", "all_gather_tensor")
_SCATTERS = ("reduce_scatter_single", "reduce_scatter_tensor")
_REDUCES = ("all_reduce",)


class TensorTraffic:
    """Counts into a meter while entered; puts torch's own functions back at exit."""

    def __init__(self, meter: CommMeter, *, tensor_parallel: bool, compiled: bool) -> None:
        """`tensor_parallel`: whether there is anything to count; `compiled`: whether blocks are."""
        self._meter = meter
        self._counts = tensor_parallel and not compiled
        if tensor_parallel and compiled:
            meter.cannot_see(KIND)
        self._depth = 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "TensorTraffic":
        if self._undo:
            raise RuntimeError("TensorTraffic is entered already; one context at a time")
        if self._counts:
            for names, count in (
                (_GATHERS, self._gathered),
                (_SCATTERS, self._scattered),
                (_REDUCES, self._reduced),
            ):
                for name in names:
                    if hasattr(functional, name):
                        self._wrap(name, count)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _wrap(self, name: str, count: Callable[[Tensor, Sequence[int]], None]) -> None:
        original = getattr(functional, name)
        setattr(functional, name, self._counted(original, count))
        self._undo.append(lambda: setattr(functional, name, original))

    def _counted(
        self, original: Callable[..., Any], count: Callable[[Tensor, Sequence[int]], None]
    ) -> Callable[..., Any]:
        place = list(inspect.signature(original).parameters).index("group") - 1

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return original(tensor, *args, **kwargs)
            count(tensor, _ranks_of(kwargs["group"] if "group" in kwargs else args[place]))
            self._depth += 1  # an old name calls the new one
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._depth -= 1

        return call

    def _gathered(self, part: Tensor, ranks: Sequence[int]) -> None:
        self._meter.exchanged(KIND, ranks, part.nbytes)

    def _scattered(self, whole: Tensor, ranks: Sequence[int]) -> None:
        self._meter.exchanged(KIND, ranks, whole.nbytes // len(ranks))

    def _reduced(self, values: Tensor, ranks: Sequence[int]) -> None:
        self._meter.all_reduced(KIND, ranks, values.nbytes)


def _ranks_of(group: Any) -> Sequence[int]:
    """World ranks of a group, in the forms in which DTensor names one."""
    if isinstance(group, tuple):
        mesh, dim = group
        group = mesh.get_group(dim)
    elif isinstance(group, DeviceMesh):
        group = group.get_group()
    ranks: Sequence[int] = dist.get_process_group_ranks(group)
    return ranks
