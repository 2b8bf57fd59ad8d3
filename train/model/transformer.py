"""A Llama-family decoder as a plain module, free of parallelism.

`Transformer` can hold a part of the layers: pipeline stages are built from the same class, and
parameters keep the names that the whole model gives them. Shapes: B batch, S sequence (the part
of it that this rank holds between blocks, under sequence parallelism), V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.train.model.attention import Attention, document_causal_mask
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.rope import rope_angles


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The decoder, or the part of it that a pipeline stage holds.

    `layers` are the blocks held (all by default); the first stage holds the embedding, the last
    the final norm and the head.
    """

    def __init__(self, config: ModelConfig, *, layers: range | None = None) -> None:
        super().__init__()
        self.config = config
        layers = range(config.num_layers) if layers is None else layers
        first, last = layers.start == 0, layers.stop == config.num_layers
        self.embed = nn.Embedding(config.vocab_size, config.dim) if first else None
        self.layers = nn.ModuleDict({str(i): Block(config) for i in layers})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if last else None
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False) if last else None
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make embedding and head one parameter, where both are here and the model ties them."""
        if self.config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(
        self, x: Tensor, *, positions_BS: Tensor, document_BS: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, S), or the stage before's output, to logits (B, S, V), or this stage's.

        `positions_BS` count from 0 in each document; `document_BS` numbers the documents of a
        packed sample, between which attention does not look (None: one document).
        """
        cos, sin = rope_angles(self.config, positions_BS)
        mask = None if document_BS is None else document_causal_mask(document_BS)
        if self.embed is not None:
            x = self.embed(x)
        for block in self.layers.values():
            x = block(x, cos, sin, mask)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def parameter_name(fqn: str, config: ModelConfig) -> str:
    """The name under which a parameter is seeded and saved.

    A head that a pipeline separates from the embedding it is tied to goes by the embedding's.
    """
    if config.tie_embeddings and fqn == "head.weight":
        return "embed.weight"
    return fqn
