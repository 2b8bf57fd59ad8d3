"""What this rank holds of a tensor."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """A DTensor's local part; another tensor as it is. Autograd goes through."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
