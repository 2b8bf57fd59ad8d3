"""`phalanx bench wgrad`: weight gradients deferred by our store, beside torch's split of the
backward pass and beside a backward pass that is not split.

Real compute of the configured model, all but its first layer, on as many ranks as the layout has,
each by itself. The three take turns; memory is counted apart, and gradients are compared, so that
nobody times a wrong backward pass.
"""

import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.rounds import ROUNDS, STEPS, rounds, synchronize
from phalanx.bench.wgrad.live_memory import LiveMemory
from phalanx.bench.wgrad.ways import WAYS, Plain
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config

MICROBATCHES = 4
"""Microbatches that go through F and B before their W come."""
OURS, PEERS = "deferred", ("torch_split", "plain")


def bench(request: Request) -> list[Figure]:
    """Seconds a step, bytes alive, and the largest difference of a gradient.

    A step is MICROBATCHES times F and B, then as often W.
    """
    config = request.config
    run = {"world_size": request.world_size, "config": config.launch}
    found = request.launch(measure, config, **run)
    turns = {
        way: [
            max(seconds) for seconds in zip(*(rank["seconds"][way] for rank in found), strict=True)
        ]
        for way in WAYS
    }
    figures = [
        compared(f"wgrad.step_s.{peer}", "s", peer, turns[OURS], turns[peer], less_is_better=True)
        for peer in PEERS
    ]
    # A plain backward holds nothing between the two.
    for what, peer in (("held", "torch_split"), ("peak", "torch_split"), ("peak", "plain")):
        ours, theirs = (
            [float(median(rank["memory"][way][what] for rank in found))] for way in (OURS, peer)
        )
        figures.append(
            compared(f"wgrad.{what}.{peer}", "bytes", peer, ours, theirs, less_is_better=True)
        )
    for peer in PEERS:
        gap = max(rank["gaps"][peer] for rank in found)
        figures.append(Figure(name=f"wgrad.gradient_gap.{peer}", value=gap, unit="relative"))
    return figures


def measure(ranks: Ranks, config: Config) -> dict[str, Any]:
    """This rank's seconds a step by way and round, bytes by way, and gaps of gradients."""
    steps = config.bench.steps or STEPS
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with process_group(ranks):
        ways = {name: way(config, ranks) for name, way in WAYS.items()}
        for way in ways.values():
            run_step(way)
        gaps = {peer: gradient_gap(ways[OURS], ways[peer]) for peer in PEERS}
        memory = {name: measure_memory(way) for name, way in ways.items()}
        for order in rounds(ways, config.bench.rounds or ROUNDS):
            for name in order:
                dist.barrier()
                synchronize(ranks)
                begin = time.perf_counter()
                for _ in range(steps):
                    run_step(ways[name])
                synchronize(ranks)
                seconds[name].append((time.perf_counter() - begin) / steps)
    return {"seconds": seconds, "memory": memory, "gaps": gaps}


def run_step(way: Plain) -> None:
    """MICROBATCHES times F and B, then as often W; adds to the gradients."""
    weight_gradients = [way.input_gradient(*way.forward()) for _ in range(MICROBATCHES)]
    for weight_gradient in weight_gradients:
        weight_gradient()


def measure_memory(way: Plain) -> dict[str, int]:
    """Bytes that one microbatch holds between B and W, and at most while it goes through all three.

    Without weights and their gradients, which are there before.
    """
    with LiveMemory() as live:
        weight_gradient = way.input_gradient(*way.forward())
        held = live.alive()
        weight_gradient()
    return {"held": held, "peak": live.peak}


def gradient_gap(ours: Plain, theirs: Plain) -> float:
    """Largest difference of a parameter's gradients, relative to its largest entry.

    Raises:
        RuntimeError: a parameter has no gradient on one side.
    """
    gap = 0.0
    peers = dict(theirs.stage.named_parameters())
    for name, parameter in ours.stage.named_parameters():
        mine, other = parameter.grad, peers[name].grad
        if mine is None or other is None:
            raise RuntimeError(f"{name}: no gradient from {type(ours if mine is None else theirs)}")
        scale = float(other.abs().max().clamp_min(torch.finfo(other.dtype).tiny))
        gap = max(gap, float((mine - other).abs().max()) / scale)
    return gap
