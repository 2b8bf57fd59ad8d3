"""Writing one checkpoint: folder, data, manifest, then deleting what is too old.

Each phase ends with all ranks knowing whether all succeeded, so that a full disk under one rank is
an error on every rank and never a hang.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.folders import prepare_folder, prune
from phalanx.checkpoint.manifest import Fingerprint, new_manifest, write_manifest
from phalanx.checkpoint.peers import CheckpointError, Peers
from phalanx.checkpoint.planner import write_chunks


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a finished save did."""

    seconds: float
    """Time from the start of writing to the end of deleting."""
    bytes: int
    """Size of all data files."""
    deleted: list[str]
    """Names of the older folders that were deleted."""
    not_deleted: list[str]
    """Why older folders could not be deleted."""


def write_checkpoint(
    root: Path,
    step: int,
    staged: Mapping[str, Chunk] | Exception,
    meta: dict[str, Any],
    *,
    peers: Peers,
    config: CheckpointConfig,
    rejected: Collection[int] = (),
) -> Saved:
    """Write and commit the checkpoint of `step`, then prune `root`.

    Args:
        staged: this rank's chunks, or why it has none: then the save fails on every rank.
        rejected: steps whose checkpoints are known to be broken.

    Raises:
        CheckpointError: on every rank, where one failed; what stood before still counts.
    """
    start = time.perf_counter()

    def prepare() -> Path | None:
        if isinstance(staged, Exception):
            raise staged
        if peers.rank != 0:
            return None
        return prepare_folder(root, step, broken=step in rejected)

    folder = peers.agree("prepare the folder", prepare)[0]
    assert folder is not None
    assert not isinstance(staged, Exception)
    chunks = staged
    parts = peers.agree("write", lambda: write_chunks(folder, chunks, group=peers.group))
    files = {name: file for part in parts for name, file in part.items()}

    def commit() -> tuple[list[str], list[str]]:
        if peers.rank != 0:
            return [], []
        _check_all_here(root, folder, parts)
        write_manifest(
            folder, new_manifest(step=step, meta=meta, files=files, world_size=peers.size)
        )
        return prune(
            root,
            saved=step,
            keep=config.keep,
            keep_every=config.keep_every,
            rejected=rejected,
        )

    deleted, not_deleted = peers.agree("commit", commit)[0]
    return Saved(
        seconds=time.perf_counter() - start,
        bytes=sum(file.size for file in files.values()),
        deleted=deleted,
        not_deleted=not_deleted,
    )


def _check_all_here(root: Path, folder: Path, parts: Sequence[Mapping[str, Fingerprint]]) -> None:
    """Look for every rank's files: a disk of each node's own would hold only some of them.

    Raises:
        CheckpointError: one is not here, or not whole.
    """
    for rank, files in enumerate(parts):
        for name, file in files.items():
            try:
                size = (folder / name).stat().st_size
            except FileNotFoundError:
                raise CheckpointError(
                    f"checkpoint.dir={root}: not shared by all nodes: rank {rank}'s file {name} "
                    "is not here; use a folder that every node sees"
                ) from None
            if size != file.size:
                raise CheckpointError(
                    f"checkpoint.dir={root}: rank {rank}'s file {name} has {size} bytes here "
                    f"instead of {file.size}; use a folder that every node sees"
                )
