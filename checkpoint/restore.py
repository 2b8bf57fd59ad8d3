"""Whether the tensors that are to be filled fit what a checkpoint holds."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phalanx.checkpoint.chunks import Chunk, chunk_of
from phalanx.checkpoint.planner import stored_tensors

SHOWN = 5
"""Names that a message lists."""


def check_fit(
    folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Chunk], str | None, list[str]]:
    """Compare what is wanted with what is stored.

    Returns:
        The chunks to read, why they cannot be read (None when they can), and the names whose values
        may be rounded to a narrower floating-point type.
    """
    try:
        stored = stored_tensors(folder)
        chunks = {name: chunk_of(name, tensor) for name, tensor in tensors.items()}
    except Exception as error:  # told to the other ranks, which would wait for this one
        return {}, f"{type(error).__name__}: {error}", []
    problem = _missing(stored, tensors) or _mismatched(stored, tensors)
    if problem is not None:
        return {}, problem, []
    rounded = [
        name
        for name, tensor in tensors.items()
        if torch.promote_types(stored[name].properties.dtype, tensor.dtype) != tensor.dtype
    ]
    return {name: chunk for name, chunk in chunks.items() if chunk is not None}, None, rounded


def _missing(
    stored: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]
) -> str | None:
    missing = [name for name in tensors if name not in stored]
    if not missing:
        return None
    shown = ", ".join(f"{name} {list(tensors[name].shape)}" for name in missing[:SHOWN])
    return (
        f"it lacks {len(missing)} of {len(tensors)} tensors: {shown}"
        f"{', ...' if len(missing) > SHOWN else ''}; it was saved from another model or state"
    )


def _mismatched(
    stored: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]
) -> str | None:
    shapes = [name for name in tensors if stored[name].size != tensors[name].shape]
    if shapes:
        shown = ", ".join(
            f"{name} is {list(stored[name].size)} there and {list(tensors[name].shape)} here"
            for name in shapes[:SHOWN]
        )
        return f"{len(shapes)} shapes differ: {shown}{', ...' if len(shapes) > SHOWN else ''}"
    for name, tensor in tensors.items():
        dtype = stored[name].properties.dtype
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            return f"{name} is {dtype} there and {tensor.dtype} here"
    return None
