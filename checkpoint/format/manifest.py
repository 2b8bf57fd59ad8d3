"""The file that makes a folder a checkpoint: written last, with every file's table and checksums.

A folder without `manifest.json` is the leftover of a crash, or, where its backup and every other
file stand, has lost it. One whose manifest does not parse, or does not hold its own checksum, or
whose files differ from it, is broken. `manifest.backup.json` holds the same bytes and is written
just before, so that a damaged manifest can be repaired.
Torch-free.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import xxhash

from phalanx.checkpoint.boxes import TensorInfo
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.format.table import HEADER_ALIGN, Entry
from phalanx.checkpoint.storage.base import NotAFileError, Storage

NAME = "manifest.json"
BACKUP = "manifest.backup.json"
VERSION = 2
TAIL = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n')
"""How a manifest ends: the checksum is of every byte before."""
TAIL_BYTES = len(b',"checksum":"0123456789abcdef"}\n')


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    """Training steps done."""
    meta: dict[str, Any]
    """The saver's own facts: configuration, layout, data position, ..."""
    parts: tuple[StoredPart, ...]
    """Files of boxes; a member's data are its parts' boxes back to back, in this order."""
    parity: tuple[StoredParity, ...] = ()
    """Files of parity."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Members that parity ties together."""
    num_parity: int = 0
    """Members of a group that may be lost."""
    world_size: int
    """Ranks that saved."""
    torch_version: str
    """torch that saved."""
    phalanx_version: str
    """phalanx that saved."""
    time: float
    """Seconds since 1970."""

    @property
    def files(self) -> dict[str, StoredPart | StoredParity]:
        """Every other file of the folder, by name."""
        found: dict[str, StoredPart | StoredParity] = {part.file: part for part in self.parts}
        return found | {item.file: item for item in self.parity}

    @property
    def nbytes(self) -> int:
        """Bytes of all those files."""
        return sum(part.size for part in self.parts) + sum(item.size for item in self.parity)


def new_manifest(
    *,
    step: int,
    meta: dict[str, Any],
    parts: Iterable[StoredPart],
    world_size: int,
    parity: Iterable[StoredParity] = (),
    groups: Iterable[Iterable[int]] = (),
    num_parity: int = 0,
) -> Manifest:
    """A manifest of this moment and these versions."""
    return Manifest(
        step=step,
        meta=meta,
        parts=tuple(parts),
        parity=tuple(parity),
        groups=tuple(tuple(group) for group in groups),
        num_parity=num_parity,
        world_size=world_size,
        torch_version=version("torch"),  # of the installed package: nothing is imported
        phalanx_version=version("phalanx-train"),
        time=time.time(),
    )


def write_manifest(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Commit a folder: it counts as a checkpoint once this returned, also after a power cut.

    Raises:
        ValueError: the manifest contradicts itself, so it could not be read again.
        OSError: it cannot be written.
    """
    _check(manifest)
    body = {
        "step": manifest.step,
        "time": manifest.time,
        "phalanx": manifest.phalanx_version,
        "torch": manifest.torch_version,
        "world_size": manifest.world_size,
        "num_parity": manifest.num_parity,
        "groups": manifest.groups,
        "meta": manifest.meta,
        "parity": [item.to_json() for item in manifest.parity],
        "parts": [part.to_json() for part in manifest.parts],
    }
    text = f'{{"version":{VERSION},"body":{json.dumps(body, separators=(",", ":"))}'.encode()
    text += f',"checksum":"{xxhash.xxh3_64_hexdigest(text)}"}}\n'.encode()
    storage.write(f"{folder}/{BACKUP}", [text])
    storage.write(f"{folder}/{NAME}", [text])


def read_manifest(storage: Storage, folder: str, *, name: str = NAME) -> Manifest:
    """Read a folder's manifest, or its backup by that name.

    Raises:
        BrokenCheckpointError: it is missing, damaged, of another version, or no manifest.
        OSError: the storage cannot be read.
    """
    try:
        text = storage.read(f"{folder}/{name}")
    except NotAFileError as error:
        raise BrokenCheckpointError(f"{name} {error.strerror}") from None
    except FileNotFoundError:
        raise BrokenCheckpointError(f"no {name}: the save was never completed") from None
    tail = TAIL.fullmatch(text[-TAIL_BYTES:])
    content = memoryview(text)[:-TAIL_BYTES]
    if tail is None:
        raise BrokenCheckpointError(_why_foreign(text, name))
    if tail[1].decode() != xxhash.xxh3_64_hexdigest(content):
        raise BrokenCheckpointError(_damaged(name))
    try:
        document = json.loads(bytes(content) + b"}")  # as it was written: its checksum holds
        found = document["version"]
        if type(found) is not int:
            raise TypeError(f"version {found!r} is no whole number")
        if found != VERSION:
            raise BrokenCheckpointError(_other_version(found, name))
        manifest = _from_body(document["body"])
        _check(manifest)
    except BrokenCheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{name} contradicts itself: {error}") from error
    return manifest


def _from_body(body: Mapping[str, Any]) -> Manifest:
    return Manifest(
        step=int(body["step"]),
        meta=dict(body["meta"]),
        parts=tuple(map(StoredPart.from_json, body["parts"])),
        parity=tuple(map(StoredParity.from_json, body["parity"])),
        groups=tuple(tuple(map(int, group)) for group in body["groups"]),
        num_parity=int(body["num_parity"]),
        world_size=int(body["world_size"]),
        torch_version=str(body["torch"]),
        phalanx_version=str(body["phalanx"]),
        time=float(body["time"]),
    )


def _check(manifest: Manifest) -> None:
    """Raises ValueError where the files, boxes, tensors or groups cannot be as they are said."""
    _check_files(manifest)
    seen: dict[str, TensorInfo] = {}
    for part in manifest.parts:
        for entry in part.table.entries:
            known = seen.setdefault(entry.name, entry.info)
            if known is not entry.info and known != entry.info:
                raise ValueError(
                    f"{entry.name} is {entry.info.dtype} {entry.info.shape} in {part.file} and "
                    f"{known.dtype} {known.shape} in another file"
                )
            _check_box(part.file, entry)
    members = [member for group in manifest.groups for member in group]
    if len(set(members)) != len(members):
        raise ValueError("a member is in two parity groups")
    if manifest.num_parity:
        used = {part.member for part in manifest.parts} | {p.member for p in manifest.parity}
        strangers = used - set(members)
        if strangers:
            raise ValueError(f"members {sorted(strangers)} are in no parity group")


def _check_files(manifest: Manifest) -> None:
    if len(manifest.files) != len(manifest.parts) + len(manifest.parity):
        raise ValueError("a file is listed twice")
    for name in manifest.files:
        if name in ("", ".", "..", NAME, BACKUP) or "/" in name:  # it would lead elsewhere
            raise ValueError(f"{name!r} is no name of a file in a checkpoint")
    for part in manifest.parts:
        if len(part.digests) != len(part.table.entries):
            raise ValueError(
                f"{part.file}: {len(part.digests)} checksums of {len(part.table.entries)} boxes"
            )
        if part.data_begin <= 0 or part.data_begin % HEADER_ALIGN:
            raise ValueError(
                f"{part.file}: {part.size} bytes cannot hold {part.table.nbytes} bytes of boxes"
            )


def _check_box(file: str, entry: Entry) -> None:
    for begin, size, end in zip(entry.box.offsets, entry.box.sizes, entry.info.shape, strict=True):
        if begin < 0 or size < 0 or begin + size > end:
            raise ValueError(f"{file}: {entry.key} is no box of {entry.info.shape}")


def _why_foreign(text: bytes, name: str) -> str:
    """What is wrong with a manifest that does not end as this version's do."""
    try:
        found = json.loads(text)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if isinstance(found, int) and found != VERSION:
        return _other_version(found, name)
    return _damaged(name)


def _damaged(name: str) -> str:
    return f"{name} is damaged: its own checksum does not hold"


def _other_version(found: int, name: str) -> str:
    if found < VERSION:
        return (
            f"{name} has version {found}: made by an older version of phalanx; use "
            "`phalanx checkpoint convert`"
        )
    return (
        f"{name} has version {found}: made by a newer version of phalanx than "
        f"{version('phalanx-train')}, which reads version {VERSION}"
    )
