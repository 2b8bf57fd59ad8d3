"""Loading into any layout: stored boxes intersected with the boxes that each rank holds.

Every box is read once in the job, whole, and verified; then the pieces of it go to the ranks that
need them, while the next boxes are being read (ByteCheckpoint: read once, then forward).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xxhash

from phalanx.checkpoint.boxes import Box
from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.load.fit import misfit
from phalanx.checkpoint.load.loading import Loading, Moved
from phalanx.checkpoint.load.reads import locate, needed, plan_reads, stored_tensors
from phalanx.checkpoint.load.sources import Source
from phalanx.checkpoint.peers import Peers

ROUND_BYTES = 64 << 20
"""Most bytes that a rank reads in a round, unless one box is larger; two rounds are in memory."""


@dataclass(frozen=True)
class Want:
    """What one rank needs, as it tells the others."""

    boxes: dict[str, Box]
    numbers: list[int]
    """Of the stored boxes that hold something of them."""
    fingerprint: str
    """Of all that is stored, as the rank sees it."""


def load(
    source: Source,
    chunks: Mapping[str, Chunk],
    *,
    peers: Peers,
    on_bytes: Callable[[int], None] | None = None,
) -> Moved:
    """Fill the chunks' tensors in place; all ranks of `peers` call it, each with its own chunks.

    Floating-point types are converted. Where it fails, tensors may be filled in part.

    Args:
        on_bytes: called in this thread with the size of each box that this rank has read.

    Returns:
        What this rank moved.

    Raises:
        CheckpointError: on every rank, where one of them failed: a name is not stored, or not all
            of its box; types do not convert; a box is damaged (named) or cannot be read.
    """
    wants = peers.agree("plan the loading", lambda: _want(source, chunks))
    if len({want.fingerprint for want in wants}) > 1:
        raise CheckpointError("plan the loading: the ranks see different checkpoints")
    rounds = plan_reads(
        locate(source.parts()),
        [want.numbers for want in wants],
        near=source.near,
        round_bytes=ROUND_BYTES,
    )
    loading = Loading(source, chunks, peers=peers, boxes=[want.boxes for want in wants])
    moved = loading.run(rounds, on_bytes or (lambda nbytes: None))
    peers.agree("load", loading.raise_error)
    return moved


def _want(source: Source, chunks: Mapping[str, Chunk]) -> Want:
    parts = source.parts()
    wanted = {name: (chunk.size, chunk.local.dtype) for name, chunk in chunks.items()}
    problem = misfit(stored_tensors(parts), wanted)
    if problem is not None:
        raise ValueError(problem)
    boxes = {name: chunk.box for name, chunk in chunks.items()}
    seen = [(table.to_json(), list(source.near(part))) for part, table in enumerate(parts)]
    return Want(
        boxes=boxes,
        numbers=needed(locate(parts), boxes),
        fingerprint=xxhash.xxh3_64_hexdigest(json.dumps(seen).encode()),
    )
