"""When checkpoints are written and which are kept."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckpointConfig:
    """Durable checkpoints of parameters, optimizer states, data position, RNG and step."""

    dir: str = "${run.dir}/checkpoints"
    """Folder of the checkpoints, shared by all nodes."""
    every: int = 0
    """Steps between checkpoints; 0 = none but the last (see save_last)."""
    save_last: bool = True
    """Save after the last step, and when SIGTERM or SIGINT ends the run."""
    keep: int = 2
    """Newest checkpoints kept; 0 = all. Imported weights (step 0) are never deleted."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0 = none."""
    async_save: bool = True
    """Copy to host memory, then write in a background thread while training goes on."""
    resume: bool = True
    """Start from the newest complete checkpoint in dir, where there is one."""

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)}: must be 0 or more")
