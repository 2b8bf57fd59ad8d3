"""Which rank keeps which box of a snapshot: each box once, as evenly as the layout allows.

Data-parallel replicas hold equal copies. Of those, the rank that has least to keep so far keeps it,
large boxes first (ByteCheckpoint, section 4.1: worst-fit), so that nothing is copied twice and no
node has more to protect than another.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from phalanx.checkpoint.boxes import ITEM_BYTES, Box, TensorInfo
from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.format.coverage import uncovered_by
from phalanx.checkpoint.format.table import PartTable, lay_out
from phalanx.checkpoint.peers import Peers

RankBoxes = dict[str, tuple[TensorInfo, Box]]
"""The box that a rank has of each tensor."""


def held_boxes(chunks: Mapping[str, Chunk]) -> RankBoxes:
    """The chunks as boxes."""
    return {name: (chunk.info, chunk.box) for name, chunk in chunks.items()}


def share(chunks: Mapping[str, Chunk], *, peers: Peers) -> list[PartTable]:
    """The part of every rank, by rank; collective, the same answer on each.

    Raises:
        CheckpointError: on every rank, where one holds what cannot be saved.
        ValueError: ranks hold tensors of one name that differ in shape or type, or together not all
            of one, or some of it twice: what would be saved could not be loaded.
    """
    tables = assign(peers.agree("look at what is to be saved", lambda: held_boxes(chunks)))
    reason = uncovered_by(tables)
    if reason is not None:
        raise ValueError(f"what the ranks hold cannot be saved: {reason}")
    return tables


def assign(held: Sequence[RankBoxes]) -> list[PartTable]:
    """The part of every rank that holds `held[rank]`.

    Raises:
        ValueError: as `share`.
    """
    owners: dict[tuple[str, Box], list[int]] = defaultdict(list)
    infos: dict[str, TensorInfo] = {}
    for rank, boxes in enumerate(held):
        for name, (info, box) in boxes.items():
            if infos.setdefault(name, info) != info:
                raise ValueError(
                    f"{name}: rank {rank} holds {info.dtype} {list(info.shape)}, another rank "
                    f"{infos[name].dtype} {list(infos[name].shape)}"
                )
            owners[name, box].append(rank)
    filled = [0] * len(held)
    mine: list[dict[str, list[tuple[TensorInfo, Box]]]] = [defaultdict(list) for _ in held]

    def order(item: tuple[tuple[str, Box], list[int]]) -> tuple[bool, int, str, tuple[int, ...]]:
        (name, box), ranks = item
        return len(ranks) > 1, -_nbytes(infos[name], box), name, box.offsets

    for (name, box), ranks in sorted(owners.items(), key=order):
        rank = min(ranks, key=lambda rank: (filled[rank], rank))
        filled[rank] += _nbytes(infos[name], box)
        mine[rank][name].append((infos[name], box))
    return [lay_out(boxes) for boxes in mine]


def _nbytes(info: TensorInfo, box: Box) -> int:
    return box.numel * ITEM_BYTES[info.dtype]
