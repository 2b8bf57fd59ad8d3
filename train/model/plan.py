"""How a `Transformer` is cut: tensor-parallel styles and sharding units, beside the model.

Sequence parallelism (Korthikanti et al., 2022) comes with tensor parallelism: between blocks and in
norms every rank holds S / tp tokens of each sample.
"""

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from phalanx.parallel.plan import ModelPlan, ShardUnit
from phalanx.train.model.transformer import Transformer


def plan_for(model: Transformer) -> ModelPlan:
    """The plan of a whole model or of one pipeline stage."""
    tied = model.config.tie_embeddings and model.embed is not None and model.head is not None
    units: list[ShardUnit] = []
    if not tied:
        if model.embed is not None:
            units.append(ShardUnit(modules=[model.embed], unused_in_backward=True))
        if model.norm is not None and model.head is not None:
            units.append(ShardUnit(modules=[model.norm, model.head], keep_gathered=True))
    return ModelPlan(
        blocks=list(model.layers.values()),
        shard_units=units,
        tensor=_tensor_styles(model),
        tie_weights=model.tie_weights,
    )


def _tensor_styles(model: Transformer) -> dict[str, ParallelStyle]:
    """Style of every module that tensor parallelism touches."""
    styles: dict[str, ParallelStyle] = {}
    if model.embed is not None:
        styles["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    for name in model.layers:
        styles |= {f"layers.{name}.{key}": style for key, style in _block_styles(model).items()}
    if model.head is not None:
        styles["norm"] = SequenceParallel()
        styles["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1))
    return styles


def _block_styles(model: Transformer) -> dict[str, ParallelStyle]:
    """Megatron's column-then-row cut of attention and feed-forward, norms sequence-parallel."""
    gather = Shard(1), Replicate()
    styles: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(gather[0], None, None, None),
            desired_input_layouts=(gather[1], None, None, None),
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(
            input_layouts=(gather[0],), desired_input_layouts=(gather[1],)
        ),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }
    if model.config.qk_norm:
        # Heads are what is cut here: dim 2 of (B, S, H, D).
        styles["attention.q_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        styles["attention.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return styles
