"""DualPipe-V: both directions of a V at once, each rank by turns in its first and second stage.

The half of DualPipe (DeepSeek-V3, 2412.19437, section 3.2.1) that needs one copy of the parameters:
Liu et al., "DualPipe could be better without the Dual". In the middle every rank pairs a forward
with a backward of its other stage, whose communication can overlap.
"""

from collections import deque

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule, v_placement


def dualpipe_v(p: int, num_microbatches: int) -> Schedule:
    """Rank i holds stages i and 2p - 1 - i.

    Its phases need 2p microbatches; with fewer it is the order for 2p without those too many.
    """
    placement = v_placement(p)
    longer = max(num_microbatches, 2 * p)
    orders = [
        [op for op in _order(rank, p, longer) if op.microbatch < num_microbatches]
        for rank in range(p)
    ]
    return Schedule.of("dualpipe_v", placement, num_microbatches, orders)


class _Rank:
    """An order that grows, each stage and kind taking its next microbatch."""

    def __init__(self) -> None:
        self.order: list[Op] = []
        self._next: dict[tuple[int, Kind], int] = {}
        self._weights: deque[Op] = deque()

    def add(self, stage: int, kind: Kind) -> None:
        counted = Kind.B if kind is Kind.BW else kind
        microbatch = self._next.get((stage, counted), 0)
        self._next[stage, counted] = microbatch + 1
        self.order.append(Op(stage, kind, microbatch))
        if kind is Kind.B:
            self._weights.append(Op(stage, Kind.W, microbatch))

    def add_weight(self) -> None:
        """Do the W that has waited longest."""
        self.order.append(self._weights.popleft())

    def finish(self) -> list[Op]:
        return [*self.order, *self._weights]


def _order(rank: int, p: int, num_microbatches: int) -> list[Op]:
    """One rank's phases: fill both stages, pair them, drain both with W put off into the gaps."""
    first, second = rank, 2 * p - 1 - rank
    behind = p - 1 - rank  # ranks between this one and the turn of the V
    result = _Rank()
    for _ in range(2 * behind):
        result.add(first, Kind.F)
    for _ in range(rank + 1):
        result.add(first, Kind.F)
        result.add(second, Kind.F)
    for _ in range(behind):
        result.add(second, Kind.B)
        result.add_weight()
        result.add(second, Kind.F)
    for _ in range(num_microbatches - 2 * p + rank + 1):
        result.add(first, Kind.F)
        result.add(second, Kind.BW)
        result.add(second, Kind.F)
        result.add(first, Kind.BW)
    for _ in range(behind):
        result.add(second, Kind.BW)
        result.add(second, Kind.F)
        result.add(first, Kind.BW)
    # From halfway through these on, B come alone; the last ranks' W fill the gaps that follow.
    for n in range(2 * (rank + 1)):
        stage = second if n % 2 == 0 else first
        result.add(stage, Kind.BW if n <= rank else Kind.B)
    for _ in range(behind):
        result.add_weight()
        result.add(first, Kind.B)
    return result.finish()
