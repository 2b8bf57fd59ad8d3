"""The shape of a Llama-family decoder; Llama 3 and Qwen 3 are values of it."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RopeScalingConfig:
    """Llama-3 frequency scaling of the rotary embedding (Llama 3.1 report, and `rope_scaling`
    of type `llama3` in Hugging Face configurations)."""

    factor: float = 1.0
    """How much longer the context becomes; 1 = no scaling."""
    low_freq_factor: float = 1.0
    """Wavelengths over original_max_seq_len / this are divided by factor."""
    high_freq_factor: float = 4.0
    """Wavelengths under original_max_seq_len / this stay as they are; between, interpolated."""
    original_max_seq_len: int = 8192
    """Context length, in tokens, that the model was first trained with."""

    def __post_init__(self) -> None:
        if not 1 <= self.factor < float("inf"):
            raise ValueError(
                f"model.rope_scaling.factor={self.factor}: use 1 (none) or more, finite"
            )
        for name in ("low_freq_factor", "high_freq_factor", "original_max_seq_len"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"model.rope_scaling.{name}={getattr(self, name)}: must be finite, above 0"
                )
        if self.factor > 1 and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor}: must be larger "
                f"than low_freq_factor={self.low_freq_factor}"
            )


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder of `num_layers` pre-norm blocks: RMSNorm, GQA with RoPE, SwiGLU."""

    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary, and divisible by parallel.tp."""
    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads; divisible by num_kv_heads and by parallel.tp."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); divisible by parallel.tp; empty =
    num_heads."""
    head_dim: int | None = None
    """Width of one head; empty = dim / num_heads."""
    ffn_dim: int = 688
    """Width of the SwiGLU hidden layer; divisible by parallel.tp."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's frequencies."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Llama-3 context extension; factor=1 leaves it off."""
    qk_norm: bool = False
    """RMSNorm on each head of queries and keys before RoPE (Qwen 3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    tie_embeddings: bool = False
    """One matrix for the embedding and the output head."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; a block's two output projections get
    init_std / sqrt(2 * num_layers)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"model.{name}={getattr(self, name)}: must be finite, above 0")
        for name in ("num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1, or empty")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads}: does not divide model.dim={self.dim}; "
                "change one, or set model.head_dim"
            )
        if self.size_of_head % 2:
            raise ValueError(f"model.head_dim={self.size_of_head}: RoPE needs an even width")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.kv_heads}: does not divide "
                f"model.num_heads={self.num_heads}"
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def size_of_head(self) -> int:
        """Width of one head, the default filled in."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim
