"""How many parameters a model has, and how much arithmetic a token costs.

FLOPs of a token, forward and backward, after Chowdhery et al. (PaLM, 2022, appendix B):

    6 * (matmul parameters) + 12 * layers * heads * head_dim * seq_len / 2

Each matrix entry takes a multiply and an add forward and twice that backward. The output head
counts once whether its matrix is tied or not; the embedding is a look-up and counts nothing.
Attention's two products cost 4 * heads * head_dim FLOPs a layer and position attended to,
forward, and twice that backward; a causal token attends to half of the sample on average (the
paper leaves the half out). Documents packed into one sample attend to less than that, and
activation checkpointing computes more: MFU counts neither, by definition. Torch-free.
"""

from phalanx.train.model.config import ModelConfig


def layer_matmul_params(config: ModelConfig) -> int:
    """Entries of a layer's matrices."""
    query = config.num_heads * config.size_of_head
    key_value = config.kv_heads * config.size_of_head
    attention = config.dim * (query + 2 * key_value) + query * config.dim
    return attention + 3 * config.dim * config.ffn_dim


def matmul_params(config: ModelConfig) -> int:
    """Entries of the matrices that every token is multiplied with, the output head included."""
    return config.num_layers * layer_matmul_params(config) + config.vocab_size * config.dim


def num_params(config: ModelConfig) -> int:
    """Trainable parameters of the model: matrices, embedding, biases and norms."""
    head_dim = config.size_of_head
    block = 2 * config.dim
    if config.attention_bias:
        block += (config.num_heads + 2 * config.kv_heads) * head_dim
    if config.qk_norm:
        block += 2 * head_dim
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return matmul_params(config) + embedding + config.num_layers * block + config.dim


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of one token in a sample of `seq_len`; the module's docstring has the
    formula and what it leaves out."""
    width = config.num_heads * config.size_of_head
    return 6.0 * matmul_params(config) + 12.0 * config.num_layers * width * seq_len / 2
