"""The backward pass in two: input gradients now (B), weight gradients when they are asked for (W).

Zero-bubble schedules fill waiting time with weight gradients, for which no other stage waits (Qi et
al., 2024, "Zero Bubble Pipeline Parallelism", section 2). The modules put in place here hand the
computation of their weight gradients to a store instead of to autograd; what autograd cannot see it
cannot lose or compute twice. Other modules' parameters get theirs from autograd, in B.
"""

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.parallel.pipeline.wgrad_functions import embedding, linear, rms_norm


class WeightGradientStore:
    """Weight gradients that still have to be computed.

    One serves all stages of a rank, which computes one operation at a time. Nothing is kept by
    thread: on CUDA, backward functions run in another one than `deferring()` was entered in. What
    is taken has to run on the stream that the backward pass ran on.
    """

    def __init__(self) -> None:
        self.undeferred = ""
        """What keeps blocks from deferring, in words; "" where they do defer."""
        self._queue: deque[Callable[[], None]] = deque()
        self._deferring = False

    def defer(self, compute: Callable[[], None]) -> None:
        """Run `compute` at once, or, inside `deferring()`, keep it for `take()`."""
        if self._deferring:
            self._queue.append(compute)
        else:
            compute()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Within: a backward pass computes input gradients only.

        Warns where `undeferred` says that blocks compute both: a schedule then gains nothing from
        the split.
        """
        assert not self._deferring, "deferring() is entered already"
        if self.undeferred:
            warnings.warn(
                f"{self.undeferred}: the blocks' weight gradients are computed in B, and W has "
                "those of embedding, norm and head only; turn one of them off, or choose a "
                "schedule that does not split the backward pass",
                stacklevel=3,
            )
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def take(self) -> Callable[[], None]:
        """What was kept since the last call; to be called once, or dropped.

        Calling it adds the weight gradients to the parameters' `.grad`, in the order in which the
        backward pass came by, and frees the activations of each as soon as it is computed.
        """
        taken, self._queue = self._queue, deque()
        done = False

        @torch.no_grad()
        def compute_weight_gradients() -> None:
            nonlocal done
            assert not done, "these weight gradients are in .grad already"
            done = True
            while taken:
                taken.popleft()()

        return compute_weight_gradients


def defer_weight_gradients(
    model: nn.Module, store: WeightGradientStore, *, leave: Collection[nn.Module] = ()
) -> None:
    """Make `model`'s linear layers, embeddings and RMSNorms hand their weight gradients to `store`.

    In place, after tensor parallelism and before activation checkpointing, compilation and ZeRO.
    Names and values of parameters stay, as does every output, bit for bit. Left to autograd, which
    is as right: everything inside the modules of `leave`; subclasses of the three; embeddings with
    `max_norm` or `sparse`; norms of inputs in another format than their weight's.
    """
    left = {inner for module in leave for inner in module.modules()}
    for module in model.modules():
        deferred = _DEFERRED.get(type(module))
        if deferred is None or module in left:
            continue
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            continue
        # Another class rather than another `forward`: compiled blocks go on sharing their graphs.
        module.__class__ = deferred
        module.weight_gradient_store = store  # type: ignore[assignment]


class _DeferredLinear(nn.Linear):
    weight_gradient_store: WeightGradientStore

    # Compiled code has no place for the store's side effect: the graph is cut around matmuls.
    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.weight_gradient_store)


class _DeferredEmbedding(nn.Embedding):
    weight_gradient_store: WeightGradientStore

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.weight_gradient_store,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


class _DeferredRMSNorm(nn.RMSNorm):
    weight_gradient_store: WeightGradientStore

    def forward(self, x: Tensor) -> Tensor:
        # A compiled norm is fused with what is around it, which is worth more than waiting with a
        # gradient of `dim` numbers: there it is computed in B.
        compiled = torch.compiler.is_compiling()
        if compiled or self.weight is None or self.weight.dtype != x.dtype:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, self.weight_gradient_store)


_DEFERRED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _DeferredLinear,
    nn.Embedding: _DeferredEmbedding,
    nn.RMSNorm: _DeferredRMSNorm,
}
