"""Copying a rank's boxes to their place in host memory, beside the computation.

Parameters and optimizer states do not change from one optimizer step to the next, so the copy runs
during the next forward and backward (DataStates-LLM, section 4): on a thread that holds no lock on
a CPU, on a stream of its own from a GPU into pinned memory.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BUCKET_BYTES = 16 << 20
"""Bytes copied between two reports of progress."""


class Copier:
    """Copies tensors one behind the other into a run of bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: dict[int, Tensor] = {}
        """By address."""

    def enter(self) -> None:
        """Use the rank's GPU in this thread: a new thread would begin with the machine's first."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def _pin(self, memory: memoryview) -> None:
        """Let the GPU copy to `memory` by itself, from its first use on: it takes all its pages,
        which the memory of an earlier start may hold until then."""
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        if whole.data_ptr() in self._pinned:
            return
        code = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)
        if int(code) != 0:
            raise RuntimeError(f"cudaHostRegister of {whole.numel()} bytes failed: {code}")
        self._pinned[whole.data_ptr()] = whole

    def unpin(self) -> None:
        """Let go of all memory that was copied to."""
        if self._stream is not None:
            self._stream.synchronize()  # a copy that failed half-way may still write
        for whole in self._pinned.values():
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
        self._pinned.clear()

    def mark(self) -> "torch.cuda.Event | None":
        """The moment, on this thread's stream, from which sources may be read."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(
        self,
        sources: Sequence[Tensor],
        memory: memoryview,
        *,
        ready: "torch.cuda.Event | None",
        on_issued: "Callable[[torch.cuda.Event | None], None]",
        on_bytes: Callable[[int], None],
    ) -> None:
        """Fill `memory` with the sources' bytes, in order.

        Args:
            on_issued: called once nothing is left to wait for but the given event (CUDA), or
                nothing at all: from then on a stream that waits for it may change the sources.
            on_bytes: called with the bytes that are in place so far, bucket by bucket.
        """
        if self._stream is None:
            for done in _copy_host(sources, memory):
                on_bytes(done)
            on_issued(None)
            return
        assert ready is not None
        if len(memory):
            self._pin(memory)
        events: list[tuple[int, torch.cuda.Event]] = []
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for done in _issue(sources, memory):
                event = torch.cuda.Event(blocking=True)  # whoever waits leaves the core to others
                event.record(self._stream)
                events.append((done, event))
            last = torch.cuda.Event()
            last.record(self._stream)
        on_issued(last)
        for done, event in events:
            event.synchronize()
            on_bytes(done)


def _copy_host(sources: Sequence[Tensor], memory: memoryview) -> Iterator[int]:
    """Copy, and say after each bucket how many bytes stand."""
    if not len(memory):
        return
    target = torch.frombuffer(memory, dtype=torch.uint8)
    address, done, told = target.data_ptr(), 0, 0
    for source in sources:
        size = source.numel() * source.element_size()
        if source.is_cpu and source.is_contiguous():
            begin, place = source.data_ptr(), address + done
            for start in range(0, size, BUCKET_BYTES):
                part = min(BUCKET_BYTES, size - start)
                # Not Tensor.copy_: its threads would compete with the computation's.
                ctypes.memmove(place + start, begin + start, part)
                if done + start + part - told >= BUCKET_BYTES:
                    told = done + start + part
                    yield told
        else:
            _place(target, done, source).copy_(source)
        done += size
    if done > told:
        yield done


def _issue(sources: Sequence[Tensor], memory: memoryview) -> Iterator[int]:
    """Start copies on the current stream, and say after each bucket how far they will reach."""
    if not len(memory):
        return
    target = torch.frombuffer(memory, dtype=torch.uint8)
    done, told = 0, 0
    for source in sources:
        _place(target, done, source).copy_(source, non_blocking=True)
        done += source.numel() * source.element_size()
        if done - told >= BUCKET_BYTES:
            told = done
            yield told
    if done > told:
        yield done


def _place(target: Tensor, begin: int, source: Tensor) -> Tensor:
    """The bytes from `begin` on as a tensor like `source`."""
    size = source.numel() * source.element_size()
    return target[begin : begin + size].view(source.dtype).view(source.shape)
