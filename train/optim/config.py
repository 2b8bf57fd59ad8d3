"""The optimizer and its learning-rate schedule, as a user sets them."""

from dataclasses import dataclass, field
from enum import Enum


class OptimizerName(Enum):
    """Optimizers by name."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"
    adamw4bit = "adamw4bit"


class LrSchedule(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(kw_only=True)
class LrConfig:
    """Learning rate over the steps of a run."""

    schedule: LrSchedule = LrSchedule.cosine
    """constant; cosine, down to min_ratio; wsd: warmup, stable, then a linear decay."""
    peak: float = 3e-4
    """Highest learning rate, reached after warm-up."""
    warmup_steps: int = 100
    """Steps of linear rise from 0."""
    min_ratio: float = 0.1
    """Where cosine and wsd end, as a share of the peak."""
    decay_fraction: float = 0.1
    """Share of training.steps that wsd's decay takes."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < float("inf"):
            raise ValueError(f"optim.lr.peak={self.peak}: must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.lr.warmup_steps={self.warmup_steps}: must be 0 or more")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optim.lr.min_ratio={self.min_ratio}: must lie in [0, 1]")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"optim.lr.decay_fraction={self.decay_fraction}: must lie in [0, 1]")


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    name: OptimizerName = OptimizerName.adamw
    """adamw: moments in precision.params, 8 bytes a parameter in fp32. adamw8bit, adamw4bit:
    matrices' moments as codes of 8 or 4 bits with a scale for each block of up to 256 or 128
    elements of a row, about 2 bytes or 1.1 a parameter; slower on a CPU."""
    lr: LrConfig = field(default_factory=LrConfig)
    """Learning-rate schedule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down to it; 0 = never."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must lie in [0, 1)")
        for name in ("eps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be 0 or more")

    def check_undoable(self) -> None:
        """Whether a step can be taken back, as pipeline.post_validation needs it.

        Raises:
            ValueError: a step with these settings forgets what was before.
        """
        if self.name is not OptimizerName.adamw:
            raise ValueError(
                f"optim.name={self.name.name}: with pipeline.post_validation=true a step may have "
                "to be taken back, and rounding to codes forgets what was before; use "
                "optim.name=adamw, or pipeline.post_validation=false"
            )
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 0:
                raise ValueError(
                    f"optim.{name}=0: with pipeline.post_validation a step may have to be taken "
                    "back, which divides by it; use a value above 0, or post_validation=false"
                )
        if self.lr.peak * self.weight_decay >= 1:
            raise ValueError(
                f"optim.weight_decay={self.weight_decay}: with optim.lr.peak={self.lr.peak} a step "
                "leaves nothing of a weight, and pipeline.post_validation cannot take it back; "
                "their product must be below 1"
            )
