"""When checkpoints are written, where to, which are kept, and how snapshots are protected."""

import re
from dataclasses import dataclass, field

from phalanx.checkpoint.storage.config import StorageConfig


@dataclass(kw_only=True)
class SnapshotConfig:
    """Copies of the run's whole state in the nodes' host memory, which outlive the ranks."""

    every: int = 0
    """Steps between snapshots; 0 = only where a checkpoint is due. 1 is meant to be affordable."""
    parity: str = "none"
    """What is added so that lost nodes' snapshots can be rebuilt: none; xor (any one node of a
    group may be lost); rs(m) (any m of them; on a command line
    'checkpoint.snapshot.parity="rs(2)"'). Memory grows by m / (nodes of a group - m)."""
    group_size: int = 8
    """Most nodes of a group; the job's nodes are divided into groups of nearly equal size."""
    linger_s: float = 600.0
    """Seconds that a snapshot stays in memory when all its ranks have died without a word."""
    node_mtbf_h: float = 5000.0
    """Mean hours between failures of one node, for the survival probability that is shown."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.snapshot.every={self.every}: must be 0 or more")
        if self.group_size < 2:
            raise ValueError(
                f"checkpoint.snapshot.group_size={self.group_size}: must be at least 2"
            )
        if not 0 <= self.linger_s < float("inf"):
            raise ValueError(
                f"checkpoint.snapshot.linger_s={self.linger_s}: must be finite, 0 or more"
            )
        if not 0 < self.node_mtbf_h < float("inf"):
            raise ValueError(
                f"checkpoint.snapshot.node_mtbf_h={self.node_mtbf_h}: must be finite, above 0"
            )
        if self.num_parity >= self.group_size:
            raise ValueError(
                f"checkpoint.snapshot.parity={self.parity}: a group of "
                f"checkpoint.snapshot.group_size={self.group_size} nodes would hold nothing else; "
                f"use rs({self.group_size - 1}) or less, or larger groups"
            )

    @property
    def num_parity(self) -> int:
        """Nodes of a group that may be lost.

        Raises:
            ValueError: parity is none of its forms.
        """
        named = {"none": 0, "xor": 1}
        if self.parity in named:
            return named[self.parity]
        match = re.fullmatch(r"rs\(\s*([1-9]\d*)\s*\)", self.parity)
        if match is None:
            raise ValueError(
                f"checkpoint.snapshot.parity={self.parity}: must be none, xor, or rs(m) with the "
                "number of nodes that may be lost, as rs(2)"
            )
        return int(match[1])


@dataclass(kw_only=True)
class CheckpointConfig:
    """Durable checkpoints of parameters, optimizer states, data position, RNG and step."""

    dir: str = "${run.dir}/checkpoints"
    """Folder of the checkpoints, seen by all nodes; or a URL that fsspec knows, as s3://..."""
    every: int = 0
    """Steps between checkpoints; 0 = none but the last (see save_last)."""
    save_last: bool = True
    """Save after the last step, and when SIGTERM or SIGINT ends the run."""
    keep: int = 2
    """Newest checkpoints kept; 0 = all. Imported weights (step 0) are never deleted."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0 = none."""
    async_save: bool = True
    """Copy to host memory, then write in the background while training goes on."""
    resume: bool = True
    """Start from the newest complete checkpoint in dir or memory, where there is one."""
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    """Copies in host memory."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """The storage behind dir."""

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("checkpoint.dir=: must name a folder, or a URL as s3://bucket/folder")
        for name in ("every", "keep", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)}: must be 0 or more")
