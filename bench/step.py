"""`phalanx bench step`: a training step against a hand-written FSDP2 loop.

Both sides live in the same ranks and take turns, in alternating order, so that a machine that slows
down slows both. Ours is the whole trainer: prefetch, checks, timers and logs. Peak memory is
measured apart, with one side alone in fresh ranks.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.peer_fsdp2 import PeerLoop
from phalanx.fault.signals import StopRequest
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.build import batch_source
from phalanx.train.config import Config
from phalanx.train.data.source import Prefetcher
from phalanx.train.flops import flops_per_token, peak
from phalanx.train.trainer import Trainer

PEER = "fsdp2"
SIDES = ("phalanx", PEER)
ROUNDS, STEPS = 5, 4
"""Where bench.rounds and bench.steps are empty."""


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
        config = _quiet(config, Path(folder))
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
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, float] = {}
    steps = config.bench.steps or STEPS
    with process_group(ranks):
        sides = {side: _Side(side, config, ranks) for side in SIDES}
        for side in sides.values():
            side.run(steps)
        for turn in range(config.bench.rounds or ROUNDS):
            order = SIDES if turn % 2 == 0 else SIDES[::-1]
            for name in order:
                dist.barrier()
                begin, cpu_begin = time.perf_counter(), time.process_time()
                losses[name] = sides[name].run(steps)
                _synchronize(ranks)
                spent = torch.tensor(time.process_time() - cpu_begin, dtype=torch.float64)
                dist.barrier()
                wall[name].append(time.perf_counter() - begin)
                dist.all_reduce(spent)
                cpu[name].append(float(spent))
        for side in sides.values():
            side.close()
        found = peak(
            ranks.device,
            config.precision.compute.name,
            world_size=ranks.world_size,
            ranks_per_machine=ranks.local_world_size,
        )
    return {
        "wall": wall,
        "cpu": cpu,
        "loss_gap": abs(losses["phalanx"] - losses[PEER]) / losses[PEER],
        "flops_per_token": flops_per_token(config.model, config.training.seq_len),
        "peak_flops": found.flops,
    }


def measure_memory(ranks: Ranks, config: Config, side: str) -> int:
    """Peak bytes that one side adds to a fresh rank: device memory, or resident memory on CPU."""
    with process_group(ranks):
        before = psutil.Process().memory_info().rss
        if ranks.device_type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        runner = _Side(side, config, ranks)
        runner.run(config.bench.steps or STEPS)
        runner.close()
        if ranks.device_type == "cuda":
            return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()
    peak_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak_kb) * 1024 - before


class _Side:
    """One side's state, run a few steps at a time over its own copy of the same batches."""

    def __init__(self, name: str, config: Config, ranks: Ranks) -> None:
        self.done = 0
        self.trainer = Trainer(config, ranks) if name == "phalanx" else None
        self.peer = None if self.trainer else PeerLoop(config, ranks)
        mesh = self.trainer.mesh if self.trainer else None
        source = batch_source(
            config,
            dp_rank=mesh.dp_rank if mesh else ranks.rank,
            dp_size=mesh.dp_size if mesh else ranks.world_size,
        )
        self.batches = Prefetcher(source, 0, config.data.prefetch)

    def run(self, steps: int) -> float:
        """Train on; the last step's loss."""
        loss = 0.0
        if self.trainer is None:
            assert self.peer is not None
            loss = self.peer.run(self.batches, self.done, steps)
        else:
            with self.trainer.comm:
                for step in range(self.done, self.done + steps):
                    self.trainer.step(step, next(self.batches), StopRequest())
                self.trainer.settle()
            assert self.trainer.loss is not None
            loss = self.trainer.loss
        self.done += steps
        return loss

    def close(self) -> None:
        """End the background thread, and the trainer's logs."""
        self.batches.close()
        if self.trainer is not None:
            self.trainer.close()


def _quiet(config: Config, folder: Path) -> Config:
    """The run in a folder that goes away, without checkpoints, evaluation or progress lines."""
    return replace(
        config,
        run=replace(config.run, dir=str(folder)),
        checkpoint=replace(
            config.checkpoint, dir=str(folder / "checkpoints"), every=0, save_last=False
        ),
        monitor=replace(config.monitor, progress=False),
        training=replace(
            config.training,
            steps=max(config.training.steps, (config.bench.steps or STEPS) * 20),
        ),
    )


def _synchronize(ranks: Ranks) -> None:
    if ranks.device_type == "cuda":
        torch.cuda.synchronize()
