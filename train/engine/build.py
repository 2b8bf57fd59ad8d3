"""From a configuration to this rank's part of the model, in one fixed order."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phalanx.parallel.apply import parallelize
from phalanx.parallel.executor import Executor, WholeModelExecutor
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.graph import Schedule
from phalanx.parallel.pipeline.runtime import PipelineExecutor
from phalanx.parallel.pipeline.tied import TiedWeight, share_memory
from phalanx.parallel.pipeline.wgrad import WeightGradientStore
from phalanx.parallel.zero.settings import Dtypes
from phalanx.parallel.zero.shard import Sharder, Sharding
from phalanx.train.config import Config, Precision, PrecisionConfig
from phalanx.train.data.source import BatchSource
from phalanx.train.model.init import init_weights
from phalanx.train.model.plan import plan_for
from phalanx.train.model.transformer import Transformer, parameter_name
from phalanx.train.plan.pipeline import plan_pipeline

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
    shardings: dict[int, Sharding]
    """How data-parallel ranks divide each."""
    executor: Executor
    """Runs them."""
    parameters: dict[str, nn.Parameter]
    """By the whole model's names."""
    tied: TiedWeight | None
    """The weight that the first and the last stage share, where this rank holds one of them."""

    @property
    def counted_parameters(self) -> list[nn.Parameter]:
        """Parameters that this rank counts in norms: all but the second copy of a tied one."""
        left_out = None
        if self.tied is not None and 0 not in self.stages:
            left_out = self.tied.name
        return [p for n, p in self.parameters.items() if n != left_out]


def build_model(config: Config, mesh: Mesh, device: torch.device) -> Model:
    """Build on the meta device, parallelize, then make and fill only this rank's shards."""
    sharder = Sharder(mesh, config.zero, torch_dtypes(config.precision))
    if config.parallel.pp == 1:
        stage, sharding = _stage(config, mesh, sharder, range(config.model.num_layers), None)
        executor: Executor = WholeModelExecutor(
            stage, sharding, num_microbatches=config.num_microbatches(mesh.world.size())
        )
        return Model(
            stages={0: stage},
            shardings={0: sharding},
            executor=executor,
            parameters=dict(stage.named_parameters()),
            tied=None,
        )
    plan = plan_pipeline(config, config.num_microbatches(mesh.world.size()))
    store = WeightGradientStore()
    # Compiled code is cut into pieces for the store: only where a schedule gains by it.
    whole = config.parallel.compile and not _may_split(config, plan.schedule)
    stages: dict[int, nn.Module] = {}
    shardings: dict[int, Sharding] = {}
    for index in plan.schedule.stages_of(mesh.rank("pp")):
        stages[index], shardings[index] = _stage(
            config, mesh, sharder, plan.cuts[index], None if whole else store
        )
    parameters, tied = _parameters(stages, config, plan.schedule)
    return Model(
        stages=stages,
        shardings=shardings,
        executor=_pipeline_executor(config, mesh, device, stages, shardings, plan.schedule, store),
        parameters=parameters,
        tied=tied,
    )


def _may_split(config: Config, schedule: Schedule) -> bool:
    """Whether some step computes weight gradients apart from input gradients."""
    return schedule.splits_backward or config.pipeline.schedule == "auto"


def _stage(
    config: Config,
    mesh: Mesh,
    sharder: Sharder,
    layers: range,
    store: WeightGradientStore | None,
) -> tuple[Transformer, Sharding]:
    """Some layers of the model, this rank's shards filled."""
    with torch.device("meta"):
        stage = Transformer(config.model, layers=layers).to(TORCH_DTYPES[config.precision.params])
    sharding = parallelize(
        stage,
        plan_for(stage),
        mesh,
        config=config.parallel,
        sharder=sharder,
        store=store,
    )
    stage.to_empty(device=sharder.master_device)
    stage.tie_weights()
    init_weights(stage, config.model, seed=config.training.seed)
    return stage, sharding


def _parameters(
    stages: dict[int, nn.Module], config: Config, schedule: Schedule
) -> tuple[dict[str, nn.Parameter], TiedWeight | None]:
    """Stages' parameters by the whole model's names, each once; and the weight tied across stages.

    Where both of its stages are here, the first one's parameter stands for it.
    """
    parameters: dict[str, nn.Parameter] = {}
    tied: TiedWeight | None = None
    for stage in stages.values():
        for fqn, parameter in list(stage.named_parameters()):
            name = parameter_name(fqn, config.model)
            is_tied = config.model.tie_embeddings and name == parameter_name(
                "head.weight", config.model
            )
            twin = None
            if name in parameters:
                assert is_tied, name
                twin = share_memory(parameters[name], stage, fqn)
            else:
                parameters[name] = parameter
            if is_tied:
                tied = TiedWeight(
                    name=name,
                    parameter=parameters[name],
                    twin=twin,
                    first=schedule.placement[0],
                    last=schedule.placement[-1],
                )
    return parameters, tied


def _pipeline_executor(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    stages: dict[int, nn.Module],
    shardings: dict[int, Sharding],
    schedule: Schedule,
    store: WeightGradientStore,
) -> PipelineExecutor:
    batch, tp = config.training.microbatch_size, config.parallel.tp
    compute = TORCH_DTYPES[config.precision.compute]
    return PipelineExecutor(
        stages,
        shardings=shardings,
        schedule=schedule,
        store=store,
        group=mesh.group("pp"),
        meter=mesh.meter,
        device=device,
        tokens=torch.empty(batch, config.training.seq_len, dtype=torch.int64, device="meta"),
        boundary=_meta(batch, config.training.seq_len // tp, config.model.dim, dtype=compute),
        output=_meta(batch, config.training.seq_len, config.model.vocab_size // tp, dtype=compute),
    )


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
