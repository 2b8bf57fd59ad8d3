"""What a pipeline stage costs, estimated from the model's shape before anything is measured.

Time is counted in FLOPs of one microbatch, as train/model/flops.py counts them: a matrix takes 2 a
token and entry in F, B and W each; attention's products take 2 x width x seq_len a token in F and
twice that in B, and have no W. The embedding is a look-up and counts nothing; what a message takes
is not known and counts nothing either.

Memory is counted in bytes of one microbatch: what F saves for B, and what a put-off W still needs
after B, the inputs and output gradients of matrices and norms. B's passing peak is not in it.

Torch-free.
"""

from collections.abc import Sequence

from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.pipeline.simulate import Costs, Memory
from phalanx.train.config import Config, Precision
from phalanx.train.model.flops import layer_matmul_params

BYTES = {Precision.fp64: 8, Precision.fp32: 4, Precision.bf16: 2}
"""Of a number."""


def layer_and_head(config: Config) -> tuple[float, float]:
    """FLOPs of a whole step a token: of one layer, and of the head."""
    f, b, w = _layer_flops(config)
    return f + b + w, 6.0 * config.model.vocab_size * config.model.dim


def estimated_costs(config: Config, cuts: Sequence[range]) -> Costs:
    """FLOPs of each stage's F, B and W of a microbatch, for stages of these layers."""
    tokens = _tokens(config)
    layer = _layer_flops(config)
    head = 2.0 * config.model.vocab_size * config.model.dim
    f, b, w = (
        tuple(
            tokens * (len(cut) * part + (head if cut.stop == config.model.num_layers else 0.0))
            for cut in cuts
        )
        for part in layer
    )
    return Costs(f, b, w)


def estimated_memory(config: Config, cuts: Sequence[range]) -> Memory:
    """Bytes that each stage's F, B and W of a microbatch add to its rank."""
    saved, kept = _layer_bytes(config)
    logits_saved, logits_kept = _head_bytes(config)
    tokens = _tokens(config) / config.parallel.tp
    f, b, w = [], [], []
    for cut in cuts:
        last = cut.stop == config.model.num_layers
        held = tokens * (len(cut) * saved + (logits_saved if last else 0.0))
        put_off = tokens * (len(cut) * kept + (logits_kept if last else 0.0))
        f.append(held)
        b.append(put_off - held)
        w.append(-put_off)
    return Memory(tuple(f), tuple(b), tuple(w))


def _tokens(config: Config) -> int:
    return config.training.microbatch_size * config.training.seq_len


def _layer_flops(config: Config) -> tuple[float, float, float]:
    """F, B and W of a layer and token, what activation checkpointing recomputes in B counted."""
    width = config.model.num_heads * config.model.size_of_head
    matrices = 2.0 * layer_matmul_params(config.model)
    attention = 2.0 * width * config.training.seq_len
    recomputed = {
        ActivationCheckpoint.none: 0.0,
        ActivationCheckpoint.selective: matrices / 2,
        ActivationCheckpoint.full: matrices + attention,
    }[config.parallel.activation_checkpoint]
    return matrices + attention, matrices + 2 * attention + recomputed, matrices


def _layer_bytes(config: Config) -> tuple[float, float]:
    """What a layer saves a token from F to B, and from B to W."""
    model = config.model
    query = model.num_heads * model.size_of_head
    key_value = model.kv_heads * model.size_of_head
    # Inputs of both norms and their outputs, of attention and its output projection, of the
    # feed-forward's gate, product and last matrix.
    everything = 4 * model.dim + 2 * query + 2 * key_value + 4 * model.ffn_dim
    matmuls = query + 2 * key_value + 2 * model.ffn_dim + 2 * model.dim
    saved = {
        ActivationCheckpoint.none: everything,
        ActivationCheckpoint.selective: model.dim + query + matmuls / 2,
        ActivationCheckpoint.full: model.dim,
    }[config.parallel.activation_checkpoint]
    inputs = 2 * model.dim + query + model.ffn_dim
    norms = 4 * model.dim
    size = BYTES[config.precision.compute]
    return size * saved, size * (inputs + matmuls + norms)


def _head_bytes(config: Config) -> tuple[float, float]:
    """What norm, head and loss save a token from F to B, and from B to W."""
    size = BYTES[config.precision.compute]
    loss_size = max(size, BYTES[Precision.fp32])
    dim, vocab = config.model.dim, config.model.vocab_size
    return 2 * size * dim + loss_size * vocab, size * (3 * dim + vocab)
