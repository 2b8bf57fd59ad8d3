"""The bench of optimizers: every contender steps, and bytes are counted the same every time."""

from typing import Any

import pytest
import torch

from phalanx.bench.figures import Request
from phalanx.bench.optim import optim
from phalanx.parallel.ranks import Ranks
from phalanx.train.bench_config import BenchConfig
from phalanx.train.config import Config


def launch_here(fn: Any, *args: Any, **_: Any) -> list[Any]:
    threads = torch.get_num_threads()
    try:
        return [fn(Ranks(rank=0, world_size=1, threads=1), *args)]
    finally:
        torch.set_num_threads(threads)


def test_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "SHAPE", (64, 2048))
    config = Config(bench=BenchConfig(rounds=2, steps=1))
    request = Request(config=config, world_size=1, launch=launch_here, arguments=[], cpu="")
    figures = {figure.name: figure for figure in optim.bench(request)}
    held = {
        name: figures[f"optim.bytes_per_parameter.{name}"].value
        for name in ("adamw", "adamw8bit", "adamw4bit")
    }
    step = 4 / (64 * 2048)
    assert held["adamw"] == 8 + step
    assert held["adamw8bit"] == 2 * (1 + 4 / 256) + step
    assert held["adamw4bit"] == 2 * (0.5 + 4 / 128) + step
    for figure in figures.values():
        assert figure.peer == "torch_fused"
        assert figure.value > 0
