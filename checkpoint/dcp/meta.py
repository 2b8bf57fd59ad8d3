"""What a DCP folder that phalanx wrote tells beside its tensors: an older version's, or `to_dcp`'s.

Torch-free.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.checksums import digest_range
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.open import open_storage

OUR_META = "phalanx.json"
"""Beside a DCP folder's own files: step and meta."""

OLD_VERSION = 1
"""Of the manifests that stood in DCP folders."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a DCP folder tells beside its tensors."""

    step: int
    meta: dict[str, Any]


def state_of(src: Path, step: int | None) -> State:
    """Step and meta of a folder; `step`, where given, counts.

    Raises:
        BrokenCheckpointError: an older phalanx wrote it, and a file is not as its manifest says.
        ValueError: neither `step` nor the folder tells the step.
    """
    if (src / MANIFEST).is_file():
        found = _old_state(src)
    elif (src / OUR_META).is_file():
        body = json.loads((src / OUR_META).read_text())
        found = State(step=int(body["step"]), meta=dict(body["meta"]))
    elif step is None:
        raise ValueError(f"{src}: does not tell its step; give --step")
    else:
        found = State(step=step, meta={"kind": "tensors"})
    return found if step is None else State(step=step, meta=found.meta)


def write_state(dst: Path, *, step: int, meta: dict[str, Any]) -> None:
    """Put step and meta beside a DCP folder's files."""
    (dst / OUR_META).write_text(json.dumps({"step": step, "meta": meta}) + "\n")


def _old_state(src: Path) -> State:
    """Step and meta of an older version's folder, whose files are all as they were written."""
    try:
        body = json.loads((src / MANIFEST).read_text())
        checksum = body.pop("checksum")
        version = body["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpointError(f"{src / MANIFEST} cannot be read: {error!r}") from None
    if version != OLD_VERSION:
        raise ValueError(f"{src}: is a checkpoint of version {version}, no DCP folder")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    if checksum != xxhash.xxh3_64(canonical.encode()).hexdigest():
        raise BrokenCheckpointError(f"{src / MANIFEST} is damaged: its own checksum does not hold")
    storage = open_storage(src)
    for name, file in body["files"].items():
        _check_old_file(src, storage, name, file)
    return State(step=int(body["step"]), meta=dict(body["meta"]))


def _check_old_file(src: Path, storage: Storage, name: str, file: dict[str, Any]) -> None:
    try:
        size = storage.size(name)
    except FileNotFoundError:
        raise BrokenCheckpointError(f"{src}: {name} is missing") from None
    if size != file["size"]:
        raise BrokenCheckpointError(f"{src}: {name} has {size} bytes instead of {file['size']}")
    if digest_range(storage, name, 0, size) != file["xxh3_64"]:
        raise BrokenCheckpointError(f"{src}: {name} is damaged")
