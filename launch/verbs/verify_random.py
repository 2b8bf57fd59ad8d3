"""`phalanx verify --random N`: layouts drawn at random, each held against one process."""

import secrets
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.config.app import Command
from phalanx.launch.config.compose import Source, check, compose, world_size
from phalanx.launch.ranks.failure import RankFailed
from phalanx.launch.ranks.start import launch, warm_up
from phalanx.launch.verbs.json_file import write_json
from phalanx.launch.verbs.own_launch import need_own_launch, on_one_device
from phalanx.train.config import Config
from phalanx.train.verify.draw import SMALL, draws

MOST_REFUSED = 2000
"""Draws in a row that the checks may refuse before the search is given up."""


@dataclass(kw_only=True)
class DrawnLayouts:
    """What became of the layouts."""

    seed: int
    refused: int = 0
    """Draws."""
    layouts: list[dict[str, Any]] = field(default_factory=list)


def verify_random(
    argv: Sequence[str], *, count: int, seed: int | None, json_file: Path | None
) -> None:
    """Draw until `count` layouts were verified or failed; exits with 1 where one failed.

    Raises:
        BadInput: what is fixed on the command line cannot be, or nothing fits it.
    """
    command = Command.parse(argv)
    if command.sweep or not command.runs:
        raise BadInput("verify --random: draws its own layouts; leave --multirun and --cfg out")
    with user_input():
        config = compose([*SMALL, *command.overrides], command.source)
    need_own_launch("verify", config)
    warm_up()
    found = DrawnLayouts(seed=secrets.randbelow(10**6) if seed is None else seed)
    print(f"drawn from --seed {found.seed}", flush=True)
    in_a_row = 0
    for overrides in draws(found.seed, command.overrides):
        if len(found.layouts) == count:
            break
        line = shlex.join(["phalanx", "verify", *_options(argv, command), *overrides])
        try:
            config = checked(overrides, command.source)
        except ValueError as error:
            found.refused, in_a_row = found.refused + 1, in_a_row + 1
            if in_a_row == MOST_REFUSED:
                raise BadInput(f"verify --random: no layout fits; the last one: {error}") from None
            continue
        in_a_row = 0
        begin = time.monotonic()
        worst, said = _verify(config)
        seconds = time.monotonic() - begin
        found.layouts.append(
            {"command": line, "passed": not said, "worst": worst, "seconds": seconds}
        )
        ended = f"{'FAILED' if said else 'ok'} {worst:.1e} {seconds:.1f} s"
        print(f"{len(found.layouts)}/{count} {ended}  {_short(overrides)}", flush=True)
        if said:
            print(f"{said}\n{line}", flush=True)
    _end(found, json_file)


def checked(overrides: Sequence[str], source: Source) -> Config:
    """A configuration that every check before ranks start allows.

    Raises:
        ValueError: one of them does not.
    """
    config = compose(overrides, source)
    check(config)
    config = on_one_device(config, max(world_size(config), prod(config.verify.resume_in.values())))
    import_module("phalanx.train.verify").layouts(config)
    return config


def _verify(config: Config) -> tuple[float, str]:
    """The worst relative error, and what is shown where the layout fails; "" where it is equal.

    What was allowed must run: any error is a failure.
    """
    verify = import_module("phalanx.train.verify").verify
    try:
        report = verify(config, launch, world_size=world_size(config))
    except RankFailed as error:
        return float("nan"), error.last_words
    except Exception:
        return float("nan"), traceback.format_exc()
    return max(report.to_json()["worst"].values()), "" if report.passed else report.table()


def _end(found: DrawnLayouts, json_file: Path | None) -> None:
    failed = [layout["command"] for layout in found.layouts if not layout["passed"]]
    verified = len(found.layouts) - len(failed)
    print(f"{verified} verified, {len(failed)} failed, {found.refused} draws refused by the checks")
    write_json(json_file, vars(found))
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
        raise SystemExit(1)


def _options(argv: Sequence[str], command: Command) -> list[str]:
    """What of the command line is Hydra's own, as --config-dir."""
    return [word for word in argv if word not in command.overrides]


def _short(overrides: Sequence[str]) -> str:
    """The layout in a few words: degrees above 1, and what else decides how it runs."""
    keys = ("parallel.", "pipeline.schedule", "zero.", "optim.name", "verify.resume_in")
    shown = [text for text in overrides if text.startswith(keys)]
    dull = ("=1", "=null", "=none", "=false", "=0", "={}", "=adamw")
    return " ".join(text.partition(".")[2] for text in shown if not text.endswith(dull))
