"""From a configuration to this rank's part of the model, in one fixed order."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phalanx.parallel.apply import parallelize
from phalanx.parallel.executor import Executor, WholeModelExecutor
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.runtime import PipelineExecutor
from phalanx.parallel.pipeline.stages import stage_layers, stages_of_rank
from phalanx.parallel.zero.shard import Dtypes
from phalanx.train.config import Config, Precision, PrecisionConfig
from phalanx.train.data.source import BatchSource
from phalanx.train.model.init import init_weights
from phalanx.train.model.plan import plan_for
from phalanx.train.model.transformer import Transformer, parameter_name

TORCH_DTYPES = {
    Precision.fp64: torch.float64,
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
}


def torch_dtypes(config: PrecisionConfig) -> Dtypes:
    """The configured formats as torch's."""
    return Dtypes(
        params=TORCH_DTYPES[config.params],
        compute=TORCH_DTYPES[config.compute],
        reduce=TORCH_DTYPES[config.reduce],
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """This rank's part of the model, ready to run."""

    stages: dict[int, nn.Module]
    """Modules by stage number; {0: the whole model} without a pipeline."""
    executor: Executor
    """Runs them."""
    parameters: dict[str, nn.Parameter]
    """By the whole model's names."""
    tied_copy: str | None
    """Name of the parameter that the first and the last pipeline rank both hold, where this rank
    is one of them."""
    counts_tied: bool
    """Whether this rank is the one that counts the tied copy in norms."""

    @property
    def counted_parameters(self) -> list[nn.Parameter]:
        """Parameters that this rank counts in norms: all but the second copy of a tied one."""
        return [p for n, p in self.parameters.items() if n != self.tied_copy or self.counts_tied]


def build_model(config: Config, mesh: Mesh, device: torch.device) -> Model:
    """Build on the meta device, parallelize, then make and fill only this rank's shards."""
    dtypes = torch_dtypes(config.precision)
    num_stages = config.parallel.pp * config.pipeline.chunks if config.parallel.pp > 1 else 1
    cuts = stage_layers(config.model.num_layers, num_stages)
    held = stages_of_rank(mesh.rank("pp"), config.parallel.pp, num_stages // config.parallel.pp)
    stages: dict[int, nn.Module] = {}
    for index in held:
        with torch.device("meta"):
            stage = Transformer(config.model, layers=cuts[index]).to(dtypes.params)
        parallelize(
            stage,
            plan_for(stage),
            mesh,
            config=config.parallel,
            zero_stage=config.zero.stage,
            dtypes=dtypes,
        )
        stage.to_empty(device=device)
        stage.tie_weights()
        init_weights(stage, config.model, seed=config.training.seed)
        stages[index] = stage
    parameters = {
        parameter_name(fqn, config.model): parameter
        for stage in stages.values()
        for fqn, parameter in stage.named_parameters()
    }
    separated = config.model.tie_embeddings and config.parallel.pp > 1
    return Model(
        stages=stages,
        executor=_executor(config, mesh, device, stages, num_stages, dtypes.compute),
        parameters=parameters,
        tied_copy="embed.weight" if separated and "embed.weight" in parameters else None,
        counts_tied=mesh.rank("pp") == 0,
    )


def _executor(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    stages: dict[int, nn.Module],
    num_stages: int,
    compute: torch.dtype,
) -> Executor:
    num_microbatches = config.num_microbatches(mesh.world.size())
    if num_stages == 1:
        return WholeModelExecutor(
            stages[0], num_microbatches=num_microbatches, zero_stage=config.zero.stage
        )
    batch, tp = config.training.microbatch_size, config.parallel.tp
    return PipelineExecutor(
        stages,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule=config.pipeline.schedule,
        group=mesh.group("pp"),
        device=device,
        tokens=torch.empty(batch, config.training.seq_len, dtype=torch.int64, device="meta"),
        boundary=_meta(batch, config.training.seq_len // tp, config.model.dim, dtype=compute),
        output=_meta(batch, config.training.seq_len, config.model.vocab_size // tp, dtype=compute),
    )


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def batch_source(
    config: Config, *, dp_rank: int, dp_size: int, split: str = "train"
) -> BatchSource:
    """The samples of one data-parallel rank."""
    return BatchSource(
        config.data,
        seq_len=config.training.seq_len,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        dp_rank=dp_rank,
        dp_size=dp_size,
        split=split,
        vocab_size=config.model.vocab_size,
    )
