"""Who a rank is, and the process group it joins.

Launchers find out (arguments, torchrun's environment, Ray's placement) and hand a `Ranks` down;
nothing below them reads the environment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One rank's place in a job."""

    rank: int
    """0 to world_size - 1."""
    world_size: int
    """Ranks of the job."""
    local_rank: int = 0
    """Place among the ranks of this machine; the index of its GPU."""
    local_world_size: int = 1
    """Ranks on this machine."""
    node_size: int | None = None
    """Ranks that count as one node; empty = those on this machine."""
    init_method: str = "env://"
    """Where the ranks meet, as torch.distributed.init_process_group takes it."""
    device_type: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """CPU threads for torch operators."""
    timeout_s: float = 600.0
    """Seconds until a collective that some rank never joined fails."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node's fast links; rank r belongs to node r // ranks_per_node."""
        return self.node_size or self.local_world_size

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        if self.device_type == "cuda":
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Join the job's default process group (gloo, and NCCL for CUDA tensors); leave it together.

    Raises:
        RuntimeError: a rank did not come within `ranks.timeout_s`.
    """
    torch.set_num_threads(ranks.threads)
    if ranks.device_type == "cuda":
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if ranks.device_type == "cuda" else "gloo",
        init_method=ranks.init_method,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=ranks.timeout_s),
        device_id=ranks.device if ranks.device_type == "cuda" else None,
    )
    yield
    # Neither while an error unwinds: both wait for ranks that may never come.
    # Rank 0 may hold the store, which others still need while they make groups.
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()
