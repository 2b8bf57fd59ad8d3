"""What a user may ask of `phalanx bench`."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EmulatedPipelineConfig:
    """`phalanx bench pipeline`: a pipeline whose operations sleep, apart from the run's layout."""

    ranks: int = 8
    """Pipeline ranks, all on this machine."""
    microbatches: int = 32
    """Microbatches of a step."""
    costs: list[float] = field(default_factory=lambda: [18513.0, 18086.0, 9331.0])
    """Time of F, B and W of one microbatch on a rank; only their ratios count. The default is
    what Qi et al. measured on their 1.5B model."""
    forward_ms: float = 24.0
    """Milliseconds that a rank's F sleeps; B and W follow from costs. Short ones drown in what
    the machine adds to each operation."""

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ValueError(f"bench.pipeline.ranks={self.ranks}: a pipeline needs at least 2")
        rounds = self.microbatches // self.ranks
        if rounds < 1 or self.microbatches % rounds:  # what torch's schedules take
            raise ValueError(
                f"bench.pipeline.microbatches={self.microbatches}: torch's schedules need at least "
                f"1 for each of bench.pipeline.ranks={self.ranks}, in rounds of one size; take "
                f"{max(rounds, 1) * self.ranks}"
            )
        if len(self.costs) != 3 or not all(0 < cost < float("inf") for cost in self.costs):
            raise ValueError(
                f"bench.pipeline.costs={self.costs}: give three positive numbers, [F, B, W]"
            )
        if not 0 < self.forward_ms < float("inf"):
            raise ValueError(
                f"bench.pipeline.forward_ms={self.forward_ms}: must be finite, above 0"
            )

    @property
    def seconds(self) -> tuple[float, float, float]:
        """F, B and W of all that a rank holds, for one microbatch."""
        f, b, w = (cost * self.forward_ms / self.costs[0] / 1000 for cost in self.costs)
        return f, b, w


@dataclass(kw_only=True)
class SlowNetworkConfig:
    """`phalanx bench slow_network`: nodes that only a slow network joins."""

    mbit: float | None = None
    """Megabits a second that may leave a node; empty = so many that `waiting` comes true."""
    waiting: float = 0.72
    """Share of a step that plain FSDP2 shall wait for the network. At the default, a quarter of
    the bytes (ZeRO++) makes 2.16 times the speed, what its authors measured."""
    loss_steps: int = 100
    """Steps after which losses are compared; 0 = not compared. The network is fast for those that
    are not timed."""

    def __post_init__(self) -> None:
        if self.mbit is not None and not 0.1 <= self.mbit < float("inf"):
            raise ValueError(
                f"bench.slow_network.mbit={self.mbit}: must be finite, at least 0.1, or empty"
            )
        if not 0 < self.waiting < 1:
            raise ValueError(
                f"bench.slow_network.waiting={self.waiting}: a share of a step, between 0 and 1"
            )
        if self.loss_steps < 0:
            raise ValueError(
                f"bench.slow_network.loss_steps={self.loss_steps}: a number of steps, or 0"
            )


@dataclass(kw_only=True)
class SnapshotBenchConfig:
    """`phalanx bench snapshot`: a state that is saved at every step, apart from the run's model."""

    ranks: int = 2
    """Ranks on this machine that hold the state together."""
    state_mb: int = 1024
    """MiB of parameters and their two moments in fp32, over all ranks."""
    step_s: float = 3.0
    """Seconds that a step sleeps or computes before its update. Where a step computes on the cores
    that copy too, what copying costs is a share of it, whoever copies: long ones show it as large
    as it is in training."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"bench.snapshot.ranks={self.ranks}: must be at least 1")
        if self.state_mb < 1:
            raise ValueError(f"bench.snapshot.state_mb={self.state_mb}: must be at least 1")
        if not 0 < self.step_s < float("inf"):
            raise ValueError(f"bench.snapshot.step_s={self.step_s}: must be finite, above 0")


@dataclass(kw_only=True)
class BenchConfig:
    """`phalanx bench`."""

    rounds: int | None = None
    """Times that each side runs, in turn; empty = 5, for pipeline 3."""
    steps: int | None = None
    """Steps of one turn; empty = 4, for pipeline and snapshot 3. `startup` always takes one."""
    pipeline: EmulatedPipelineConfig = field(default_factory=EmulatedPipelineConfig)
    """The emulated pipeline."""
    nodes: int = 2
    """Nodes that `zero` and `slow_network` play on this machine."""
    ranks_per_node: int = 2
    """Ranks of each of them, all data-parallel."""
    slow_network: SlowNetworkConfig = field(default_factory=SlowNetworkConfig)
    """The slow network."""
    snapshot: SnapshotBenchConfig = field(default_factory=SnapshotBenchConfig)
    """The state that is saved at every step."""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"bench.{name}={value}: must be at least 1, or empty")
        if not 2 <= self.nodes <= 64:
            raise ValueError(
                f"bench.nodes={self.nodes}: from 2, for something to travel between, to 64"
            )
        if self.ranks_per_node < 1:
            raise ValueError(f"bench.ranks_per_node={self.ranks_per_node}: must be at least 1")
