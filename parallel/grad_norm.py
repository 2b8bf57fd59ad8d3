"""The global gradient norm and clipping, across every mesh axis: the one place for both."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from phalanx.parallel.local import local


@torch.no_grad()
def settle_partial(parameters: Iterable[Tensor]) -> None:
    """Reduce gradients that tensor parallelism left as partial sums, in place.

    ZeRO does this for the parameters that it divides; others (data-parallel size 1) come here.
    """
    for parameter in parameters:
        grad = parameter.grad
        if not (isinstance(grad, DTensor) and isinstance(parameter, DTensor)):
            continue
        if grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


@torch.no_grad()
def local_squares(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """This rank's shares of the squared global L2 norm, by parameter, fp64 (P,).

    The sum over the world is the whole; `exact_sum` makes it the same on whatever ranks the
    parameters lie. Every element counts once: a gradient that a mesh axis replicates is counted by
    that axis's first rank. Parameters that another rank counts (a tied copy) are left out by the
    caller.
    """
    grads = (p.grad for p in parameters if p.grad is not None)
    counted = [part for grad in grads if _counts_here(grad) and (part := local(grad)).numel()]
    if not counted:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float64)).square()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients by max_norm / norm where the norm is larger."""
    if norm <= max_norm:
        return
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, max_norm / norm)


@torch.no_grad()
def nonfinite(named_tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of tensors whose part on this rank holds a NaN or an infinity."""
    return [
        name
        for name, tensor in named_tensors
        if tensor is not None and not local(tensor).isfinite().all()
    ]


def _counts_here(grad: Tensor) -> bool:
    if not isinstance(grad, DTensor):
        return True
    coordinate = grad.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        position == 0 or not isinstance(placement, Replicate)
        for position, placement in zip(coordinate, grad.placements, strict=True)
    )
