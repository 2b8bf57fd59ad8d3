"""What a user may ask of the pipeline.

Torch-free, so that a wrong value is answered before anything heavy is imported.
"""

import os
import re
from dataclasses import dataclass, fields

from phalanx.parallel.pipeline.schedules.registry import (
    GENERATORS,
    chunks_of,
    fewest_microbatches,
)

NAMES = (*GENERATORS, "auto")
"""Values of pipeline.schedule other than files."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_PREFIXES = " KMGT"


@dataclass(kw_only=True)
class PipelineConfig:
    """Schedule and stages; used when parallel.pp > 1."""

    schedule: str = "1f1b"
    """gpipe, 1f1b, interleaved, zb_h1, zb_h2, zb_v, v_half, v_min or dualpipe_v; auto: searched
    for this model, and again for the costs that its first steps measure; or a schedule file (has
    a / or ends in .json)."""
    stages_per_rank: int | None = None
    """Stages that each pipeline rank holds; empty = the schedule's own: 2 for interleaved (which
    takes more) and the V schedules, 1 for the others; auto takes 1 or 2 (a V), the better."""
    layers_per_stage: list[int] | None = None
    """Transformer layers of each stage, in the model's order; empty = so that the slowest rank,
    embedding and head counted, is as fast as can be."""
    memory_limit: str | None = None
    """auto: most bytes of activations that a rank may hold, such as 8GiB, 512MiB or 2.5GB; empty =
    what 1F1B would hold."""
    profile_steps: int = 3
    """Steps, after a first one to warm up, in which operations are timed; auto then plans once
    more, and every schedule's predicted step time is reported beside the measured one. 0 = none."""
    post_validation: bool = False
    """Step the optimizer without waiting for the global gradient norm, and take the step back
    where clipping or a NaN turns out to have been due."""

    def __post_init__(self) -> None:
        if not self.is_file and self.schedule not in NAMES:
            raise ValueError(
                f"pipeline.schedule={self.schedule}: unknown; choose one of {', '.join(NAMES)}, "
                "or a schedule file (a path with a / in it, or one that ends in .json)"
            )
        self._check_stages_per_rank()
        for layers in self.layers_per_stage or ():
            if layers < 1:
                raise ValueError(
                    f"pipeline.layers_per_stage={self.layers_per_stage}: each stage holds at "
                    "least 1 layer"
                )
        if self.memory_limit is not None:
            parse_bytes("pipeline.memory_limit", self.memory_limit)
            if self.schedule != "auto":
                raise ValueError(
                    f"pipeline.memory_limit={self.memory_limit}: pipeline.schedule="
                    f"{self.schedule} has its order fixed; leave the limit empty, or use "
                    "pipeline.schedule=auto"
                )
        if self.profile_steps < 0:
            raise ValueError(f"pipeline.profile_steps={self.profile_steps}: must be 0 or more")

    def _check_stages_per_rank(self) -> None:
        chunks = self.stages_per_rank
        if chunks is None:
            return
        if self.is_file:
            raise ValueError(
                f"pipeline.stages_per_rank={chunks}: the schedule file {self.schedule} says it; "
                "leave it empty"
            )
        if self.schedule == "auto":
            wanted, fits = "1 or 2, or leave it empty for the better", chunks in (1, 2)
        elif GENERATORS[self.schedule].any_chunks:
            wanted, fits = "at least 2, or pipeline.schedule=1f1b", chunks >= 2
        else:
            own = chunks_of(self.schedule)
            wanted, fits = f"{own}, or pipeline.schedule=interleaved", chunks == own
        if not fits:
            raise ValueError(
                f"pipeline.stages_per_rank={chunks}: does not go with pipeline.schedule="
                f"{self.schedule}; use {wanted}"
            )

    def check_stages(self, pp: int, num_layers: int) -> None:
        """Whether `num_layers` layers can be cut as asked over `pp` ranks.

        What a schedule file or auto leaves open is checked when the schedule is there.

        Raises:
            ValueError: they cannot.
        """
        if pp == 1:
            return
        chunks = self.chunks or 1
        if pp * chunks > num_layers:
            raise ValueError(
                f"parallel.pp={pp} x {chunks} stages per rank = {pp * chunks} pipeline stages, "
                f"more than model.num_layers={num_layers} under pipeline.schedule={self.schedule}; "
                "use fewer stages"
            )
        given = self.layers_per_stage
        if given is None:
            return
        if sum(given) != num_layers:
            raise ValueError(
                f"pipeline.layers_per_stage={given}: {sum(given)} layers, but "
                f"model.num_layers={num_layers}"
            )
        is_open = self.schedule == "auto" and self.stages_per_rank is None
        fitting = [pp, 2 * pp] if is_open else [pp * chunks]
        if not self.is_file and len(given) not in fitting:
            raise ValueError(
                f"pipeline.layers_per_stage={given}: {len(given)} stages, but parallel.pp={pp} "
                f"under pipeline.schedule={self.schedule} has {' or '.join(map(str, fitting))}"
            )

    def check_microbatches(self, pp: int, count: int) -> None:
        """Whether the schedule can be made for `count` microbatches a rank.

        Raises:
            ValueError: it needs more.
        """
        if pp == 1 or self.is_file or self.schedule in ("auto", "gpipe"):
            return
        fewest = max(pp, fewest_microbatches(self.schedule, pp, self.chunks))
        if count < fewest:
            raise ValueError(
                f"pipeline.schedule={self.schedule}: {count} microbatches a rank, but at least "
                f"{fewest} are needed to fill parallel.pp={pp} ranks; raise "
                "training.global_batch_size, lower training.microbatch_size, or use "
                "pipeline.schedule=gpipe or auto"
            )

    def notes(self, pp: int, steps: int) -> list[str]:
        """Settings without an effect over `pp` ranks, in a run of `steps`."""
        if pp == 1:
            return [
                f"pipeline.{item.name}={getattr(self, item.name)}: no effect at parallel.pp=1"
                for item in fields(self)
                if getattr(self, item.name) != getattr(PipelineConfig(), item.name)
            ]
        if self.schedule == "auto" and self.profile_steps == 0:
            return [
                "pipeline.profile_steps=0: pipeline.schedule=auto keeps the schedule that it "
                "begins with, planned from estimated costs"
            ]
        if self.schedule == "auto" and steps <= self.profile_steps + 1:
            return [
                f"pipeline.profile_steps={self.profile_steps}: with training.steps={steps} the run "
                "ends before pipeline.schedule=auto can use what they measure"
            ]
        return []

    @property
    def is_file(self) -> bool:
        """Whether `schedule` is a path."""
        return os.sep in self.schedule or "/" in self.schedule or self.schedule.endswith(".json")

    @property
    def chunks(self) -> int | None:
        """Stages per rank, the default filled in; None where a file or auto decides it."""
        if self.stages_per_rank is not None or self.is_file or self.schedule == "auto":
            return self.stages_per_rank
        return chunks_of(self.schedule)

    @property
    def memory_limit_bytes(self) -> float | None:
        """`memory_limit` as a number."""
        if self.memory_limit is None:
            return None
        return parse_bytes("pipeline.memory_limit", self.memory_limit)


def parse_bytes(key: str, text: str) -> float:
    """Bytes out of 8GiB (1024s), 2.5GB (1000s) or a plain number.

    Raises:
        ValueError: the text is no size above 0; names `key`.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0.0
    if found is not None:
        prefix = found[2] or " "
        base = 1024 if prefix[1:] else 1000
        size = float(found[1]) * base ** _PREFIXES.index(prefix[0].upper())
    if not 0 < size < float("inf"):
        raise ValueError(f"{key}={text}: no size above 0; write it like 8GiB, 512MiB or 1000000")
    return size
