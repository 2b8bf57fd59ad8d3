"""The state and the steps of `phalanx bench snapshot`: what every side saves, and what it hides
behind.

The values are whole numbers that follow from tensor, place and number of updates, so that a
snapshot taken a moment too late, or of two moments, is found out.
"""

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from phalanx.bench.rounds import synchronize
from phalanx.parallel.local import local
from phalanx.parallel.ranks import Ranks

TRIPLES = 34
"""Parameters; with two moments each, some 100 tensors."""
COLUMNS = 1024
PERIOD = 4093
SLEEPING, COMPUTING = "sleeping", "computing"
KINDS = (SLEEPING, COMPUTING)
"""What a step does: sleeps, as a host that waits for its device, or multiplies matrices on the
rank's device (on a CPU, on the core that whoever copies needs too)."""
SIDE = {"cpu": 384, "cuda": 8192}
"""Of the square matrices that are multiplied."""
TRY, TRIES = 16, 10
"""Products that are timed together, and how often, to find what one takes undisturbed."""


class State:
    """Parameters and two moments of each in fp32, every one cut by rows over the ranks."""

    def __init__(self, mesh: DeviceMesh, *, num_bytes: int) -> None:
        """`num_bytes`: of all ranks together, to within one row a tensor and rank."""
        self._mesh = mesh
        self._rows = max(1, num_bytes // (3 * TRIPLES * COLUMNS * 4 * mesh.size()))
        self._names = [
            f"{kind}.{number}"
            for number in range(TRIPLES)
            for kind in ("weight", "first", "second")
        ]
        self.updates = 0
        """Steps that were taken."""
        self.tensors = self.blank()
        for place, tensor in enumerate(self.tensors.values()):
            local(tensor).copy_(self._values(place))

    @property
    def num_bytes(self) -> int:
        """Of all ranks together."""
        return len(self._names) * self._rows * COLUMNS * 4 * self._mesh.size()

    def blank(self) -> dict[str, DTensor]:
        """Tensors of the same form, of zeros."""
        return {
            name: DTensor.from_local(
                torch.zeros(self._rows, COLUMNS, device=self._mesh.device_type),
                self._mesh,
                [Shard(0)],
                run_check=False,
            )
            for name in self._names
        }

    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy every value to memory that is there."""
        for name, tensor in self.tensors.items():
            local(tensors[name]).copy_(local(tensor))
        if self._mesh.device_type == "cuda":
            torch.cuda.synchronize()

    def update(self) -> None:
        """Change every tensor in place, as an optimizer does."""
        for tensor in self.tensors.values():
            local(tensor).add_(1.0)
        self.updates += 1

    def wrong(self, tensors: Mapping[str, Tensor], *, updates: int) -> int:
        """How many tensors, over all ranks, are not what the state was after so many updates;
        collective."""
        count = 0
        for place, name in enumerate(self._names):
            expected = self._values(place).add_(float(updates))
            count += not torch.equal(local(tensors[name]), expected)
        found = torch.tensor(count)
        dist.all_reduce(found)
        return int(found)

    def _values(self, place: int) -> Tensor:
        """A tensor's local values before the first update."""
        first = 7 * place + 31 * self._mesh.get_local_rank()
        count = self._rows * COLUMNS
        values = torch.arange(first, first + count, device=self._mesh.device_type)
        return values.remainder_(PERIOD).float().view(self._rows, COLUMNS)


def make_work(ranks: Ranks, *, step_s: float) -> dict[str, Callable[[], None]]:
    """What a step does, by kind; each takes about `step_s` seconds where nothing disturbs it, and
    is the same work every time. Collective: all ranks measure at once, as they will work."""
    size = SIDE[ranks.device_type]
    factors = torch.randn(2, size, size, device=ranks.device)
    product = torch.empty(size, size, device=ranks.device)

    def multiply(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            torch.mm(factors[0], factors[1], out=product)
        synchronize(ranks)
        return time.perf_counter() - begin

    dist.barrier()
    quickest = torch.tensor([min(multiply(TRY) for _ in range(TRIES)) / TRY], dtype=torch.float64)
    dist.all_reduce(quickest, op=dist.ReduceOp.MAX)
    times = max(1, round(step_s / float(quickest)))

    def compute() -> None:
        multiply(times)

    return {SLEEPING: lambda: time.sleep(step_s), COMPUTING: compute}
