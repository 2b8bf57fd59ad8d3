"""`phalanx verify`: a layout held against one process."""

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path

from phalanx.launch.bad_input import BadInput, refuse_option, user_input
from phalanx.launch.config.app import Job, run
from phalanx.launch.config.compose import world_size
from phalanx.launch.ranks.start import launch
from phalanx.launch.verbs.json_file import json_option, write_json
from phalanx.launch.verbs.own_launch import need_own_launch, on_one_device


def verify(argv: Sequence[str]) -> None:
    """Compare a layout with one process."""
    json_file, rest = json_option(argv)
    count, seed, rest = _random_options(rest)
    if count is not None:
        from phalanx.launch.verbs.verify_random import verify_random  # imports torch

        verify_random(rest, count=count, seed=seed, json_file=json_file)
        return
    run("verify", rest, partial(_verify, json_file=json_file))


def _random_options(argv: Sequence[str]) -> tuple[int | None, int | None, list[str]]:
    """`--random N`, `--seed S`, and what else stands on the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--random")
    parser.add_argument("--seed")
    parser.error = refuse_option  # type: ignore[method-assign]
    known, rest = parser.parse_known_args(list(argv))
    numbers = []
    for flag, least in (("random", 1), ("seed", 0)):
        text = getattr(known, flag)
        if text is not None and (not text.isdecimal() or int(text) < least):
            raise BadInput(f"--{flag} {text}: must be a whole number, {least} or more")
        numbers.append(None if text is None else int(text))
    if numbers[0] is None and numbers[1] is not None:
        raise BadInput(f"--seed {numbers[1]}: goes with --random N; training.seed is another key")
    return numbers[0], numbers[1], rest


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
