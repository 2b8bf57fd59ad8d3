"""The bench of block quantization runs through, and times codes that come back right."""

from dataclasses import replace

from phalanx.bench.figures import Request
from phalanx.bench.zero import quantize
from phalanx.launch.ranks.start import launch
from phalanx.train.bench_config import BenchConfig
from phalanx.train.config import Device, LaunchConfig
from tests.small_run import make_config

LAUNCH = LaunchConfig(device=Device.cpu, ranks_per_node=2, threads_per_rank=1, timeout_s=60.0)
ERRORS = {"int8": (0.004, 0.008), "int4": (0.1, 0.15), "fp8": (0.02, 0.03)}


def test_throughputs_and_errors() -> None:
    config = replace(make_config(), bench=BenchConfig(rounds=1, steps=1), launch=LAUNCH)
    request = Request(config=config, world_size=2, launch=launch, arguments=[], cpu="")
    figures = {figure.name: figure for figure in quantize.bench(request, numel=1 << 16)}
    for kind, (low, high) in ERRORS.items():
        for what in ("quantize", "quantize_feedback", "dequantize", "dequantize_sum"):
            figure = figures[f"quantize.{kind}.{what}"]
            assert figure.peer == "memcpy"
            assert figure.value > 0
        assert low < figures[f"quantize.{kind}.error"].value < high
