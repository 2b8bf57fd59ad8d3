"""Grouped-query attention over packed documents.

Shapes: B batch, S sequence, H heads held by this rank, K key/value heads held, D width of a head.
The number of heads is read from the projections' outputs, so that the same code serves a tensor-
parallel rank that holds a part of them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.train.model.config import ModelConfig
from phalanx.train.model.rope import apply_rope


class Attention(nn.Module):
    """Causal self-attention with RoPE, grouped key/value heads and optional QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.size_of_head
        width = config.num_heads * self.head_dim
        kv_width = config.kv_heads * self.head_dim
        bias = config.attention_bias
        self.wq = nn.Linear(config.dim, width, bias=bias)
        self.wk = nn.Linear(config.dim, kv_width, bias=bias)
        self.wv = nn.Linear(config.dim, kv_width, bias=bias)
        self.wo = nn.Linear(width, config.dim, bias=False)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, S, dim) -> (B, S, dim).

        `mask` is boolean (B, 1, S, S), true where a query may look; None = plain causal.
        """
        q_BSHD = self.wq(x).unflatten(-1, (-1, self.head_dim))
        k_BSKD = self.wk(x).unflatten(-1, (-1, self.head_dim))
        v_BSKD = self.wv(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSKD = self.q_norm(q_BSHD), self.k_norm(k_BSKD)
        q_BSHD, k_BSKD = apply_rope(q_BSHD, cos, sin), apply_rope(k_BSKD, cos, sin)
        groups = q_BSHD.shape[2] // k_BSKD.shape[2]
        if groups > 1:
            k_BSKD = k_BSKD.repeat_interleave(groups, dim=2)
            v_BSKD = v_BSKD.repeat_interleave(groups, dim=2)
        out_BHSD = F.scaled_dot_product_attention(
            q_BSHD.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.wo(out_BHSD.transpose(1, 2).flatten(2))


def document_causal_mask(document_BS: Tensor) -> Tensor:
    """Boolean (B, 1, S, S): true where the key is of the query's document and not after it."""
    same = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
    return same.tril().unsqueeze(1)
