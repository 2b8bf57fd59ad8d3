"""The pipeline bench runs through, and what it reports hangs together; clocks are not judged."""

import math

import pytest

from phalanx.bench.figures import Figure, Request, table
from phalanx.bench.pipeline import pipeline
from phalanx.bench.pipeline.peer import PEERS
from phalanx.launch.ranks.start import launch
from phalanx.train.bench_config import BenchConfig, EmulatedPipelineConfig
from phalanx.train.config import Config, Device, LaunchConfig

LAUNCH = LaunchConfig(device=Device.cpu, ranks_per_node=2, threads_per_rank=1, timeout_s=60.0)


def request(config: Config) -> Request:
    return Request(config=config, world_size=2, launch=launch, arguments=[], cpu="")


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    named = {figure.name: figure for figure in figures}
    assert len(named) == len(figures), "two figures of one name"
    assert len(table(figures).splitlines()) == len(figures)
    return named


def test_emulated_pipeline() -> None:
    settings = EmulatedPipelineConfig(ranks=2, microbatches=4, forward_ms=1.0)
    bench = BenchConfig(rounds=2, steps=2, pipeline=settings)
    figures = by_name(pipeline.bench(request(Config(bench=bench, launch=LAUNCH))))
    work = 4 * sum(settings.seconds)
    for name in (*pipeline.NAMED, *pipeline.LIMITS):
        first, step = figures[f"pipeline.{name}.first_step_s"], figures[f"pipeline.{name}.step_s"]
        for figure in (first, step):
            assert figure.peer == "simulated"
            assert figure.peer_value is not None
            assert figure.peer_value >= work, "a bubble below nothing"
        assert first.low is not None
        assert first.low >= work, "an operation slept too little"
        assert math.isfinite(figures[f"pipeline.{name}.vs_simulated"].value)
    for peer in PEERS:
        assert figures[f"pipeline.{peer}.throughput"].value > 0
        for auto in pipeline.LIMITS:
            ratio = figures[f"pipeline.{auto}.vs_{peer}"]
            assert ratio.peer == peer
            assert ratio.ratio is not None
    limit = figures["pipeline.no_bubble_gain"].value
    assert 0 < figures["pipeline.auto_2x.simulated_gain"].value <= limit * (1 + 1e-9)
    assert figures["pipeline.auto_2x.post_validation"].peer == "barrier"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(bench=BenchConfig(steps=1)), ("bench.steps=1", "at least 2")),
        (
            Config(launch=LaunchConfig(nodes=2, launcher="ray")),  # type: ignore[arg-type]
            ("launch.nodes=2", "one machine"),
        ),
    ],
)
def test_what_cannot_be_measured(config: Config, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="pipeline bench") as caught:
        pipeline.bench(request(config))
    assert all(word in str(caught.value) for word in words)
