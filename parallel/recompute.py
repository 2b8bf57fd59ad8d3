"""Activation checkpointing of a block, without changing its parameters' names.

`selective` keeps what is dear to recompute: attention's output and every second matmul's.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from phalanx.parallel.config import ActivationCheckpoint

aten = torch.ops.aten
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
_MATMUL = {aten.mm.default, aten.addmm.default}


def checkpointed(
    forward: Callable[..., Tensor], mode: ActivationCheckpoint
) -> Callable[..., Tensor]:
    """A block's forward pass that is recomputed during backward."""
    if mode is ActivationCheckpoint.none:
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode is ActivationCheckpoint.selective:
        options["context_fn"] = _selective_contexts
    return partial(checkpoint, forward, **options)


def _selective_contexts() -> tuple[Any, Any]:
    """Fresh contexts for one forward pass; the count restarts with each."""
    return create_selective_checkpoint_contexts(_policy())


def _policy() -> Callable[..., CheckpointPolicy]:
    seen: Counter[bool] = Counter()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in _MATMUL:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
