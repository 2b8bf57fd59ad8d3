"""The flags of `phalanx checkpoint`, read and checked."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from phalanx.launch.bad_input import BadInput

USAGES = {
    "ls": "ls [PLACE]",
    "show": "show PLACE [NAME ...] [--shards] | show --diff A B",
    "verify": "verify PLACE [--repair [--from OTHER]]",
    "restore": "restore SRC DST [--layout AXIS=N,...]",
    "convert": "convert SRC DST",
    "export": "export [--dtype TYPE] SRC DST",
    "import": "import SRC DST",
    "gc": "gc PLACE [--keep N] | gc PLACE --memory",
}
"""How each action is called."""

EXAMPLES = (
    "phalanx checkpoint ls runs/first",
    "phalanx checkpoint show runs/first 'model.layers.0.*' --shards",
    "phalanx checkpoint show --diff runs/first/checkpoints/step_00000100 runs/second",
    "phalanx checkpoint verify s3://bucket/first/checkpoints --option endpoint_url=http://store",
    "phalanx checkpoint verify --repair runs/first/checkpoints/step_00000100",
    "phalanx checkpoint restore s3://bucket/first/checkpoints runs/new/checkpoints",
    "phalanx checkpoint restore runs/first runs/new/checkpoints --layout dp_shard=4,tp=2",
    "phalanx checkpoint convert some_dcp_folder runs/new/checkpoints",
    "phalanx checkpoint import Llama-3.2-1B checkpoints/llama",
    "phalanx checkpoint export --dtype fp32 runs/tiny/checkpoints exported",
    "phalanx checkpoint gc runs/first --keep 3 --dry-run",
    "phalanx checkpoint gc runs/first --memory",
)

OPTIONS = (
    ("PLACE, SRC", "a run's folder, a folder of checkpoints, a step_... folder, or a URL of one,"),
    ("", "as s3://bucket/run/checkpoints; of several checkpoints, the newest complete"),
    ("--step N", "that step's instead"),
    ("--option KEY=VALUE", "for the driver of a URL, as endpoint_url=http://...; may be repeated."),
    ("", "Keys of S3 are better left to AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ("--json FILE", "write what was found; - writes it to standard output, instead of lines"),
    (USAGES["ls"], ""),
    ("", "state by manifest and file sizes, and what holders on this machine have in"),
    ("", "memory of the run; without a PLACE, what they have of all runs"),
    (USAGES["show"], ""),
    ("", "tensors by NAME (* and ? stand for anything), of what run they are, and which"),
    ("", "files are missing or have a wrong size"),
    ("  --shards", "each tensor's boxes too, with file and checksum"),
    ("  --diff", "settings and tensors that differ, across layouts; 1 where tensors do"),
    (USAGES["verify"], ""),
    ("", "reads all of it: every checksum, every box once; names the bad shard and"),
    ("", "whether it can be mended"),
    ("  --repair", "mend from parity (any m nodes' files in a group of k+m nodes), from the"),
    ("", "manifest's backup, and files that bear each other's names; all that can be"),
    ("  --from OTHER", "and from another copy of the step, in whatever layout"),
    (USAGES["restore"], ""),
    ("", "DST is a folder of checkpoints, in which step_... is made. Interrupted, the"),
    ("", "same command goes on: what stands is checked and not read again. Every"),
    ("", "shard is checked; the manifest comes last, so half a copy is never loaded"),
    ("  --layout", "cut tensors as ranks of that layout hold them: pp, dp_replicate, dp_shard,"),
    ("", "tp (1 where not named), or keys as zero.stage=1. Not needed to train in"),
    ("", "another layout: any checkpoint is loaded in any"),
    ("  --staging FOLDER", "where --layout works when DST is no local folder; needs its size"),
    ("  --limit MB/S", "most megabytes a second that are read"),
    ("  --dry-run", "say what would be done"),
    (USAGES["convert"], ""),
    ("", "from a torch.distributed.checkpoint folder (with .metadata) to ours, or from"),
    ("", "ours to such a folder: SRC decides. Also for checkpoints of older versions"),
    (f"{USAGES['export']}; {USAGES['import']}", ""),
    ("", "weights to and from a folder of Hugging Face's; TYPE: fp32, bf16, fp16"),
    (USAGES["gc"], ""),
    ("", "delete leftovers of saves, and what was saved anew; what may still be in the"),
    ("", "making or can be mended stays"),
    ("  --keep N", "and complete ones but the newest N and step 0 (imported weights)"),
    ("  --keep-every N", "but not those at multiples of N"),
    ("  --memory", "instead, end the run's holders on this machine and free what they have in"),
    ("", "memory; a run that is in use keeps them. PLACE may be gone: as `ls` says it"),
    ("  --dry-run", "say what would be deleted, or ended"),
    ("Exit codes", "0 all is well; 1 something is broken, differs or failed; 2 bad input"),
)
"""Flag and meaning, for the help."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A command line of `phalanx checkpoint`, past its action."""

    places: list[str]
    json_file: str | None
    """A path, or - for standard output."""
    options: dict[str, Any]
    step: int | None
    given: argparse.Namespace = field(repr=False)
    """The action's own."""


def parse(action: str, argv: Sequence[str]) -> Flags:
    """Read a command line.

    Raises:
        BadInput: one line that names the flag, its value and what would be right.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("places", nargs="*")
    parser.add_argument("--json")
    parser.add_argument("--option", action="append", default=[])
    if action in ("show", "verify", "restore", "convert"):
        parser.add_argument("--step")
    _own_flags(action, parser)

    def refuse(message: str) -> NoReturn:
        raise BadInput(f"checkpoint {action}: {message}; usage: {USAGES[action]}")

    parser.error = refuse  # type: ignore[assignment]
    found = parser.parse_intermixed_args(list(argv))
    step = getattr(found, "step", None)
    if found.json not in (None, "-"):
        _check_writable(found.json)
    return Flags(
        places=found.places,
        json_file=found.json,
        options=dict(map(_option, found.option)),
        step=None if step is None else whole("--step", step, least=0),
        given=found,
    )


def _own_flags(action: str, parser: argparse.ArgumentParser) -> None:
    if action == "show":
        parser.add_argument("--diff", action="store_true")
        parser.add_argument("--shards", action="store_true")
    elif action == "verify":
        parser.add_argument("--repair", action="store_true")
        parser.add_argument("--from", dest="other")
    elif action == "restore":
        parser.add_argument("--layout")
        parser.add_argument("--staging", type=Path)
        parser.add_argument("--limit", default="0")
    elif action == "gc":
        parser.add_argument("--keep")
        parser.add_argument("--keep-every", default="0")
        parser.add_argument("--memory", action="store_true")
    elif action == "export":
        parser.add_argument("--dtype")
    if action in ("restore", "gc"):
        parser.add_argument("--dry-run", action="store_true")


def pairs(flag: str, text: str) -> dict[str, str]:
    """`a=1,b=2` as a mapping.

    Raises:
        BadInput: it is not of that form.
    """
    found: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not key or not equals or not value or key in found:
            raise BadInput(f"{flag} {text}: write each once, as in dp_shard=4,tp=2")
        found[key.strip()] = value.strip()
    return found


def whole(flag: str, text: str, *, least: int) -> int:
    """A whole number.

    Raises:
        BadInput: it is none, or less than `least`.
    """
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise BadInput(f"{flag} {text}: must be a whole number, {least} or more")
    return number


def megabytes(flag: str, text: str) -> float:
    """A number of megabytes a second; 0 = no limit.

    Raises:
        BadInput: it is none, or negative.
    """
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise BadInput(f"{flag} {text}: must be a number of megabytes a second, such as 50")
    return number


def _option(text: str) -> tuple[str, Any]:
    """One --option; values are JSON's where they can be, else texts."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise BadInput(f"--option {text}: write KEY=VALUE, as in endpoint_url=http://host:9000")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _check_writable(text: str) -> None:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--json {text}: cannot be written; name a file in a folder that exists")
