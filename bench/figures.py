"""The one form in which every benchmark reports: a table, and figures as JSON."""

import os
import platform
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import psutil
import torch


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number, beside a peer's where there is one. A ratio over 1 is better than
    the peer, whatever the unit."""

    name: str
    value: float
    unit: str
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
        peer=peer,
        peer_value=median(theirs),
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def report(figures: list[Figure]) -> dict[str, Any]:
    """Machine and figures as plain values, for --json."""
    return {"machine": machine(), "figures": [asdict(figure) for figure in figures]}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpus = torch.cuda.device_count()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name(0) if gpus else None,
        "gpus": gpus,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(figures: list[Figure]) -> str:
    """For the terminal."""
    lines = [f"{'figure':28} {'value':>14} {'unit':10} {'peer':>14} {'ratio':>7}   min to max"]
    for f in figures:
        line = f"{f.name:28} {f.value:14,.4g} {f.unit:10}"
        if f.peer_value is not None:
            line += f" {f.peer_value:14,.4g}"
        if f.ratio is not None:
            line += f" {f.ratio:7.3f}   {f.ratio_min:.3f} to {f.ratio_max:.3f}   vs {f.peer}"
        lines.append(line)
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
