"""The boxes of the tensors that a run saves, found once: every snapshot asks for the same ones."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.checkpoint.chunks import Chunk, chunk_of


class Boxes:
    """Chunks of tensors by name; where they lie is remembered as long as their form stays."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, torch.Size]] = {}
        """Form and offsets; no tensor, which would live on here."""

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
        """This rank's part of every tensor, of those that it holds something of.

        Raises:
            ValueError: a tensor's placements are not understood.
        """
        chunks: dict[str, Chunk] = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            cut = (tuple(tensor.placements), tensor.shape) if isinstance(tensor, DTensor) else ()
            form = (cut, local.shape, local.dtype)
            known = self._known.get(name)
            if known is not None and known[0] == form:
                chunks[name] = Chunk(local=local.detach(), size=tensor.size(), offsets=known[1])
                continue
            found = chunk_of(name, tensor)
            if found is not None:
                self._known[name] = (form, found.offsets)
                chunks[name] = found
        return chunks
