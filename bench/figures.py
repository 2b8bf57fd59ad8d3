"""The one form in which every benchmark reports: a table, and figures as JSON."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import psutil
import torch

from phalanx.train.config import Config


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a benchmark is asked to measure."""

    config: Config
    world_size: int
    """Ranks of the configured layout."""
    launch: Callable[..., list[Any]]
    """phalanx.launch.ranks.start.launch."""
    arguments: list[str]
    """The command line that composes `config` again in a new process."""
    cpu: str
    """Name of this machine's processor."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number, beside a peer's where there is one. A ratio over 1 is better than
    the peer, whatever the unit."""

    name: str
    value: float
    unit: str
    low: float | None = None
    """Smallest value over rounds."""
    high: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    """Median over rounds of the two sides' ratio within a round."""
    ratio_min: float | None = None
    ratio_max: float | None = None


def compared(
    name: str, unit: str, peer: str, ours: list[float], theirs: list[float], *, less_is_better: bool
) -> Figure:
    """A figure from both sides' values, round by round."""
    pairs = zip(ours, theirs, strict=True)
    ratios = [(t / o if less_is_better else o / t) for o, t in pairs]
    return Figure(
        name=name,
        value=median(ours),
        unit=unit,
        low=min(ours),
        high=max(ours),
        peer=peer,
        peer_value=median(theirs),
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def report(figures: list[Figure], *, cpu: str) -> dict[str, Any]:
    """Machine and figures as plain values, for --json."""
    return {"machine": machine(cpu), "figures": [asdict(figure) for figure in figures]}


def machine(cpu: str) -> dict[str, Any]:
    """What the figures were measured on."""
    gpus = torch.cuda.device_count()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name(0) if gpus else None,
        "gpus": gpus,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(figures: list[Figure]) -> str:
    """For the terminal."""
    lines = []
    width = max((len(figure.name) for figure in figures), default=0)
    units = max((len(figure.unit) for figure in figures), default=0)
    for f in figures:
        line = f"{f.name:{width}} {f.value:12,.4g} {f.unit:{units}}"
        if f.low is not None and f.high is not None:
            line += f" [{f.low:,.4g} to {f.high:,.4g}]"
        if f.peer is not None and f.peer_value is not None and f.ratio is not None:
            line += f"   {f.peer} {f.peer_value:,.4g}   ratio {f.ratio:.3f}"
            line += f" [{f.ratio_min:.3f} to {f.ratio_max:.3f}]"
        lines.append(line)
    return "\n".join(lines)
