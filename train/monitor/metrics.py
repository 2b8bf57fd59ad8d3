"""What a step was like: its record, the clock that splits its seconds, and metrics.jsonl.

`metrics.jsonl` has one line a step, in order, however often the run was killed and resumed.
Numbers are exact: see phalanx.fault.events for how they are spelled, NaN and infinities included.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from phalanx.fault.events import json_line, read_lines
from phalanx.parallel.comm_meter import Traffic

PARTS = ("data", "forward_backward", "comm_wait", "optimizer", "checkpoint")
"""What the seconds of a step are split into; what is left over went to none of them."""

HOST_PARTS = ("data", "checkpoint")
"""Parts whose work is the host's own, measured by the host's clock on every device."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks, as rank 0 knows it."""

    step: int
    """Number of the step, counted from 0 like its batch."""
    loss: float
    """Mean over the valid tokens of the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate that the step used."""
    tokens: int
    """Tokens of the global batch: its samples x training.seq_len."""
    seconds: float
    """Wall-clock time of the whole step."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part, as StepTimer.take gives them; NaN = not measurable on this device."""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    """What rank 0 sent, by kind; NaN = cannot be counted."""
    pipeline: Mapping[str, float] = field(default_factory=dict)
    """Figures of PipelineWatch.measured; empty = no prediction yet."""
    snapshot: Mapping[str, float] = field(default_factory=dict)
    """Figures of phalanx.checkpoint.snapshot.monitoring.Monitor.take; empty = no snapshot yet."""


def traffic_figures(traffic: Mapping[str, Traffic]) -> dict[str, float]:
    """Bytes by kind and link, as `params_inside_bytes`, `params_between_bytes`, ..."""
    figures: dict[str, float] = {}
    for kind, sent in sorted(traffic.items()):
        figures[f"{kind}_inside_bytes"] = sent.inside
        figures[f"{kind}_between_bytes"] = sent.between
    return figures


class MetricsLog:
    """A JSON-lines file with one line a step, in order, through kills and resumes."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open `path` to go on at `first_step`.

        Lines of that step and later ones, which an earlier process wrote and this one will
        compute again, are dropped, and so is a line that a kill cut short. The file is replaced
        as a whole: a kill at any moment leaves the old one or the new one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = _truncate(path, first_step) if path.exists() else -1
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, fields: Mapping[str, Any]) -> None:
        """Append a step's line and hand it to the operating system.

        Raises:
            ValueError: `step` is not later than the line before.
        """
        if step <= self.last_step:
            raise ValueError(f"metrics of step {step}: the last line is of step {self.last_step}")
        self._file.write(json_line({"step": step, **fields}))
        self._file.flush()
        self.last_step = step

    def write_step(self, record: StepRecord) -> None:
        """Append a step's record, with its parts as `data_s`, `forward_backward_s`, ..., its
        traffic as `comm_params_inside_bytes`, ..., and the pipeline's figures as
        `pipeline_step_s_measured`, ... and the snapshots' as `snapshot_stalled_s`, ..."""
        traffic = traffic_figures(record.traffic)
        self.write(
            record.step,
            {
                "loss": record.loss,
                "grad_norm": record.grad_norm,
                "lr": record.lr,
                "tokens": record.tokens,
                "seconds": record.seconds,
                **{f"{part}_s": seconds for part, seconds in record.parts.items()},
                **{f"comm_{name}": value for name, value in traffic.items()},
                **{f"pipeline_{name}": value for name, value in record.pipeline.items()},
                **{f"snapshot_{name}": value for name, value in record.snapshot.items()},
            },
        )

    def sync(self) -> None:
        """Put the lines so far on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put the file on disk and close it."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def _truncate(path: Path, first_step: int) -> int:
    """Keep the whole lines of steps under `first_step`, each step once, in order; the last one."""
    temporary = path.with_name(path.name + ".tmp")
    last = -1
    with temporary.open("w", encoding="utf-8") as file:
        for line in read_lines(path):
            step = line.get("step")
            if isinstance(step, int) and last < step < first_step:
                file.write(json_line(line))
                last = step
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return last


class HasSeconds(Protocol):
    """Something that counts seconds up, such as phalanx.parallel.comm_timer.CommTimer."""

    @property
    def seconds(self) -> float:
        """Seconds counted so far; NaN where there is nothing to count."""
        ...


class StepTimer:
    """Splits a step's seconds into parts.

    On CPU each part is measured by the host's clock, less what its host waited in collectives
    meanwhile; those waits are the part "comm_wait", so that the parts do not overlap.

    On CUDA the host runs ahead of the device, so a part that enqueues work is measured between
    two CUDA events on the current stream (what the device waited for communication or for the
    host is in it, and "comm_wait" is NaN), and `take` synchronises, once a step. The parts in
    HOST_PARTS are the host's own time; the device may have been busy meanwhile, so on CUDA the
    parts may add up to more than the step.
    """

    def __init__(self, device: torch.device, *, comm: HasSeconds | None = None) -> None:
        """`comm`: what counts waits, entered by the caller; None = waits are not told apart."""
        self._cuda = device.type == "cuda"
        self._comm = comm
        self._open: str | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was measured since the last `take`: the next step begins now."""
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin = time.perf_counter()
        self._waited_before = self._waited()

    def _waited(self) -> float:
        return self._comm.seconds if self._comm is not None else float("nan")

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time inside to `part`, one of PARTS; a part may come several times a step.

        Raises:
            ValueError: `part` is unknown.
            RuntimeError: another part is being measured.
        """
        if part not in PARTS or part == "comm_wait":
            known = ", ".join(name for name in PARTS if name != "comm_wait")
            raise ValueError(f"StepTimer: unknown part {part!r}; choose one of {known}")
        if self._open is not None:
            raise RuntimeError(f"StepTimer: {part!r} begins inside {self._open!r}")
        self._open = part
        try:
            if self._cuda and part not in HOST_PARTS:
                with self._between_events(part):
                    yield
            else:
                with self._by_host_clock(part):
                    yield
        finally:
            self._open = None

    @contextmanager
    def _between_events(self, part: str) -> Iterator[None]:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((part, begin, end))

    @contextmanager
    def _by_host_clock(self, part: str) -> Iterator[None]:
        begin, waited = time.perf_counter(), self._waited()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            waited = self._waited() - waited
            if waited == waited:  # not NaN
                seconds -= waited
            self._host[part] = self._host.get(part, 0.0) + seconds

    def take(self) -> tuple[float, dict[str, float]]:
        """End the step: its seconds, and the seconds of every part; then `restart`.

        A part that did not come is 0; "comm_wait" is NaN where waits cannot be measured.
        """
        if self._events:
            torch.cuda.synchronize()
        parts = dict.fromkeys(PARTS, 0.0) | self._host
        for part, begin, end in self._events:
            parts[part] += begin.elapsed_time(end) / 1e3
        parts["comm_wait"] = self._waited() - self._waited_before
        seconds = time.perf_counter() - self._begin
        self.restart()
        return seconds, parts
