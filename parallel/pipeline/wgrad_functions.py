"""Operations whose weight gradient is computed when a store says so.

Each computes forward what torch's operation of the same name computes, and backward what autograd
would, bit for bit where the device's kernels allow; plain tensors and DTensors take the same way.
The weight is an input without a gradient, so that an output requires one even where no other input
does (an embedding's), and stands on `ctx` itself: under activation checkpointing what is unpacked
from `save_for_backward` is another object, whose `.grad` nobody reads.

Shapes: N tokens, K width in, M width out, E experts.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

aten = torch.ops.aten


class Store(Protocol):
    """Where weight gradients are handed to; `WeightGradientStore` is the one."""

    def defer(self, compute: Callable[[], None]) -> None:
        """Run `compute` now or later."""


def linear(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None, store: Store) -> Tensor:
    """`F.linear`: x (..., K) -> (..., M)."""
    out: Tensor = _Linear.apply(x, weight_MK, bias_M, store)
    return out


def embedding(
    tokens: Tensor,
    weight: Tensor,
    store: Store,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """`F.embedding`: integer tokens (...) -> (..., K)."""
    out: Tensor = _Embedding.apply(tokens, weight, store, padding_idx, scale_grad_by_freq)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, store: Store) -> Tensor:
    """`F.rms_norm` over the dims that `weight` has: x (..., K) -> (..., K)."""
    out: Tensor = _RMSNorm.apply(x, weight, eps, store)
    return out


def grouped_linear(x_NK: Tensor, weight_EKM: Tensor, offsets_E: Tensor, store: Store) -> Tensor:
    """One matmul an expert, over its own rows: (N, M).

    Expert e has the rows from `offsets_E[e - 1]` (0 for the first) up to `offsets_E[e]`, int32;
    the last offset is N. See `F.grouped_mm`; fp64, which that does not know, goes expert by expert.
    """
    out: Tensor = _GroupedLinear.apply(x_NK, weight_EKM, offsets_E, store)
    return out


@torch.no_grad()
def accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Add to `parameter.grad`, as autograd would."""
    grad = grad.to(parameter.dtype)
    before = parameter.grad
    if before is None:
        parameter.grad = grad
    elif isinstance(grad, DTensor) and grad.placements != before.placements:  # type: ignore[attr-defined]
        # Tied weights: no operation in place can change where the parts lie.
        parameter.grad = before + grad
    else:
        before += grad


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, store: Store) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.store = weight, bias, store
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy_NM = dy.reshape(-1, dy.shape[-1])

        def compute() -> None:
            if needs_weight:
                accumulate(weight, dy_NM.t().mm(x.reshape(-1, x.shape[-1])))
            if needs_bias:
                accumulate(bias, dy_NM.sum(0))

        dx = dy_NM.mm(weight).view(x.shape) if needs_x else None
        if needs_weight or needs_bias:
            ctx.store.defer(compute)
        return dx, None, None, None


class _Embedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        store: Store,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.store = weight, store
        ctx.options = -1 if padding_idx is None else padding_idx, scale_grad_by_freq
        return F.embedding(tokens, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (tokens,), weight, options = ctx.saved_tensors, ctx.weight, ctx.options

        def compute() -> None:
            grad = aten.embedding_dense_backward(dy, tokens, weight.shape[0], *options)
            accumulate(weight, grad)

        ctx.store.defer(compute)
        return None, None, None, None, None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float | None, store: Store) -> Tensor:
        out, rstd = aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, rstd)
        ctx.weight, ctx.store = weight, store
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, rstd), weight = ctx.saved_tensors, ctx.weight
        grads = _fused_norm_grads if x.device.type == "cuda" else _norm_grads

        def compute() -> None:
            accumulate(weight, grads(dy, x, rstd, weight, of_weight=True))

        dx = None
        if ctx.needs_input_grad[0]:
            dx = grads(dy, x, rstd, weight, of_weight=False)
        if ctx.needs_input_grad[1]:
            ctx.store.defer(compute)
        return dx, None, None, None


def _fused_norm_grads(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *, of_weight: bool
) -> Tensor:
    if of_weight:
        # Not its values but its form is asked for, and ZeRO 3 has freed its memory by then.
        weight = torch.empty_like(weight)
    wanted = [not of_weight, of_weight]
    pair = aten._fused_rms_norm_backward(dy, x, weight.shape, rstd, weight, wanted)
    out: Tensor = pair[of_weight]
    return out


def _norm_grads(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *, of_weight: bool) -> Tensor:
    """Where torch has no kernel: y = x * rstd * weight, in fp32 at least (`rstd`'s format)."""
    wide_x, wide_dy = x.to(rstd.dtype), dy.to(rstd.dtype)
    dims = tuple(range(-weight.dim(), 0))
    if of_weight:
        leading = tuple(range(x.dim() - weight.dim()))
        product = wide_dy * (wide_x * rstd)
        return product.sum(leading) if leading else product
    d_normed = wide_dy * weight
    d_rstd = (d_normed * wide_x).sum(dims, keepdim=True)
    # d rstd / d x = -rstd^3 x / K; in autograd's order of operations, for its bits.
    d_mean = d_rstd * -0.5 * rstd.pow(3)
    return (d_normed * rstd + d_mean.expand_as(x) / weight.numel() * (wide_x * 2.0)).to(x.dtype)


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, store: Store) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.weight, ctx.store = weight, store
        return _grouped_mm(x, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, offsets), weight = ctx.saved_tensors, ctx.weight
        dy = dy.contiguous()  # a broadcast gradient has strides that grouped_mm refuses

        def compute() -> None:
            accumulate(weight, _grouped_mm(x.t(), dy, offsets))

        dx = None
        if ctx.needs_input_grad[0]:
            dx = _grouped_mm(dy, weight.transpose(-2, -1), offsets)
        if ctx.needs_input_grad[1]:
            ctx.store.defer(compute)
        return dx, None, None, None


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a (N, K), b (E, K, M) -> (N, M), or a (K, N), b (N, M) -> (E, K, M)."""
    if a.dtype != torch.float64:
        return F.grouped_mm(a, b, offs=offsets)
    ends = offsets.tolist()
    spans = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    if b.dim() == 3:
        return torch.cat([a[rows] @ b[expert] for expert, rows in enumerate(spans)])
    return torch.stack([a[:, rows] @ b[rows] for rows in spans])
