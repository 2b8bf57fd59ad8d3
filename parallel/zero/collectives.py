"""Messages between the ranks that divide a model, as hops over one group each.

Everything that ZeRO sends is made of two kinds of hops: between nodes (the ranks at the same place
of their node) and inside a node. A hop starts at once and hands back what to wait for. Sums do not
depend on timing: those taken here follow the ranks' order, others the backend's.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.parallel.comm_meter import CommMeter

# torch 2.13's names, or those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")
Steps = Generator[dist.Work, None, T]
"""A transfer of several hops: yields what to wait for before it can go on, returns its result."""


class Hop:
    """One group of ranks, and what its ranks send each other; a group of one sends nothing."""

    def __init__(self, group: dist.ProcessGroup | None, meter: CommMeter) -> None:
        self._group = group
        self._meter = meter
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._ranks = [] if group is None else dist.get_process_group_ranks(group)

    def gather(self, kind: str, part: Tensor) -> Steps[Tensor]:
        """Every rank's part: (W,) bytes -> (n, W), in the ranks' order."""
        if self.size == 1:
            return part.unsqueeze(0)
        out = part.new_empty(self.size, part.numel())
        self._meter.exchanged(kind, self._ranks, part.nbytes)
        yield from self._run(_all_gather, out.view(-1), part)
        return out

    def exchange(self, kind: str, parts: Tensor) -> Steps[Tensor]:
        """Send part i to rank i: (n, W) bytes -> (n, W), in the senders' order."""
        if self.size == 1:
            return parts
        out = torch.empty_like(parts)
        self._meter.exchanged(kind, self._ranks, parts[0].nbytes)
        yield from self._run(dist.all_to_all_single, out.view(-1), parts.view(-1))
        return out

    def reduce_scatter(self, kind: str, parts: Tensor) -> Steps[Tensor]:
        """Sum over ranks of everyone's part for this rank: (n, N) floating point -> (N,).

        gloo knows no reduce-scatter but an all-reduce of everything, twice the bytes: there parts
        are exchanged and added up here.
        """
        if self.size == 1:
            return parts[0]
        if parts.is_cuda:
            out = parts.new_empty(parts.shape[1])
            self._meter.exchanged(kind, self._ranks, out.nbytes)
            yield from self._run(_reduce_scatter, out, parts.view(-1))
            return out
        received = yield from self.exchange(kind, parts.view(torch.uint8))
        return received.view(parts.dtype).sum(0)

    def all_reduce(self, kind: str, values: Tensor) -> Steps[Tensor]:
        """Sum over ranks, in place."""
        if self.size > 1:
            self._meter.all_reduced(kind, self._ranks, values.nbytes)
            yield from self._run(dist.all_reduce, values)
        return values

    def _run(self, collective: Callable[..., dist.Work | None], *tensors: Tensor) -> Steps[None]:
        """Start a collective. On CUDA it is in line on the current stream, not on one of NCCL's,
        which the hops of both lanes would share."""
        work = collective(*tensors, group=self._group, async_op=not tensors[0].is_cuda)
        if work is not None:
            yield work


class Transfer(Generic[T]):
    """A transfer on its way; see `Lane`."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._work: dist.Work | None = None
        self.done = False
        self.event: torch.cuda.Event | None = None
        self._resume(lambda: next(steps))

    def advance(self) -> None:
        """Wait for the hop under way, and start the next one."""
        assert self._work is not None
        self._work.wait()
        self._resume(lambda: next(self._steps))

    def _resume(self, go: Callable[[], dist.Work]) -> None:
        try:
            self._work = go()
        except StopIteration as stop:
            self.result: T = stop.value
            self.done, self._work = True, None


class Lane:
    """Transfers of one direction, beside the computing.

    On CPU, a transfer takes one more hop each time that another begins, and the rest when it is
    asked for: never when a message happens to have come, so that all ranks keep to one order. On
    CUDA all its hops go to a stream of their own at once.
    """

    def __init__(self, device: torch.device) -> None:
        # Before the computing's kernels: copies at a transfer's ends are short, and waited for.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._open: list[Transfer[Any]] = []
        self._to_read: list[Tensor] = []
        self._reading: tuple[torch.cuda.Event, list[Tensor]] | None = None

    @property
    def beside(self) -> AbstractContextManager[object]:
        """Where its work is enqueued."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def begin(self, make: Callable[[], Steps[T]]) -> Transfer[T]:
        """Start a transfer; what `make` reads may not change before it is done."""
        for transfer in self._open:
            transfer.advance()
        if self._stream is not None:
            if self._reading is not None:
                torch.cuda.current_stream().wait_event(self._reading[0])
                self._reading = None
            # Also lets memory go round: what the computing has done with, this stream may reuse.
            self._stream.wait_stream(torch.cuda.current_stream())
        with self.beside:
            begun = Transfer(make())
            if self._stream is not None:
                while not begun.done:
                    begun.advance()
                begun.event = self._stream.record_event()
                if self._to_read:
                    self._reading, self._to_read = (begun.event, self._to_read), []
        self._open = [transfer for transfer in (*self._open, begun) if not transfer.done]
        return begun

    def finish(self, transfer: Transfer[T]) -> T:
        """The result of a transfer, ready for the current stream; those before it go on first."""
        while not transfer.done:
            for other in self._open:
                other.advance()
            self._open = [other for other in self._open if not other.done]
        if transfer.event is not None:
            torch.cuda.current_stream().wait_event(transfer.event)
            if self._reading is not None and self._reading[0] is transfer.event:
                self._reading = None
        return transfer.result

    def uses(self, tensor: Tensor) -> None:
        """Keep a tensor of the computing's memory for the transfer that begins next.

        The transfer after it waits for that, as FSDP2's do. Tensor.record_stream would give memory
        back when a host that runs ahead has long asked for more.
        """
        if self._stream is not None:
            self._to_read.append(tensor)
