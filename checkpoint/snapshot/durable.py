"""Writing a committed snapshot to storage: from the holders' memory, complete or not there.

The holders write the files, each its node's; the first ranks of the nodes agree, phase by phase,
and rank 0 commits with the manifest. A full disk under one node is an error on every node and never
a hang, and what stood before still counts.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.format.folders import prepare_folder, prune
from phalanx.checkpoint.format.manifest import new_manifest, write_manifest
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.holder.of_node import NodeHolder
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.snapshot.request import Taken
from phalanx.checkpoint.storage.base import Storage


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a finished save did."""

    step: int
    seconds: float
    """Time from the start of writing to the end of deleting."""
    bytes: int
    """Size of all files."""
    deleted: list[str]
    """Names of the older folders that were deleted."""
    not_deleted: list[str]
    """Why older folders could not be deleted."""
    time: float
    """Unix seconds of the commit."""


def write_durable(
    taken: Taken,
    *,
    storage: Storage,
    node_holder: NodeHolder,
    peers: Peers,
    rejected: Callable[[], Collection[int]],
) -> Saved:
    """Write and commit the checkpoint of a pinned snapshot, then prune; on the nodes' first ranks.

    Args:
        peers: those ranks; they all call it.
        rejected: steps whose checkpoints are known to be broken.

    Raises:
        CheckpointError: on every rank, where one failed.
    """
    start = time.perf_counter()
    first = peers.rank == 0
    folder = peers.agree(
        "prepare the folder", lambda: prepare_folder(storage, taken.step) if first else ""
    )[0]
    answers = peers.agree(
        "write", lambda: _drain(taken, folder, storage=storage, node_holder=node_holder)
    )
    parts = [StoredPart.from_json(item) for answer in answers for item in answer["parts"]]
    parity = [StoredParity.from_json(item) for answer in answers for item in answer["parity"]]
    files: list[StoredPart | StoredParity] = [*parts, *parity]

    def commit() -> tuple[list[str], list[str]]:
        if not first:
            return [], []
        _check_all_here(storage, folder, files)
        manifest = new_manifest(
            step=taken.step,
            meta=taken.meta,
            parts=parts,
            parity=parity,
            groups=taken.epoch.groups if parity else (),
            num_parity=node_holder.num_parity if parity else 0,
            world_size=len(taken.epoch.tables),
        )
        write_manifest(storage, folder, manifest)
        return prune(
            storage,
            saved=taken.step,
            keep=node_holder.config.keep,
            keep_every=node_holder.config.keep_every,
            rejected=rejected(),
        )

    deleted, not_deleted = peers.agree("commit", commit)[0]
    return Saved(
        step=taken.step,
        seconds=time.perf_counter() - start,
        bytes=sum(item.size for item in files),
        deleted=deleted,
        not_deleted=not_deleted,
        time=time.time(),
    )


def _drain(
    taken: Taken, folder: str, *, storage: Storage, node_holder: NodeHolder
) -> dict[str, Any]:
    """Have this node's holder write its files."""
    with node_holder.connect() as client:
        return client.drain(
            taken.epoch.name,
            taken.slot,
            taken.step,
            url=str(storage.local.absolute()) if storage.local else node_holder.config.dir,
            folder=folder,
            storage=asdict(node_holder.config.storage),
        )


def _check_all_here(storage: Storage, folder: str, files: list[StoredPart | StoredParity]) -> None:
    """Look for every node's files: a disk of each node's own would hold only some of them.

    Raises:
        CheckpointError: one is not here, or not whole.
    """
    for item in files:
        try:
            size = storage.size(f"{folder}/{item.file}")
        except FileNotFoundError:
            raise CheckpointError(
                f"checkpoint.dir={storage.url}: not shared by all nodes: node {item.member}'s file "
                f"{item.file} is not here; use a folder that every node sees"
            ) from None
        if size != item.size:
            raise CheckpointError(
                f"checkpoint.dir={storage.url}: node {item.member}'s file {item.file} has {size} "
                f"bytes here instead of {item.size}; use a folder that every node sees"
            )
