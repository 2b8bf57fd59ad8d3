"""Whether the tensors that are to be filled fit what is stored."""

from collections.abc import Mapping

import torch
from torch import Tensor

from phalanx.checkpoint.boxes import TensorInfo
from phalanx.checkpoint.chunks import Chunk, chunk_of
from phalanx.checkpoint.load.reads import stored_tensors
from phalanx.checkpoint.load.sources import Source
from phalanx.checkpoint.torch_types import TORCH_TYPES, convertible

SHOWN = 5
"""Names that a message lists."""

Form = tuple[torch.Size, torch.dtype]
"""Shape and type of a whole tensor that is to be filled."""


def check_fit(
    source: Source, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Chunk], str | None, list[str]]:
    """Compare what is wanted with what is stored.

    Returns:
        The chunks to load, why they cannot be loaded (None when they can), and the names whose
        values may be rounded to a narrower floating-point type.
    """
    try:
        stored = stored_tensors(source.parts())
        chunks = {name: chunk_of(name, tensor) for name, tensor in tensors.items()}
    except Exception as error:  # told to the other ranks, which would wait for this one
        return {}, f"{type(error).__name__}: {error}", []
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    problem = misfit(stored, wanted)
    if problem is not None:
        return {}, problem, []
    rounded = [
        name
        for name, tensor in tensors.items()
        if not _holds(tensor.dtype, TORCH_TYPES[stored[name].dtype])
    ]
    return {name: chunk for name, chunk in chunks.items() if chunk is not None}, None, rounded


def misfit(stored: Mapping[str, TensorInfo], wanted: Mapping[str, Form]) -> str | None:
    """Why tensors, by name, cannot be filled from what is stored; None when they can."""
    return _missing(stored, wanted) or _mismatched(stored, wanted)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one type is one of the other."""
    if wide == narrow:
        return True
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.smallest_normal <= b.smallest_normal


def _missing(stored: Mapping[str, TensorInfo], wanted: Mapping[str, Form]) -> str | None:
    missing = [name for name in wanted if name not in stored]
    if not missing:
        return None
    shown = ", ".join(f"{name} {list(wanted[name][0])}" for name in missing[:SHOWN])
    return (
        f"it lacks {len(missing)} of {len(wanted)} tensors: {shown}"
        f"{', ...' if len(missing) > SHOWN else ''}; it was saved from another model or state"
    )


def _mismatched(stored: Mapping[str, TensorInfo], wanted: Mapping[str, Form]) -> str | None:
    shapes = [name for name, (shape, _) in wanted.items() if stored[name].shape != tuple(shape)]
    if shapes:
        shown = ", ".join(
            f"{name} is {list(stored[name].shape)} there and {list(wanted[name][0])} here"
            for name in shapes[:SHOWN]
        )
        return f"{len(shapes)} shapes differ: {shown}{', ...' if len(shapes) > SHOWN else ''}"
    for name, (_, dtype) in wanted.items():
        there = TORCH_TYPES[stored[name].dtype]
        if not convertible(there, dtype):
            return f"{name} is {there} there and {dtype} here"
    return None
