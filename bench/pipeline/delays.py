"""What a machine adds to emulated operations and to sends, measured before they are timed."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from phalanx.bench.pipeline import emulated
from phalanx.bench.pipeline.emulated import EmulatedStage, OpSeconds
from phalanx.parallel.pipeline.wgrad import WeightGradientStore
from phalanx.parallel.ranks import Ranks, process_group

REPEATS = 20
WARM_UP = 3
"""First operations and hops, not counted: they fill caches and connect."""


@dataclass(frozen=True)
class Delays:
    """What this machine adds to every emulated operation, in seconds."""

    f: float
    b: float
    w: float
    hop: float
    """From a send to the end of its receive on a neighbouring rank."""


def measure_delays(ranks: Ranks, seconds: tuple[float, float, float]) -> Delays:
    """`delays_now` on ranks of their own."""
    with process_group(ranks):
        return delays_now(ranks, seconds)


def delays_now(ranks: Ranks, seconds: tuple[float, float, float]) -> Delays:
    """Delays of operations and hops, all ranks at once as in a pipeline; collective.

    Medians of REPEATS, averaged over ranks: a moment's disturbance is not the machine's.
    Operations run as the executor runs them, but for the channels.
    """
    with no_collection():
        found = [_operation_delays(seconds) for _ in range(REPEATS + WARM_UP)][WARM_UP:]
        hop = _hop(ranks, REPEATS)
    delays = torch.tensor(
        [*(median(kind) for kind in zip(*found, strict=True)), hop], dtype=torch.float64
    )
    dist.all_reduce(delays)
    return Delays(*(delays / ranks.world_size).tolist())


def _operation_delays(seconds: tuple[float, float, float]) -> tuple[float, float, float]:
    """Seconds that F, B and W take beyond what they sleep."""
    store = WeightGradientStore()
    stage = EmulatedStage(OpSeconds(*seconds), store, first=False)
    x = torch.zeros(1, emulated.SEQ_LEN, emulated.WIDTH, requires_grad=True)
    begin = time.monotonic()
    y = stage(x)
    after_f = time.monotonic()
    with store.deferring():
        torch.autograd.backward(y, torch.ones_like(y))
    weights = store.take()
    after_b = time.monotonic()
    weights()
    after_w = time.monotonic()
    f, b, w = seconds
    return after_f - begin - f, after_b - after_f - b, after_w - after_b - w


def _hop(ranks: Ranks, repeats: int) -> float:
    """Half of a round trip between neighbours, who are asleep or waiting before it."""
    payload = torch.zeros(1, emulated.SEQ_LEN, emulated.WIDTH)
    other = ranks.rank ^ 1
    trips = []
    for _ in range(repeats + WARM_UP):
        dist.barrier()
        if other >= ranks.world_size:
            continue
        if ranks.rank % 2 == 0:
            time.sleep(0.005)  # the other waits by then
            begin = time.monotonic()
            dist.send(payload, other)
            dist.recv(payload, other)
            trips.append(time.monotonic() - begin)
        else:
            dist.recv(payload, other)
            dist.send(payload, other)
    measured = torch.zeros(2, dtype=torch.float64)
    if trips:
        measured += torch.tensor([median(trips[WARM_UP:]) / 2, 1.0], dtype=torch.float64)
    dist.all_reduce(measured)
    return float(measured[0] / measured[1])


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from stopping one rank, and with it all, amid a turn."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
