"""The checkpoint format's names of element types, as torch's types, and tensors as plain bytes."""

import torch
from torch import Tensor

TORCH_TYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's type by the format's name, for every name of `boxes.ITEM_BYTES`."""

_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}


def name_of(dtype: torch.dtype) -> str:
    """The format's name of a type.

    Raises:
        ValueError: checkpoints cannot hold it.
    """
    if dtype not in _NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NAMES)
        raise ValueError(f"{dtype}: checkpoints hold no such type; they hold {known}")
    return _NAMES[dtype]


def convertible(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values of one type may be loaded as another: the same, or both floating-point."""
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as a flat tensor of uint8; nothing is copied."""
    assert tensor.is_contiguous()
    # One element may be contiguous with any stride, which view() would refuse.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def byte_view(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory; nothing is copied."""
    return as_bytes(tensor.detach()).numpy().data


def typed(memory: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
    """The beginning of a flat uint8 tensor, as a tensor of another type and shape.

    The memory must be aligned to the type; nothing is copied.
    """
    count = 1
    for size in sizes:
        count *= size
    return memory[: count * dtype.itemsize].view(dtype).view(sizes)
