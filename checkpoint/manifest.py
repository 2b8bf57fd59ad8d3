"""The file that makes a folder a checkpoint: written last, atomically, with every file's checksum.

A folder without `manifest.json` is the leftover of a crash. One whose manifest does not parse, or
does not hold its own checksum, or whose files differ from it, is broken.
"""

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

NAME = "manifest.json"
VERSION = 1
READ_BYTES = 8 << 20
"""Bytes read at a time for a checksum."""


class BrokenCheckpointError(ValueError):
    """A checkpoint that must not be loaded; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a file must be."""

    size: int
    """Bytes."""
    xxh3_64: str
    """XXH3-64 of the content, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    """Training steps done."""
    meta: dict[str, Any]
    """The saver's own facts: configuration, layout, data position, ..."""
    files: dict[str, Fingerprint]
    """Every other file of the folder, by name."""
    world_size: int
    """Ranks that saved."""
    torch_version: str
    """torch that saved."""
    time: float
    """Seconds since 1970."""


def new_manifest(
    *, step: int, meta: dict[str, Any], files: dict[str, Fingerprint], world_size: int
) -> Manifest:
    """A manifest of this moment."""
    import torch  # only here: the launching process reads manifests without it

    return Manifest(
        step=step,
        meta=meta,
        files=files,
        world_size=world_size,
        torch_version=torch.__version__,
        time=time.time(),
    )


def fingerprint(path: Path) -> Fingerprint:
    """Size and checksum of a file's content."""
    digest = xxhash.xxh3_64()
    size = 0
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return Fingerprint(size=size, xxh3_64=digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a folder: it counts as a checkpoint once this returned, also after a power cut."""
    body = {
        "version": VERSION,
        "step": manifest.step,
        "time": manifest.time,
        "torch": manifest.torch_version,
        "world_size": manifest.world_size,
        "meta": manifest.meta,
        "files": {
            name: {"size": file.size, "xxh3_64": file.xxh3_64}
            for name, file in sorted(manifest.files.items())
        },
    }
    body["checksum"] = _checksum(body)
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)  # the data files' names, before the manifest's
    temporary.rename(folder / NAME)
    fsync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        BrokenCheckpointError: it is missing, damaged, or of another version.
    """
    try:
        body = json.loads((folder / NAME).read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
    except FileNotFoundError:
        raise BrokenCheckpointError(f"no {NAME}: the save was never completed") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BrokenCheckpointError(f"{NAME} cannot be read: {error!r}") from None
    if body.get("version") != VERSION:
        raise BrokenCheckpointError(
            f"{NAME} has version {body.get('version')}; this program reads version {VERSION}"
        )
    if checksum != _checksum(body):
        raise BrokenCheckpointError(f"{NAME} is damaged: its own checksum does not hold")
    return Manifest(
        step=body["step"],
        meta=body["meta"],
        files={
            name: Fingerprint(size=file["size"], xxh3_64=file["xxh3_64"])
            for name, file in body["files"].items()
        },
        world_size=body["world_size"],
        torch_version=body["torch"],
        time=body["time"],
    )


def check_files(
    folder: Path, manifest: Manifest, names: Iterable[str], *, threads: int = 4
) -> str | None:
    """Why the files `names` are not what the manifest says; None when they are."""
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(lambda name: _check_file(folder / name, manifest.files[name]), names)
        return next((reason for reason in reasons if reason is not None), None)


def _check_file(path: Path, expected: Fingerprint) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size} bytes instead of {expected.size}"
        found = fingerprint(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    if found != expected:
        return f"{path.name} is damaged: checksum {found.xxh3_64} instead of {expected.xxh3_64}"
    return None


def fsync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64(canonical.encode()).hexdigest()
