"""What a user may ask of the pipeline."""

from dataclasses import dataclass

SCHEDULES = ("gpipe", "1f1b", "interleaved")
"""Schedules that run in this version, by the field's names."""


@dataclass(kw_only=True)
class PipelineConfig:
    """Schedule and stages; used when parallel.pp > 1."""

    schedule: str = "1f1b"
    """gpipe, 1f1b or interleaved (interleaved 1F1B, with stages_per_rank chunks a rank)."""
    stages_per_rank: int | None = None
    """Model chunks that each pipeline rank holds; empty = 2 for interleaved, 1 for the others."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"pipeline.schedule={self.schedule}: unknown; choose one of {', '.join(SCHEDULES)}"
            )
        if self.schedule == "interleaved":
            if self.stages_per_rank is not None and self.stages_per_rank < 2:
                raise ValueError(
                    f"pipeline.stages_per_rank={self.stages_per_rank}: the interleaved schedule "
                    "needs at least 2; leave it empty for 2, or use pipeline.schedule=1f1b"
                )
        elif self.stages_per_rank not in (None, 1):
            raise ValueError(
                f"pipeline.stages_per_rank={self.stages_per_rank}: {self.schedule} runs one stage "
                "a rank; use 1, or pipeline.schedule=interleaved"
            )

    @property
    def chunks(self) -> int:
        """Stages per rank, the default filled in."""
        return self.stages_per_rank or (2 if self.schedule == "interleaved" else 1)
