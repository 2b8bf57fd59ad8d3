"""Sides of a comparison that live in the same ranks and take turns.

In alternating order, so that a machine that slows down slows all of them. Our side is the whole
trainer: prefetch, checks, timers and logs.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from phalanx.bench.rounds import rounds, synchronize
from phalanx.checkpoint.config import CheckpointConfig
from phalanx.fault.signals import StopRequest
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.data.source import Batch, Prefetcher
from phalanx.train.engine.build import batch_source
from phalanx.train.trainer import Trainer


class Loop(Protocol):
    """One way to train; all ranks call it together."""

    def run(self, batches: Iterator[Batch], first: int, steps: int) -> float:
        """Train `steps` steps, of which the first has number `first`; the last one's loss."""

    def close(self) -> None:
        """Called after the last step."""


class Ours:
    """The trainer, step by step."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.trainer = Trainer(config, ranks)

    def run(self, batches: Iterator[Batch], first: int, steps: int) -> float:
        """As `Loop.run`."""
        with self.trainer.comm:
            for step in range(first, first + steps):
                self.trainer.step(step, next(batches), StopRequest())
            self.trainer.settle()
        assert self.trainer.loss is not None
        return self.trainer.loss

    def close(self) -> None:
        """Close the logs."""
        self.trainer.close()


class Side:
    """One side's state, run a few steps at a time over its own copy of the same batches."""

    def __init__(self, loop: Loop, config: Config, *, dp_rank: int, dp_size: int) -> None:
        self.loop = loop
        self.done = 0
        source = batch_source(config, dp_rank=dp_rank, dp_size=dp_size)
        self.batches = Prefetcher(source, 0, config.data.prefetch)

    @classmethod
    def ours(cls, config: Config, ranks: Ranks) -> "Side":
        """The configured layout; collective."""
        loop = Ours(config, ranks)
        mesh = loop.trainer.mesh
        return cls(loop, config, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)

    @classmethod
    def peer(cls, loop: Loop, config: Config, ranks: Ranks) -> "Side":
        """A peer whose every rank is data-parallel."""
        return cls(loop, config, dp_rank=ranks.rank, dp_size=ranks.world_size)

    def run(self, steps: int) -> float:
        """Train on; the last step's loss."""
        loss = self.loop.run(self.batches, self.done, steps)
        self.done += steps
        return loss

    def close(self) -> None:
        """End the background thread, and what the loop holds open."""
        self.batches.close()
        self.loop.close()


@dataclass(frozen=True)
class Turns:
    """What the sides' turns took, by side and round."""

    wall: dict[str, list[float]]
    """Seconds of the slowest rank."""
    cpu: dict[str, list[float]]
    """Processor seconds of all ranks together."""
    losses: dict[str, float]
    """Of each side's last step."""


def take_turns(sides: dict[str, Side], ranks: Ranks, *, count: int, steps: int) -> Turns:
    """Each side in turn trains `steps` steps, `count` times; collective."""
    found = Turns({name: [] for name in sides}, {name: [] for name in sides}, {})
    for order in rounds(sides, count):
        for name in order:
            dist.barrier()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            found.losses[name] = sides[name].run(steps)
            synchronize(ranks)
            spent = torch.tensor(time.process_time() - cpu_begin, dtype=torch.float64)
            dist.barrier()
            found.wall[name].append(time.perf_counter() - begin)
            dist.all_reduce(spent)
            found.cpu[name].append(float(spent))
    return found


def quiet(config: Config, folder: Path, *, steps: int) -> Config:
    """The run of `steps` steps or more in a folder that goes away, without snapshots, checkpoints,
    evaluation or progress lines."""
    return replace(
        config,
        run=replace(config.run, dir=str(folder)),
        checkpoint=CheckpointConfig(dir=str(folder / "checkpoints"), save_last=False),
        monitor=replace(config.monitor, progress=False),
        training=replace(config.training, steps=max(config.training.steps, steps)),
    )
