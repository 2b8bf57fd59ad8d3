"""The flags of `phalanx schedule`, read and checked."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from phalanx.launch.bad_input import BadInput
from phalanx.parallel.pipeline.config import NAMES, PipelineConfig

OPTIONS = (
    ("--p P", "pipeline ranks; with --m and --costs instead of a configured layout"),
    ("--m M", "microbatches of a step"),
    ("--costs F,B,W,C", "times of a microbatch's forward, input gradient and weight gradient on a"),
    ("", "rank (its stages share them), and of a message between ranks, in any unit"),
    ("--mem F,B,W", "what they add to a rank's memory, in any unit; default 2,-1,-1"),
    ("--memory X", "limit of a rank's memory, in multiples of p x what F adds"),
    ("--schedule NAME", f"{', '.join(NAMES)},"),
    ("", "or a schedule file (has a / or ends in .json)"),
    ("--chunks N", "stages of a rank, where the schedule leaves it open"),
    ("--json FILE", "write the figures and the order of operations"),
    ("--svg FILE", "draw the timeline, and the memory under it"),
    ("--png FILE", "the same as pixels"),
    ("--trace FILE", "write a trace for ui.perfetto.dev or chrome://tracing"),
    ("--save FILE", "write the schedule, for --schedule FILE and pipeline.schedule=FILE"),
)
"""Flag and meaning, for the help."""

_MAGNITUDES = (1e-30, 1e30)
"""Least and greatest, other than 0: sums and ratios of them are finite."""
_MOST_PLACES = 1_000_000
"""p x m: more operations fit into no memory and no evening."""

OUTPUTS = ("json", "svg", "png", "trace", "save")
_VALUES = ("p", "m", "costs", "mem", "memory", "schedule", "chunks")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A pipeline of equal ranks, as --p, --m, --costs, --mem and --memory give it."""

    num_ranks: int
    num_microbatches: int
    costs: tuple[float, float, float, float]
    """F, B, W of a microbatch and rank, and a hop."""
    memory: tuple[float, float, float]
    """What F, B and W of a microbatch add to a rank."""
    limit: float | None
    """In multiples of p x what F adds."""

    @property
    def multiple(self) -> float:
        """p x what F adds."""
        return self.num_ranks * self.memory[0]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A command line of `phalanx schedule`."""

    setting: Setting | None
    """None: the configured layout."""
    schedule: str | None
    chunks: int | None
    outputs: dict[str, Path]
    """Files to write, by flag."""
    rest: list[str]
    """Overrides and Hydra's options."""


def parse(argv: Sequence[str]) -> Flags:
    """Read a command line.

    Raises:
        BadInput: one line that names the flag, its value and what would be right.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _VALUES:
        parser.add_argument(f"--{name}")
    for name in OUTPUTS:
        parser.add_argument(f"--{name}", type=Path)
    parser.error = _refuse  # type: ignore[method-assign]
    found, rest = parser.parse_known_args(_with_values(argv))
    values = {name: getattr(found, name) for name in _VALUES}
    outputs = {name: getattr(found, name) for name in OUTPUTS if getattr(found, name) is not None}
    flags = Flags(
        setting=_setting(values),
        schedule=values["schedule"],
        chunks=None if values["chunks"] is None else _whole("chunks", values["chunks"], least=1),
        outputs=outputs,
        rest=rest,
    )
    _check_outputs(outputs, rest)
    if flags.setting is not None:
        _check_unconfigured(flags)
    return flags


def _with_values(argv: Sequence[str]) -> list[str]:
    """Negative numbers joined to their flag, so that they are not taken for flags."""
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1].startswith("--") and re.match(r"-[\d.]", text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _setting(values: dict[str, str | None]) -> Setting | None:
    needed = ("p", "m", "costs")
    given = [f"--{name}" for name in (*needed, "mem", "memory") if values[name] is not None]
    if not given:
        return None
    missing = [f"--{name}" for name in needed if values[name] is None]
    if missing:
        hint = ""
        if given == ["--memory"]:
            hint = "; of a configured layout, limit the memory by pipeline.memory_limit=8GiB"
        raise BadInput(f"schedule: {', '.join(given)} needs {' and '.join(missing)} too{hint}")
    num_ranks = _whole("p", values["p"], least=2)
    num_microbatches = _whole("m", values["m"], least=1)
    if num_ranks * num_microbatches > _MOST_PLACES:
        raise BadInput(
            f"--p {num_ranks} --m {num_microbatches}: p x m must be at most {_MOST_PLACES:,}"
        )
    f, b, w, hop = _numbers("costs", values["costs"], "F,B,W,C")
    if min(f, b, w, hop) < 0 or f + b + w == 0:
        raise BadInput(f"--costs {values['costs']}: times must be 0 or more, and not all 0")
    _check_magnitude("costs", values["costs"], (f, b, w, hop))
    return Setting(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        costs=(f, b, w, hop),
        memory=_memory(values["mem"]),
        limit=_limit(values["memory"]),
    )


def _memory(text: str | None) -> tuple[float, float, float]:
    if text is None:
        return 2.0, -1.0, -1.0
    f, b, w = _numbers("mem", text, "F,B,W")
    if f <= 0:
        raise BadInput(f"--mem {text}: F must take memory, be above 0; such as 2,-1,-1")
    _check_magnitude("mem", text, (f, b, w))
    if abs(f + b + w) > 1e-6 * f:
        raise BadInput(f"--mem {text}: must add up to 0, for B and W free what F takes")
    return f, b, w


def _check_magnitude(flag: str, text: str | None, numbers: Sequence[float]) -> None:
    least, most = _MAGNITUDES
    if not all(number == 0 or least <= abs(number) <= most for number in numbers):
        raise BadInput(
            f"--{flag} {text}: must be 0 or between {least:g} and {most:g}; take another unit"
        )


def _limit(text: str | None) -> float | None:
    if text is None:
        return None
    (limit,) = _numbers("memory", text, "X")
    if limit <= 0:
        raise BadInput(f"--memory {text}: must be above 0; 1 is what 1F1B's first rank holds")
    return limit


def _numbers(flag: str, text: str | None, form: str) -> list[float]:
    parts = (text or "").split(",")
    count = form.count(",") + 1
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        wanted = "one finite number" if count == 1 else f"{count} finite numbers, {form}"
        raise BadInput(f"--{flag} {text}: give {wanted}")
    return numbers


def _whole(flag: str, text: str | None, *, least: int) -> int:
    try:
        number = int(text or "")
    except ValueError:
        number = least - 1
    if number < least:
        raise BadInput(f"--{flag} {text}: must be a whole number, {least} or more")
    return number


def _check_outputs(outputs: dict[str, Path], rest: list[str]) -> None:
    for name, path in outputs.items():
        if {"--multirun", "-m"} & set(rest):
            raise BadInput(
                f"--{name} {path}: each job of --multirun would overwrite it; run them one by one"
            )
        other = next(other for other in outputs if outputs[other] == path)
        if other != name:
            raise BadInput(f"--{name} {path}: --{other} writes to it already; name another file")


def _check_unconfigured(flags: Flags) -> None:
    """What only a configured layout takes, and what only it can leave out."""
    if flags.rest:
        first = flags.rest[0]
        if first.startswith("-"):
            _refuse(f"{first}: unknown option")
        raise BadInput(
            f"schedule: {first}: an override changes a configured layout, but --p, --m and "
            "--costs say the layout themselves; use one or the other"
        )
    if flags.schedule is None:
        raise BadInput(f"schedule: --schedule is missing; choose {', '.join(NAMES)} or a file")
    try:
        PipelineConfig(schedule=flags.schedule, stages_per_rank=flags.chunks)
    except ValueError as error:
        text = str(error).replace("pipeline.schedule=", "--schedule ")
        raise BadInput(text.replace("pipeline.stages_per_rank=", "--chunks ")) from error


def _refuse(message: str) -> NoReturn:
    raise BadInput(f"schedule: {message}; `phalanx schedule --help` lists the options")
