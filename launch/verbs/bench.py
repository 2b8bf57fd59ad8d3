"""`phalanx bench NAME`: a measurement beside a peer."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.config.app import Job, run
from phalanx.launch.config.compose import world_size
from phalanx.launch.ranks.start import launch
from phalanx.launch.verbs.doctor.machine import cpu_name
from phalanx.launch.verbs.json_file import json_option, write_json
from phalanx.launch.verbs.own_launch import need_own_launch, on_one_device


def bench(argv: Sequence[str]) -> None:
    """Measure beside a peer."""
    json_file, rest = json_option(argv)
    name = rest[0] if rest else ""
    if name not in BENCHES:
        raise BadInput(f"bench {name}: unknown; choose one of {', '.join(BENCHES)}")
    job = partial(_bench, name=name, json_file=json_file)
    run("bench", rest[1:], job, starts_ranks=name not in WITHOUT_DATA)


BENCHES = {
    "step": "phalanx.bench.step",
    "startup": "phalanx.bench.startup",
    "pipeline": "phalanx.bench.pipeline.pipeline",
    "wgrad": "phalanx.bench.wgrad.wgrad",
    "quantize": "phalanx.bench.zero.quantize",
    "zero": "phalanx.bench.zero.zero",
    "slow_network": "phalanx.bench.slow_network.slow_network",
    "optim": "phalanx.bench.optim.optim",
    "erasure": "phalanx.bench.erasure.erasure",
    "snapshot": "phalanx.bench.snapshot.snapshot",
}
"""Benches by name: a module with `bench(request) -> list of figures`."""


WITHOUT_DATA = (
    "pipeline",
    "wgrad",
    "quantize",
    "optim",
    "zero",
    "slow_network",
    "erasure",
    "snapshot",
)
"""Benches that need no layout that divides, and no prepared data or check it themselves."""


def _bench(job: Job, *, name: str, json_file: Path | None) -> None:
    need_own_launch("bench", job.config)
    from phalanx.bench.figures import Request, report, table

    size = world_size(job.config)
    with user_input():
        request = Request(
            config=on_one_device(job.config, size),
            world_size=size,
            launch=launch,
            arguments=job.arguments,
            cpu=cpu_name(),
        )
        figures = import_module(BENCHES[name]).bench(request)
    print(table(figures))
    write_json(json_file, report(figures, cpu=request.cpu))
