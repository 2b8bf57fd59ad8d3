"""`phalanx verify`: a layout held against one process."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path

from phalanx.launch.bad_input import user_input
from phalanx.launch.config.app import Job, run
from phalanx.launch.config.compose import world_size
from phalanx.launch.ranks.start import launch
from phalanx.launch.verbs.json_file import json_option, write_json
from phalanx.launch.verbs.own_launch import need_own_launch, on_one_device


def verify(argv: Sequence[str]) -> None:
    """Compare a layout with one process."""
    json_file, rest = json_option(argv)
    run("verify", rest, partial(_verify, json_file=json_file))


def _verify(job: Job, *, json_file: Path | None) -> None:
    need_own_launch("verify", job.config)
    size = world_size(job.config)
    degrees = job.config.verify.resume_in
    with user_input():
        config = on_one_device(job.config, max(size, prod(degrees.values())))
        report = import_module("phalanx.train.verify").verify(config, launch, world_size=size)
    print(report.table())
    write_json(json_file, report.to_json())
    if not report.passed:
        raise SystemExit(1)
