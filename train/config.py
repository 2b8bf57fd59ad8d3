"""The root of a run's configuration: every part's schema, and the checks that span parts."""

from dataclasses import dataclass, field
from enum import Enum

from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.nodes.groups import make_groups
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import data_ranks_per_node
from phalanx.train.bench_config import BenchConfig
from phalanx.train.data.config import DataConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.optim.blocks import check_column_cut
from phalanx.train.optim.config import OptimConfig


class Launcher(Enum):
    """Who starts the ranks."""

    local = "local"
    torchrun = "torchrun"
    ray = "ray"


class Device(Enum):
    """Where the ranks compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """A floating-point format."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"


class Defect(Enum):
    """A defect that `phalanx verify` plants, to show that it would be found."""

    none = "none"
    grad_scale = "grad_scale"
    drop_grad = "drop_grad"
    stale_shard = "stale_shard"
    reorder_batch = "reorder_batch"


@dataclass(kw_only=True)
class RunConfig:
    """Where a run writes."""

    name: str = "phalanx"
    """Name of the run."""
    dir: str = "runs/${run.name}"
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, events.jsonl,
    logs/. A run started again in the same folder resumes."""


@dataclass(kw_only=True)
class TrainingConfig:
    """How long and how much."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    seq_len: int = 256
    """Tokens of a sample; divisible by parallel.tp."""
    global_batch_size: int = 16
    """Samples of one optimizer step, over all ranks."""
    microbatch_size: int = 1
    """Samples that a rank computes at once."""
    seed: int = 1
    """Decides weights and sample order, in every layout alike."""
    eval_every: int = 0
    """Steps between evaluations on the held-out split; 0 = only after the last step."""
    eval_batches: int = 4
    """Global batches of one evaluation; 0 = no evaluation."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "global_batch_size", "microbatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)}: must be at least 1")
        for name in ("seed", "eval_every", "eval_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}={getattr(self, name)}: must be 0 or more")


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats."""

    params: Precision = Precision.fp32
    """Master weights and optimizer states."""
    compute: Precision = Precision.fp32
    """Forward and backward; other than params, each block's weights are cast as they are
    gathered."""
    reduce: Precision = Precision.fp32
    """Gradient reduction across data-parallel ranks."""

    def __post_init__(self) -> None:
        if self.params is Precision.bf16:
            raise ValueError(
                "precision.params=bf16: AdamW's small updates are lost in bf16 weights; "
                "use fp32 with precision.compute=bf16"
            )


@dataclass(kw_only=True)
class LaunchConfig:
    """How the ranks are started."""

    launcher: Launcher = Launcher.local
    """local: processes of this command. torchrun: start torchrun. ray: one actor a rank on a Ray
    cluster, or on a local one that is started for the run."""
    nodes: int = 1
    """Machines of the run (torchrun and ray)."""
    ranks_per_node: int | None = None
    """Ranks on each machine; empty = what the parallel degrees ask for, or with dp_shard=-1 the
    machine's GPUs (1 without any)."""
    emulate_nodes: bool = False
    """local: run all nodes' ranks on this machine, each ranks_per_node of them as a node of its
    own, to try what several nodes do."""
    device: Device = Device.auto
    """cpu (gloo), cuda (NCCL, one GPU a rank), or auto: cuda where there is one for every rank."""
    threads_per_rank: int | None = None
    """CPU threads of a rank; empty = the machine's cores / ranks_per_node, at least 1."""
    timeout_s: float = 600.0
    """Seconds after which a collective that some rank never joined is an error."""
    racks: list[str] = field(default_factory=list)
    """Failure domain of each node (its rack, switch or power feed), in the order of the nodes, so
    that checkpoint.snapshot.parity does not protect a node by its neighbours; under torchrun one
    label is this machine's, as ${oc.env:RACK}. Empty = nodes fail one by one."""
    address: str | None = None
    """torchrun: HOST:PORT of the rendezvous (needed for nodes > 1). ray: address of a running
    cluster; empty = the one in reach (RAY_ADDRESS), else a local one."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"launch.nodes={self.nodes}: must be at least 1")
        for name in ("ranks_per_node", "threads_per_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"launch.{name}={value}: must be at least 1, or empty")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"launch.timeout_s={self.timeout_s}: must be finite, above 0")
        if self.emulate_nodes and (self.launcher is not Launcher.local or not self.ranks_per_node):
            raise ValueError(
                "launch.emulate_nodes=true: plays nodes on one machine; it needs launch=local and "
                "launch.ranks_per_node"
            )
        if self.nodes > 1 and self.launcher is Launcher.local and not self.emulate_nodes:
            raise ValueError(
                f"launch.nodes={self.nodes}: launch=local starts ranks on this machine only; "
                "use launch=torchrun on every node, launch=ray, or launch.emulate_nodes=true to "
                "play nodes here"
            )


@dataclass(kw_only=True)
class ProfileConfig:
    """A torch.profiler trace of a window of steps."""

    start: int = 10
    """First step traced."""
    steps: int = 0
    """Steps traced; 0 = none. Rank 0 writes run.dir/profile/*.json for chrome://tracing."""

    def __post_init__(self) -> None:
        for name in ("start", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"monitor.profile.{name}={getattr(self, name)}: must be 0 or more")


@dataclass(kw_only=True)
class SampleConfig:
    """Text written by the model while it trains."""

    tokens: int = 0
    """Length of a sample, in tokens; 0 = none."""
    prompt: str = "\n"
    """Text that the sample continues."""
    every: int = 0
    """Steps between samples; 0 = only after the last step."""
    temperature: float = 0.8
    """Divides the logits; 0 = always the likeliest token."""

    def __post_init__(self) -> None:
        for name in ("tokens", "every", "temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"monitor.sample.{name}={getattr(self, name)}: must be finite, 0 or more"
                )


@dataclass(kw_only=True)
class MonitorConfig:
    """What a run shows."""

    tensorboard: bool = True
    """Write run.dir/tensorboard."""
    progress: bool = True
    """Show a live progress bar where the output is a terminal, a line every log_every steps
    elsewhere."""
    log_every: int = 10
    """Steps between log lines when the output is not a terminal."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Trace a window of steps."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Sample text from the model."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"monitor.log_every={self.log_every}: must be at least 1")


@dataclass(kw_only=True)
class VerifyConfig:
    """`phalanx verify`: the layout against one process."""

    steps: int = 3
    """Steps compared; a checkpoint is taken after half of them (at least one)."""
    dtype: Precision = Precision.fp32
    """Number format of both runs: fp32 or fp64."""
    tolerance: float | None = None
    """Largest relative error allowed; empty = 1e-5 in fp32, 1e-12 in fp64 (see docs/parallelism.md
    for the reason)."""
    resume_in: dict[str, int] = field(default_factory=dict)
    """Parallel degrees of the layout that the saved run is resumed in, as {tp: 2, dp_shard: 2};
    empty = one process."""
    inject: Defect = Defect.none
    """Plant a defect in the layout's run; verify must then fail and name it."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"verify.steps={self.steps}: at least 2, to resume between them")
        if self.dtype is Precision.bf16:
            raise ValueError("verify.dtype=bf16: proves nothing; choose fp32 or fp64")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise ValueError(
                f"verify.tolerance={self.tolerance}: must be finite, 0 or more; or empty"
            )


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run writes."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long and how much."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpora and tokenizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Pipeline schedule."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """Sharding across data-parallel ranks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How ranks are started."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What the run shows."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """`phalanx verify`."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """`phalanx bench`."""

    def __post_init__(self) -> None:
        self._check_tensor_parallel()
        self.pipeline.check_stages(self.parallel.pp, self.model.num_layers)
        if self.pipeline.post_validation:
            if self.parallel.pp == 1:
                raise ValueError(
                    "pipeline.post_validation=true: parallel.pp=1 has no pipeline to wait for; "
                    "set it to false, or parallel.pp to 2 or more"
                )
            self.optim.check_undoable()
        if self.training.eval_batches and not self.data.eval_fraction:
            raise ValueError(
                f"training.eval_batches={self.training.eval_batches}: data.eval_fraction=0 holds "
                "nothing out to evaluate on; set training.eval_batches=0, or a fraction"
            )
        profile = self.monitor.profile
        if profile.steps > 0 and profile.start >= self.training.steps:
            raise ValueError(
                f"monitor.profile.start={profile.start}: the run ends before, with "
                f"training.steps={self.training.steps} (counted from 0); use an earlier start"
            )

    def _check_tensor_parallel(self) -> None:
        tp = self.parallel.tp
        for key, size in (
            ("model.num_heads", self.model.num_heads),
            ("model.num_kv_heads", self.model.kv_heads),
            ("model.ffn_dim", self.model.ffn_dim),
            ("model.vocab_size", self.model.vocab_size),
            ("training.seq_len", self.training.seq_len),
        ):
            if size % tp:
                raise ValueError(f"parallel.tp={tp}: does not divide {key}={size}")
        heads = self.model.num_heads * self.model.size_of_head
        for name, columns in (("attention.wo", heads), ("feed_forward.w2", self.model.ffn_dim)):
            shape = (self.model.dim, columns)
            check_column_cut(self.optim.name, f"{name}.weight", shape, parts=tp)

    def check_nodes(self, world_size: int, ranks_per_node: int) -> None:
        """Whether ZeRO's and the snapshots' settings fit `world_size` ranks of which so many share
        a node.

        Raises:
            ValueError: they do not fit.
        """
        degrees = self.parallel.sized(world_size)
        shards, tp = degrees["dp_shard"], degrees["tp"]
        self.zero.check_nodes(shards, data_ranks_per_node(shards, tp, ranks_per_node))
        nodes, racks = world_size // ranks_per_node, self.launch.racks
        if len(racks) not in (0, 1, nodes):
            raise ValueError(
                f"launch.racks={racks}: {len(racks)} labels for {nodes} nodes; give one for each, "
                "in order, or under torchrun this machine's alone"
            )
        snapshot = self.checkpoint.snapshot
        if snapshot.every:
            make_groups([""] * nodes, parity=snapshot.num_parity, group_size=snapshot.group_size)

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches that each data-parallel rank computes in a step.

        Raises:
            ValueError: the degrees, the batch or the schedule do not fit `world_size`.
        """
        degrees = self.parallel.sized(world_size)
        dp = degrees["dp_replicate"] * degrees["dp_shard"]
        size, micro = self.training.global_batch_size, self.training.microbatch_size
        if size % (dp * micro):
            raise ValueError(
                f"training.global_batch_size={size}: not divisible by {dp} data-parallel ranks x "
                f"training.microbatch_size={micro} = {dp * micro}"
            )
        count = size // (dp * micro)
        self.pipeline.check_microbatches(self.parallel.pp, count)
        return count
