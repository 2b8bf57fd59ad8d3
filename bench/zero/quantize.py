"""`phalanx bench quantize`: block quantization beside a copy of the same floats.

One rank, with the threads of the configured ones; on a GPU where launch.device has one. Throughputs
count bytes of the fp32 side. All take turns. How far off the values come back stands with them, so
that nobody times wrong codes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.rounds import ROUNDS, STEPS, rounds, synchronize
from phalanx.parallel.kernels.block_format import BlockFormat, Quantization
from phalanx.parallel.kernels.quantize import dequantize, dequantize_sum, quantize
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config

KINDS = (Quantization.int8, Quantization.int4, Quantization.fp8)
MEMCPY = "memcpy"
ROWS = 4
"""Rows that a sum adds up."""
NUMEL = {"cpu": 1 << 24, "cuda": 1 << 28}
"""About so many elements: too large for caches."""


@dataclass(frozen=True, kw_only=True)
class QuantizeTurns:
    """What one rank measured."""

    numel: int
    seconds: dict[str, list[float]]
    """Of one call, by what is called, a turn each."""
    errors: dict[str, float]
    """Of what comes back, relative to what was there (norms), by format."""


def bench(request: Request, *, numel: int | None = None) -> list[Figure]:
    """GB/s of each function and format beside a copy's, and errors of normal random numbers.

    Args:
        request: what is asked; its layout does not count, zero.block_size does.
        numel: about how many elements, where NUMEL's are too many.
    """
    launch = replace(request.config.launch, nodes=1, ranks_per_node=1, emulate_nodes=False)
    run = {"world_size": 1, "config": launch}
    (found,) = request.launch(partial(measure, numel=numel), request.config, **run)
    rates = {
        name: [4 * found.numel / seconds / 1e9 for seconds in turns]
        for name, turns in found.seconds.items()
    }
    copies = rates.pop(MEMCPY)
    figures = [
        compared(f"quantize.{name}", "GB/s", MEMCPY, ours, copies, less_is_better=False)
        for name, ours in rates.items()
    ]
    for kind, error in found.errors.items():
        figures.append(Figure(name=f"quantize.{kind}.error", value=error, unit="relative"))
    return figures


def measure(ranks: Ranks, config: Config, *, numel: int | None = None) -> QuantizeTurns:
    """Time calls in turn, backwards every second round."""
    steps = config.bench.steps or STEPS
    with process_group(ranks):
        unit = ROWS * config.zero.block_size
        numel = max((numel or NUMEL[ranks.device_type]) // unit, 1) * unit
        calls, errors = _calls(numel, config.zero.block_size, ranks.device)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for order in rounds(calls, config.bench.rounds or ROUNDS):
            for name in order:
                calls[name]()
                synchronize(ranks)
                begin = time.perf_counter()
                for _ in range(steps):
                    calls[name]()
                synchronize(ranks)
                seconds[name].append((time.perf_counter() - begin) / steps)
    return QuantizeTurns(numel=numel, seconds=seconds, errors=errors)


def _calls(
    numel: int, block: int, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What is timed, each called once before; and errors of what comes back, by format."""
    values = torch.randn(ROWS, numel // ROWS, device=device)
    out = torch.empty_like(values)
    residual, total = torch.zeros_like(values), torch.empty_like(values[0])
    calls: dict[str, Callable[[], Any]] = {MEMCPY: partial(out.copy_, values)}
    errors = {}
    for kind in KINDS:
        fmt = BlockFormat(kind, block)
        size = fmt.row_bytes(numel // ROWS)
        wire = torch.empty(ROWS, size, dtype=torch.uint8, device=device)
        calls |= {
            f"{kind.name}.quantize": partial(quantize, values, wire, fmt),
            f"{kind.name}.quantize_feedback": partial(quantize, values, wire, fmt, residual),
            f"{kind.name}.dequantize": partial(dequantize, wire, out, fmt),
            f"{kind.name}.dequantize_sum": partial(dequantize_sum, wire, total, fmt),
        }
        quantize(values, wire, fmt)
        dequantize(wire, out, fmt)
        errors[kind.name] = _error(out, values)
    for call in calls.values():
        call()
    return calls, errors


def _error(found: Tensor, values: Tensor) -> float:
    return float((found - values).norm() / values.norm())
