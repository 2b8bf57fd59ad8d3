"""What a pipeline's operations really take: seconds, memory held, and messages between ranks.

A recorder stands around each operation of one rank for some steps. What counts is the median over
steps and microbatches, without the first step, which warms up compilers, allocators and
connections.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.simulate import Costs, Memory, Timeline

Times = dict[Op, tuple[float, float]]
"""Begin and end of operations, in seconds of this process's clock."""


class OpRecorder:
    """Put it in PipelineExecutor.recorder, and call `end_step` after every step.

    On CUDA an operation is measured between two events on the current stream, on CPU by the host's
    clock. What its memory delta counts is everything allocated meanwhile and not freed, whoever
    holds it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base: tuple[torch.cuda.Event, float] | None = None
        self._events: dict[Op, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._times: Times = {}
        self._deltas: dict[Op, int] = {}
        self.warming_up = True
        """Whether the first step has not ended."""
        self.steps: list[Times] = []
        """Of every step after it."""
        self.deltas: list[dict[Op, int]] = []
        """Bytes that each step's operations added; empty where nobody counts them."""

    @contextmanager
    def __call__(self, op: Op) -> Iterator[None]:
        """Around one operation's computing."""
        before = allocated_bytes(self._device)
        if self._device.type == "cuda":
            if self._base is None:
                torch.cuda.synchronize(self._device)
                self._base = _mark(), time.perf_counter()
            begin = _mark()
            yield
            self._events[op] = begin, _mark()
        else:
            began = time.perf_counter()
            yield
            self._times[op] = began, time.perf_counter()
        after = allocated_bytes(self._device)
        if before is not None and after is not None:
            self._deltas[op] = after - before

    def end_step(self) -> None:
        """Keep what the step measured; of the first one nothing."""
        if self._events:
            assert self._base is not None
            torch.cuda.synchronize(self._device)
            event, host = self._base
            for op, pair in self._events.items():
                begin, end = (host + event.elapsed_time(mark) / 1e3 for mark in pair)
                self._times[op] = begin, end
        if not self.warming_up:
            self.steps.append(self._times)
            self.deltas.append(self._deltas)
        self.warming_up = False
        self._times, self._deltas, self._events, self._base = {}, {}, {}, None


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes that tensors of `device` take now; on CPU all that this process allocated.

    None where nobody counts: C libraries other than glibc 2.33 and later.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    )


@cache
def _mallinfo() -> Callable[[], Any] | None:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _MallInfo
    return function


@dataclass(frozen=True)
class StageProfile:
    """What one rank measured of one stage; seconds and bytes of a microbatch's operation."""

    f: float
    b: float
    """With a combined backward: of both."""
    w: float
    held: float | None
    """From F to B; None = not measured."""
    put_off: float | None
    """From B to W."""


@dataclass(frozen=True)
class RankProfile:
    """What one rank measured."""

    stages: Mapping[int, StageProfile]
    hop: float | None
    """Seconds of a message to the next rank; None for the last one."""
    clock: float | None
    """What the next rank's clock shows more than this one's; None for the last one."""
    last_step: Times = field(default_factory=dict)


def stage_profiles(recorder: OpRecorder, *, boundary_bytes: int) -> dict[int, StageProfile]:
    """Medians of what a recorder saw, by stage.

    `boundary_bytes`: size of a stage's input, which is held from F to B though no operation
    allocates it.
    """
    seconds: dict[tuple[int, Kind], list[float]] = {}
    for times in recorder.steps:
        for op, (begin, end) in times.items():
            seconds.setdefault((op.stage, op.kind), []).append(end - begin)
    found = {}
    for stage in sorted({stage for stage, _ in seconds}):
        f, b, w, both = (median(seconds.get((stage, kind), [0.0])) for kind in Kind)
        held, put_off = (_delta(recorder, stage, kind) for kind in (Kind.F, Kind.W))
        splits = (stage, Kind.W) in seconds
        if held is not None:
            held += boundary_bytes if stage else 0
            put_off = max(0.0, -put_off) if splits and put_off is not None else 0.0
        found[stage] = StageProfile(f, b if splits else both, w, held, put_off)
    return found


def _delta(recorder: OpRecorder, stage: int, kind: Kind) -> float | None:
    """Median bytes; the first microbatch, whose gradients are made anew, only where it is alone."""
    found = [
        (op.microbatch, delta)
        for step in recorder.deltas
        for op, delta in step.items()
        if (op.stage, op.kind) == (stage, kind)
    ]
    later = [delta for microbatch, delta in found if microbatch > 0]
    deltas = later or [delta for _, delta in found]
    return median(deltas) if deltas else None


def measure_hops(
    group: dist.ProcessGroup, boundary: Tensor, device: torch.device, *, rounds: int = 20
) -> tuple[float | None, float | None]:
    """Send a message like `boundary` to the next rank and back; collective over `group`.

    Returns:
        Seconds of a message, and the difference of the clocks, as RankProfile has them. The clocks
        are compared in the quickest round, as NTP does it.
    """
    rank, size = group.rank(), group.size()
    message = torch.zeros(boundary.shape, dtype=boundary.dtype, device=device)
    result: tuple[float | None, float | None] = None, None
    for lower in range(size - 1):
        if rank == lower:
            result = _ping(group, lower + 1, message, rounds)
        elif rank == lower + 1:
            _answer(group, lower, message, rounds)
    return result


def _ping(group: dist.ProcessGroup, peer: int, message: Tensor, rounds: int) -> tuple[float, float]:
    marks = []
    for _ in range(rounds):
        begin = time.perf_counter()
        dist.send(message, group=group, group_dst=peer)
        dist.recv(message, group=group, group_src=peer)
        _wait(message)
        marks.append((begin, time.perf_counter()))
    theirs = torch.empty(rounds, 2, dtype=torch.float64, device=message.device)
    dist.recv(theirs, group=group, group_src=peer)
    trips, clocks = [], []
    for (begin, end), (received, answered) in zip(marks, theirs.tolist(), strict=True):
        trips.append((end - begin) - (answered - received))
        clocks.append(((received - begin) + (answered - end)) / 2)
    quickest = min(range(rounds), key=lambda i: trips[i])
    return max(0.0, median(trips) / 2), clocks[quickest]


def _answer(group: dist.ProcessGroup, peer: int, message: Tensor, rounds: int) -> None:
    marks = []
    for _ in range(rounds):
        dist.recv(message, group=group, group_src=peer)
        _wait(message)
        received = time.perf_counter()
        marks.append((received, time.perf_counter()))
        dist.send(message, group=group, group_dst=peer)
    mine = torch.tensor(marks, dtype=torch.float64).to(message.device)
    dist.send(mine, group=group, group_dst=peer)


def _wait(message: Tensor) -> None:
    if message.device.type == "cuda":
        torch.cuda.synchronize(message.device)


def merged(
    profiles: list[tuple[int, RankProfile]], num_stages: int, estimate: Memory
) -> tuple[Costs, Memory, bool]:
    """One pipeline out of what all ranks measured, each with its pipeline rank.

    Ranks that hold the same stage count with their mean time and their largest memory.

    Returns:
        Costs in seconds, memory in bytes, and whether memory was measured; else it is `estimate`.
    """
    f, b, w, held, put_off = [], [], [], [], []
    measured = True
    for stage in range(num_stages):
        found = [p.stages[stage] for _, p in profiles if stage in p.stages]
        assert found, f"nobody measured stage {stage}"
        f.append(sum(p.f for p in found) / len(found))
        b.append(sum(p.b for p in found) / len(found))
        w.append(sum(p.w for p in found) / len(found))
        measured &= all(p.held is not None for p in found)
        held.append(max(p.held or 0.0 for p in found))
        put_off.append(max(p.put_off or 0.0 for p in found))
    hops = [p.hop for _, p in profiles if p.hop is not None]
    costs = Costs(tuple(f), tuple(b), tuple(w), sum(hops) / len(hops))
    if not measured:
        return costs, estimate, False
    after = tuple(late - early for late, early in zip(put_off, held, strict=True))
    return costs, Memory(tuple(held), after, tuple(-late for late in put_off)), True


def measured_timeline(schedule: Schedule, ranks: list[RankProfile]) -> Timeline:
    """The last recorded step on one clock, from 0; `ranks` are one pipeline's, in order."""
    start, end, ahead = [], [], 0.0
    for order, rank in zip(schedule.orders, ranks, strict=True):
        start.append([rank.last_step[op][0] - ahead for op in order])
        end.append([rank.last_step[op][1] - ahead for op in order])
        ahead += rank.clock or 0.0
    first = min(times[0] for times in start)
    return Timeline(
        [[t - first for t in times] for times in start],
        [[t - first for t in times] for times in end],
    )
