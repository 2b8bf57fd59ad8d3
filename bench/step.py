"""`phalanx bench step`: a training step against a hand-written FSDP2 loop.

Both sides live in the same ranks and take turns. Peak memory is measured apart, with one side alone
in fresh ranks.
"""

import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.peers.fsdp2 import PeerLoop
from phalanx.bench.rounds import ROUNDS, STEPS
from phalanx.bench.turns import Side, quiet, take_turns
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config
from phalanx.train.model.flops import flops_per_token
from phalanx.train.monitor.peak import peak

PEER = "fsdp2"
SIDES = ("phalanx", PEER)


def bench(request: Request) -> list[Figure]:
    """Tokens per second, CPU seconds and peak memory of the configured layout and of the peer.

    The peer shards over all ranks.

    Raises:
        ValueError: the batch does not divide over the peer's ranks.
    """
    config, world_size = request.config, request.world_size
    training = config.training
    share = world_size * training.microbatch_size
    if training.global_batch_size % share:
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size}: the FSDP2 peer needs a "
            f"multiple of {world_size} ranks x microbatch_size={training.microbatch_size}"
        )
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
        config = quiet(config, Path(folder), steps=(config.bench.steps or STEPS) * 20)
        run = {"world_size": world_size, "config": config.launch}
        timed = request.launch(measure_time, config, **run)[0]
        memory = {side: request.launch(measure_memory, config, side, **run) for side in SIDES}
    tokens = training.global_batch_size * training.seq_len * (config.bench.steps or STEPS)
    rates = {side: [tokens / s for s in timed["wall"][side]] for side in SIDES}
    return [
        compared("step.tokens_per_s", "tokens/s", PEER, *rates.values(), less_is_better=False),
        compared("step.cpu_s", "s/turn", PEER, *timed["cpu"].values(), less_is_better=True),
        compared(
            "step.peak_memory",
            "bytes",
            PEER,
            [float(max(memory["phalanx"]))],
            [float(max(memory[PEER]))],
            less_is_better=True,
        ),
        Figure(
            name="step.mfu",
            value=sorted(rates["phalanx"])[len(rates["phalanx"]) // 2]
            * timed["flops_per_token"]
            / timed["peak_flops"],
            unit="of peak",
        ),
        Figure(name="step.loss_gap", value=timed["loss_gap"], unit="relative"),
    ]


def measure_time(ranks: Ranks, config: Config) -> dict[str, Any]:
    """Wall and CPU seconds of each side's turns (the slowest rank's wall, all ranks' CPU)."""
    steps = config.bench.steps or STEPS
    with process_group(ranks):
        sides = {side: make_side(side, config, ranks) for side in SIDES}
        for side in sides.values():
            side.run(steps)
        turns = take_turns(sides, ranks, count=config.bench.rounds or ROUNDS, steps=steps)
        for side in sides.values():
            side.close()
        found = peak(
            ranks.device,
            config.precision.compute.name,
            world_size=ranks.world_size,
            ranks_per_machine=ranks.local_world_size,
        )
    return {
        "wall": turns.wall,
        "cpu": turns.cpu,
        "loss_gap": abs(turns.losses["phalanx"] - turns.losses[PEER]) / turns.losses[PEER],
        "flops_per_token": flops_per_token(config.model, config.training.seq_len),
        "peak_flops": found.flops,
    }


def measure_memory(ranks: Ranks, config: Config, side: str) -> int:
    """Peak bytes that one side adds to a fresh rank: device memory, or resident memory on CPU."""
    with process_group(ranks):
        before = psutil.Process().memory_info().rss
        if ranks.device_type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        runner = make_side(side, config, ranks)
        runner.run(config.bench.steps or STEPS)
        runner.close()
        if ranks.device_type == "cuda":
            return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()
    peak_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak_kb) * 1024 - before


def make_side(name: str, config: Config, ranks: Ranks) -> Side:
    """One of SIDES; collective."""
    if name == PEER:
        return Side.peer(PeerLoop(config, ranks), config, ranks)
    return Side.ours(config, ranks)
