"""`phalanx bench optim`: what an optimizer step costs, and what its states take.

One rank, matrices of one size, gradients made before. The optimizers take turns; bytes are those of
the tensors that are kept from step to step, so they are the same every time.
"""

import sys
import time
from statistics import median
from typing import Any

import torch
from torch import nn

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.optim.contenders import PEER, Contender, contenders, left_out
from phalanx.bench.rounds import ROUNDS, STEPS, rounds, synchronize
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config

SHAPE = (1024, 2048)
MATRICES = {"cpu": 4, "cuda": 256}
"""How many, by kind of device: more than caches hold."""


def bench(request: Request) -> list[Figure]:
    """Milliseconds a step of 100 million parameters, and bytes a parameter, beside torch's."""
    [found] = request.launch(measure, request.config, world_size=1, config=request.config.launch)
    for package in found["left_out"]:
        print(f"bench optim: {package} is not installed; left out", file=sys.stderr)
    figures = []
    for what, unit in (("ms_per_100m", "ms"), ("bytes_per_parameter", "bytes")):
        theirs = found[what][PEER]
        for name, ours in found[what].items():
            if name != PEER:
                title = f"optim.{what}.{name}"
                figures.append(compared(title, unit, PEER, ours, theirs, less_is_better=True))
    return figures


def measure(ranks: Ranks, config: Config) -> dict[str, Any]:
    """By contender: milliseconds of every round, and bytes a parameter; and who is left out."""
    torch.set_num_threads(ranks.threads)
    count = MATRICES[ranks.device_type]
    num_parameters = count * SHAPE[0] * SHAPE[1]
    running = {
        name: make(_parameters(count, ranks.device))
        for name, make in contenders(config.optim, ranks).items()
    }
    for contender in running.values():
        contender.step()  # makes states and scratch
    milliseconds: dict[str, list[float]] = {name: [] for name in running}
    for order in rounds(running, config.bench.rounds or ROUNDS):
        for name in order:
            seconds = _step_s(running[name], config.bench.steps or STEPS, ranks)
            milliseconds[name].append(seconds * 1000 * 1e8 / num_parameters)
    bytes_held = {
        name: sum(t.numel() * t.element_size() for t in contender.states()) / num_parameters
        for name, contender in running.items()
    }
    return {
        "ms_per_100m": milliseconds,
        "bytes_per_parameter": {name: [held] for name, held in bytes_held.items()},
        "left_out": left_out(),
    }


def _step_s(contender: Contender, steps: int, ranks: Ranks) -> float:
    """Median seconds of a step."""
    seconds = []
    for _ in range(steps):
        synchronize(ranks)
        begin = time.perf_counter()
        contender.step()
        synchronize(ranks)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def _parameters(count: int, device: torch.device) -> dict[str, nn.Parameter]:
    """Matrices and their gradients."""
    generator = torch.Generator(device).manual_seed(0)
    named = {}
    for number in range(count):
        values = torch.randn(2, *SHAPE, generator=generator, device=device)
        parameter = nn.Parameter(values[0] * 0.02)
        parameter.grad = values[1] * 1e-3
        named[f"matrix{number}"] = parameter
    return named
