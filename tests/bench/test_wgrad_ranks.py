"""The bench of weight gradients runs through; bytes and gradients are the same every time."""

from dataclasses import replace

from phalanx.bench.figures import Request
from phalanx.bench.wgrad import wgrad
from phalanx.launch.ranks.start import launch
from phalanx.train.bench_config import BenchConfig
from phalanx.train.config import Device, LaunchConfig
from tests.small_run import make_config

LAUNCH = LaunchConfig(device=Device.cpu, ranks_per_node=2, threads_per_rank=1, timeout_s=60.0)


def test_weight_gradients() -> None:
    config = replace(make_config(), bench=BenchConfig(rounds=1, steps=1), launch=LAUNCH)
    request = Request(config=config, world_size=2, launch=launch, arguments=[], cpu="")
    figures = {figure.name: figure for figure in wgrad.bench(request)}
    for peer in wgrad.PEERS:
        assert figures[f"wgrad.step_s.{peer}"].peer == peer
        assert figures[f"wgrad.gradient_gap.{peer}"].value < 1e-12, "fp64"
    # No clock in this: bytes are the same every time.
    held = figures["wgrad.held.torch_split"]
    assert held.peer_value is not None
    assert 0 < held.value < held.peer_value
    assert figures["wgrad.peak.plain"].value > 0
