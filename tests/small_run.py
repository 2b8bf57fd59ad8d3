"""A model whose sizes no degree divides evenly, made-up batches, and what one process computes.

The reference is the plain model, torch's cross-entropy and torch's autograd: nothing of parallel/.
Shapes: B samples, S tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.ranks import Ranks
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import Config, Precision, PrecisionConfig, TrainingConfig
from phalanx.train.data.source import Batch
from phalanx.train.engine.step import Engine
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.init import init_weights
from phalanx.train.model.transformer import Transformer

FP64 = PrecisionConfig(params=Precision.fp64, compute=Precision.fp64, reduce=Precision.fp64)
SEED = 5


def model_config(*, tied: bool = False, num_layers: int = 5) -> ModelConfig:
    """Over 4 ranks the QK-norm leaves one empty-handed; half of 298 or 54 rows is odd."""
    return ModelConfig(
        vocab_size=298,
        dim=37,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_dim=54,
        qk_norm=True,
        attention_bias=True,
        tie_embeddings=tied,
        init_std=0.1,
    )


def make_config(
    *,
    tied: bool = False,
    num_layers: int = 5,
    microbatch: int = 1,
    stage: int = 3,
    schedule: str = "1f1b",
    precision: PrecisionConfig = FP64,
    **degrees: int,
) -> Config:
    """A run of 8 samples of 16 tokens a step, one sample a microbatch unless more are asked for."""
    return Config(
        model=model_config(tied=tied, num_layers=num_layers),
        training=TrainingConfig(
            seq_len=16, global_batch_size=8, microbatch_size=microbatch, seed=SEED
        ),
        parallel=ParallelConfig(**degrees),
        pipeline=PipelineConfig(schedule=schedule),
        zero=ZeroConfig(stage=stage),
        precision=precision,
    )


def make_engine(ranks: Ranks, config: Config) -> Engine:
    """This rank's part of the layout; collective, in a process group."""
    mesh = build_mesh(
        config.parallel,
        world_size=ranks.world_size,
        device_type="cpu",
        ranks_per_node=ranks.ranks_per_node,
    )
    return Engine(config, mesh, ranks.device)


def make_batch(config: Config, *, rank: int = 0, size: int = 1, number: int = 0) -> Batch:
    """Data-parallel rank `rank`'s rows, of `size` ranks, of packed documents of uneven length."""
    generator = torch.Generator().manual_seed(number)
    shape = config.training.global_batch_size, config.training.seq_len
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    labels = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    begins = torch.rand(shape, generator=generator) < 0.2
    begins[:, 0] = False
    document = begins.cumsum(dim=1)
    places = torch.arange(shape[1]).expand(shape)
    positions = places - torch.where(begins, places, 0).cummax(dim=1).values
    labels[torch.rand(shape, generator=generator) < 0.1] = -100
    labels[-1] = -100  # one rank has fewer learned tokens than the others
    rows = shape[0] // size
    mine = slice(rank * rows, (rank + 1) * rows)
    return Batch(
        tokens_BS=tokens[mine],
        labels_BS=labels[mine],
        positions_BS=positions[mine],
        document_BS=document[mine].int(),
        sample_ids=list(range(mine.start, mine.stop)),
        num_valid=int((labels[mine] != -100).sum()),
    )


def rank_batch(engine: Engine, *, number: int = 0) -> Batch:
    """The rows of the rank that `engine` belongs to."""
    mesh = engine.mesh
    return make_batch(engine.config, rank=mesh.dp_rank, size=mesh.dp_size, number=number)


def reference_model(config: Config, dtype: torch.dtype = torch.float64) -> Transformer:
    """The whole model in this process."""
    torch.set_num_threads(1)
    model = Transformer(config.model).to(dtype)
    init_weights(model, config.model, seed=config.training.seed)
    return model


def reference_logits(model: Transformer, batch: Batch) -> Tensor:
    """(B, S, V)."""
    return model(batch.tokens_BS, positions_BS=batch.positions_BS, document_BS=batch.document_BS)


def reference_loss(model: Transformer, batch: Batch) -> Tensor:
    """Mean cross-entropy of the learned tokens; `backward()` of it is the step's gradient."""
    logits = reference_logits(model, batch).flatten(0, 1)
    return F.cross_entropy(logits, batch.labels_BS.flatten(), ignore_index=-100)
