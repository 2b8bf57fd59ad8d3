"""Where a rank's part of a tensor lies in the whole, whatever the layout.

Everything that is saved or loaded goes through a `Chunk`: a local tensor, and the box of the global
tensor that it is. DTensor's own offsets are not used: for a dimension that tensor parallelism cuts
first and FSDP second (`_StridedShard`) they differ from the memory's real layout when the sizes are
uneven, so the cuts are made here in the order in which they were really made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from phalanx.checkpoint.boxes import Box, TensorInfo
from phalanx.checkpoint.torch_types import name_of
from phalanx.parallel.local import local


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a global tensor."""

    local: Tensor
    """The box's values; shares memory with the tensor that it was made from."""
    size: torch.Size
    """Shape of the whole tensor."""
    offsets: torch.Size
    """Where the box begins in the whole."""

    @property
    def box(self) -> Box:
        """What of the whole it is."""
        return Box(tuple(self.offsets), tuple(self.local.shape))

    @property
    def info(self) -> TensorInfo:
        """The whole tensor.

        Raises:
            ValueError: checkpoints hold no tensors of its type.
        """
        return TensorInfo(dtype=name_of(self.local.dtype), shape=tuple(self.size))


def chunk_of(name: str, tensor: Tensor) -> Chunk | None:
    """The box that this rank holds of `tensor`; None where it holds nothing of it.

    Raises:
        ValueError: the tensor's placements are not understood.
    """
    if not isinstance(tensor, DTensor):
        return plain_chunk(tensor)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    mesh_sizes = tuple(tensor.device_mesh.shape)
    part = local(tensor).detach()
    sizes, offsets = sizes_and_offsets(
        name, tuple(tensor.shape), tensor.placements, mesh_sizes=mesh_sizes, coordinate=coordinate
    )
    if prod(sizes) == 0 and part.numel() == 0 and tensor.numel() > 0:
        return None
    if sizes != tuple(part.shape):
        raise ValueError(
            f"{name}: this rank holds a shard of shape {tuple(part.shape)}, but placements "
            f"{tensor.placements} of {tuple(tensor.shape)} on mesh {mesh_sizes} give {sizes}"
        )
    return Chunk(local=part, size=tensor.size(), offsets=torch.Size(offsets))


class Chunks:
    """Chunks of the tensors that a run saves, by name; where they lie is remembered as long as
    their form stays: every snapshot asks for the same ones."""

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
            part = local(tensor)
            cut = (tuple(tensor.placements), tensor.shape) if isinstance(tensor, DTensor) else ()
            form = (cut, part.shape, part.dtype)
            known = self._known.get(name)
            if known is not None and known[0] == form:
                chunks[name] = Chunk(local=part.detach(), size=tensor.size(), offsets=known[1])
                continue
            found = chunk_of(name, tensor)
            if found is not None:
                self._known[name] = (form, found.offsets)
                chunks[name] = found
        return chunks


def plain_chunk(tensor: Tensor) -> Chunk:
    """A whole tensor as one box."""
    whole = tensor.detach()
    return Chunk(local=whole, size=whole.size(), offsets=torch.Size([0] * whole.ndim))


def sizes_and_offsets(
    name: str,
    shape: Sequence[int],
    placements: Sequence[Placement],
    *,
    mesh_sizes: Sequence[int],
    coordinate: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and offsets of the part that the rank at `coordinate` holds.

    Each cut is torch.chunk's: equal parts rounded up, so that the last ones may be short or empty.

    Raises:
        ValueError: a placement is neither Replicate, Shard nor FSDP's shard over others' shards.
    """
    sizes, offsets = list(shape), [0] * len(shape)
    for axis in cutting_order(name, placements, mesh_sizes=mesh_sizes):
        dim = placements[axis].dim  # type: ignore[attr-defined]
        part = ceil(sizes[dim] / mesh_sizes[axis])
        start = min(part * coordinate[axis], sizes[dim])
        sizes[dim] = min(part, sizes[dim] - start)
        offsets[dim] += start
    return tuple(sizes), tuple(offsets)


def cutting_order(
    name: str, placements: Sequence[Placement], *, mesh_sizes: Sequence[int]
) -> list[int]:
    """Mesh axes that cut the tensor, in the order of the cuts.

    Raises:
        ValueError: a placement is not understood.
    """
    plain: list[int] = []
    strided: list[int] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):
            inner = prod(
                mesh_sizes[later]
                for later in range(axis + 1, len(placements))
                if getattr(placements[later], "dim", None) == placement.dim
            )
            if placement.split_factor != inner:
                raise ValueError(
                    f"{name}: placements {tuple(placements)} on mesh {tuple(mesh_sizes)}: a "
                    f"strided shard over {inner} inner shards must have split_factor={inner}"
                )
            strided.insert(0, axis)
        elif isinstance(placement, Shard):
            plain.append(axis)
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"{name}: placement {placement!r} cannot be saved or loaded; only Replicate, Shard "
                "and FSDP's strided shard can"
            )
    return plain + strided
