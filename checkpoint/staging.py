"""Copies of a rank's tensors in host memory, so that training may go on while they are written."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from phalanx.checkpoint.chunks import Chunk, chunk_of


class Stager:
    """Copies tensors to host buffers that are kept from save to save.

    The first save allocates them; while names, shapes and types stay, later ones allocate nothing.
    CUDA tensors go through pinned buffers on a side stream.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
        """Copy this rank's part of every tensor; the copies stand when this returns.

        Raises:
            ValueError: a tensor's placements are not understood.
        """
        chunks: dict[str, Chunk] = {}
        waiting: set[torch.device] = set()
        for name, tensor in tensors.items():
            chunk = chunk_of(name, tensor)
            if chunk is None:
                continue
            buffer = self._buffer(name, chunk.local)
            if chunk.local.is_cuda:
                self._copy_from_cuda(buffer, chunk.local, first=chunk.local.device not in waiting)
                waiting.add(chunk.local.device)
            else:
                buffer.copy_(chunk.local)
            chunks[name] = replace(chunk, local=buffer)
        for device in waiting:
            self._streams[device].synchronize()
        for name in self._buffers.keys() - chunks.keys():
            del self._buffers[name]
        return chunks

    def _buffer(self, name: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        return buffer

    def _copy_from_cuda(self, buffer: Tensor, source: Tensor, *, first: bool) -> None:
        device = source.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        if first:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            buffer.copy_(source, non_blocking=True)
