"""The flags of `phalanx plan`, read and checked."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.verbs.json_file import json_option
from phalanx.parallel.pipeline.config import parse_bytes

OPTIONS = (
    ("--memory SIZE", "say which ways fit into so much memory of a rank, such as 80GiB"),
    ("--json FILE", "write the figures, in bytes"),
)
"""Flag and meaning, for the help."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A command line of `phalanx plan`."""

    memory: float | None
    """Bytes."""
    json_file: Path | None
    rest: list[str]
    """Overrides and Hydra's options."""


def parse(argv: Sequence[str]) -> Flags:
    """Read a command line.

    Raises:
        BadInput: one line that names the flag and its value.
    """
    json_file, rest = json_option(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--memory")
    parser.error = _refuse  # type: ignore[method-assign]
    found, rest = parser.parse_known_args(rest)
    memory = None
    if found.memory is not None:
        with user_input():
            memory = parse_bytes("--memory", found.memory)
    return Flags(memory=memory, json_file=json_file, rest=rest)


def _refuse(message: str) -> NoReturn:
    raise BadInput(message)
