"""Schedules in files: JSON with one line of operations a rank.

    {
      "format": "phalanx-schedule",
      "version": 1,
      "name": "mine",
      "num_microbatches": 2,
      "placement": [0, 1],
      "orders": [
        "0F0 0F1 0BW0 0BW1",
        "1F0 1BW0 1F1 1BW1"
      ]
    }

`placement` is the rank of each stage; an operation is stage, kind (F, B, W, or BW for B and W in
one) and microbatch.
"""

import json
from pathlib import Path
from typing import Any

from phalanx.parallel.pipeline.graph import Op, Schedule
from phalanx.parallel.pipeline.validate import validate

_FORMAT = "phalanx-schedule"
_VERSION = 1
_KEYS = ("format", "version", "name", "num_microbatches", "placement", "orders")


def save_schedule(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule to a file; its folder must exist."""
    orders = ",\n".join(f"    {json.dumps(' '.join(map(str, o)))}" for o in schedule.orders)
    lines = [
        f'  "format": {json.dumps(_FORMAT)}',
        f'  "version": {_VERSION}',
        f'  "name": {json.dumps(schedule.name)}',
        f'  "num_microbatches": {schedule.num_microbatches}',
        f'  "placement": {json.dumps(schedule.placement)}',
        f'  "orders": [\n{orders}\n  ]',
    ]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule and check that it can run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the file and what is wrong in it, with the operation where it is one.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, too deep, or bytes that are no text
        raise ValueError(f"{path}: no JSON: {error}") from error
    try:
        schedule = _parse(data)
        validate(schedule)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return schedule


def _parse(data: Any) -> Schedule:
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f'no schedule; it should be an object with "format": "{_FORMAT}"')
    version = data.get("version")
    if version != _VERSION:
        raise ValueError(f"version {version!r} of the format; this phalanx reads {_VERSION}")
    missing = [key for key in _KEYS if key not in data]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing")
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is unknown; the keys are {', '.join(_KEYS)}")
    name, orders = data["name"], data["orders"]
    if not isinstance(name, str):
        raise ValueError(f"name {name!r} should be a string")
    num_microbatches = _integer("num_microbatches", data["num_microbatches"], least=1)
    placement = [_integer("placement", rank, least=0) for rank in _list("placement", data)]
    if not isinstance(orders, list) or not all(isinstance(order, str) for order in orders):
        raise ValueError("orders should be a list of strings, one a rank")
    return Schedule.of(
        name, placement, num_microbatches, [_parse_order(rank, o) for rank, o in enumerate(orders)]
    )


def _parse_order(rank: int, text: str) -> list[Op]:
    try:
        return [Op.parse(word) for word in text.split()]
    except ValueError as error:
        raise ValueError(f"rank {rank}: {error}") from error


def _list(key: str, data: dict[str, Any]) -> list[Any]:
    if not isinstance(data[key], list):
        raise ValueError(f"{key} should be a list, and is {data[key]!r}")
    return data[key]


def _integer(key: str, value: Any, *, least: int) -> int:
    # bool is an int to Python, not to the reader of the file
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}: {value!r} should be a whole number, {least} or more")
    return value
