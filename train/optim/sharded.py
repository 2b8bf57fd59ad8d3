"""Parameters and states as ranks hold them: local parts, and tensors laid out alike."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement

from phalanx.parallel.local import local


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part, apart from autograd."""
    return local(tensor.detach())


def laid_out_like(
    parameter: Tensor, local: Tensor, *, shape: tuple[int, ...] | None = None
) -> Tensor:
    """`local` as this rank's part of a tensor that is cut as `parameter` is; a view of it.

    Args:
        shape: of the whole tensor, where it is not the parameter's. Columns may be others, if equal
            cuts of the parameter's are equal cuts of them.
    """
    if not isinstance(parameter, DTensor):
        return local
    whole = torch.Size(parameter.shape if shape is None else shape)
    stride = parameter.stride() if shape is None else torch.empty(whole, device="meta").stride()
    spec = DTensorSpec(
        parameter.device_mesh,
        parameter.placements,
        tensor_meta=TensorMeta(whole, stride, local.dtype),
    )
    # DTensor.from_local would move states in host memory to the mesh's device.
    return DTensor(local, spec, requires_grad=False)


def column_parts(parameter: Tensor) -> int:
    """Equal parts that ranks cut a parameter's columns into; 1 = none is cut.

    Raises:
        ValueError: it is cut otherwise than by rows, or a matrix by columns.
    """
    if not isinstance(parameter, DTensor):
        return 1
    parts = 1
    for axis, placement in enumerate(parameter.placements):
        dim = _dim(placement)
        if dim == 1 and parameter.dim() == 2:
            parts *= parameter.device_mesh.size(axis)
        elif dim != 0 and not isinstance(placement, Replicate):
            raise ValueError(f"placements {parameter.placements}: rows or columns can be cut")
    return parts


def _dim(placement: Placement) -> int | None:
    dim: int | None = getattr(placement, "dim", None)
    return dim
