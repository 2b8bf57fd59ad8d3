"""`--json FILE`: the one way to write JSON for a user."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phalanx.launch.bad_input import BadInput, refuse_option


def json_option(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """`--json FILE` and what else stands on the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    parser.error = refuse_option  # type: ignore[method-assign]
    known, rest = parser.parse_known_args(list(argv))
    if known.json is not None:
        _check_writable(known.json)
    return known.json, rest


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--json {path}: {error.strerror}: {error.filename}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--json {path}: cannot be written; name a file in a folder of yours")


def write_json(path: Path | None, content: Any) -> None:
    """Written under a temporary name, then renamed: the file is whole or not there."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.{os.getpid()}")
        partial_path.write_text(json.dumps(content, indent=2) + "\n")
        partial_path.replace(path)
        print(f"wrote {path}", file=sys.stderr)
