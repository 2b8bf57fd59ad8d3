"""Sums along a pipeline that no rank has to wait for: each rank knows those of the ranks before it.

What optimizer post-validation passes around instead of a collective over all ranks (Qi et al., Zero
Bubble Pipeline Parallelism, section 4). Each pipeline rank adds what its own data- and
tensor-parallel ranks hold, adds that to what came from the rank before, and passes it on. The last
rank has the whole and sends it to each of the others.

It sends to each, not along the chain: a rank in the middle would pass the whole on only when it
comes to look at it, and in a V placement ranks before it look earlier.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.parallel.exact_sum import bins_of, total
from phalanx.parallel.mesh import Mesh


class PrefixSums:
    """This rank's end of it, for one set of numbers at a time.

    The small tensors go over gloo and a process group of their own, so that they neither wait for
    the device nor meet the pipeline's activations.
    """

    def __init__(self, mesh: Mesh, *, timeout: timedelta) -> None:
        """Make the groups; collective over all ranks."""
        self._device = torch.device(mesh.device_type)
        self._rank, self._last = mesh.rank("pp"), mesh.size("pp") - 1
        self._stage: dist.ProcessGroup | None = None
        stage = mesh.world["dp_replicate", "dp_shard", "cp", "tp"]
        if stage.size() > 1:
            self._stage = stage._flatten("stage").get_group()
        # Its own ranks alone make it: where NCCL's communicator is bound to a device, new_group has
        # all others split that one, with which those of a gloo group never join in.
        self._pipeline = dist.new_group(
            dist.get_process_group_ranks(mesh.group("pp")),
            timeout=timeout,
            backend="gloo",
            use_local_synchronization=True,
            group_desc="post-validation",
        )
        self._meter = mesh.meter
        self._members = dist.get_process_group_ranks(self._pipeline)
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self._whole: tuple[dist.Work | None, Tensor] | None = None

    @property
    def is_last(self) -> bool:
        """Whether this rank's prefix is the whole."""
        return self._rank == self._last

    def prefix(self, values: list[float | Tensor]) -> list[float]:
        """Each value, or all elements of it, summed over the ranks up to this pipeline rank; waits
        for those.

        Every rank calls it once, then `whole` once, then `prefix` again. The sums are the same on
        all ranks of one place in the pipeline, and exact up to one rounding to fp64: the whole has
        the bits that a sum over all ranks at once has.
        """
        assert self._whole is None, "the sums before were not asked for"
        mine = torch.stack([bins_of(torch.as_tensor(v, device=self._device)) for v in values])
        if self._stage is not None:
            ranks = dist.get_process_group_ranks(self._stage)
            self._meter.all_reduced("control", ranks, mine.nbytes)
            dist.all_reduce(mine, group=self._stage)
        sums = mine.cpu()
        if self._rank > 0:
            before = torch.empty_like(sums)
            dist.recv(before, group=self._pipeline, group_src=self._rank - 1)
            sums = before + sums
        for work, _ in self._sending:  # of the step before, received long since
            work.wait()
        receivers = range(self._last) if self.is_last else [self._rank + 1]
        self._sending = [(self._send(sums, receiver), sums) for receiver in receivers]
        if self.is_last:
            self._whole = None, sums
        else:
            whole = torch.empty_like(sums)
            self._whole = dist.irecv(whole, group=self._pipeline, group_src=self._last), whole
        return [total(bins) for bins in sums]

    def whole(self) -> list[float]:
        """The sums over all ranks; waits for the last pipeline rank."""
        assert self._whole is not None, "no sums under way"
        (work, sums), self._whole = self._whole, None
        if work is not None:
            work.wait()
        return [total(bins) for bins in sums]

    def _send(self, sums: Tensor, receiver: int) -> dist.Work:
        self._meter.sent("control", self._members[receiver], sums.nbytes)
        work = dist.isend(sums, group=self._pipeline, group_dst=receiver)
        assert work is not None
        return work
