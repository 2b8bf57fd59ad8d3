"""Checkpoints made by hand, for tests of what reads them: any cut, with parity or without."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from phalanx.checkpoint.boxes import Box, TensorInfo, whole
from phalanx.checkpoint.erasure.codec import Codec
from phalanx.checkpoint.erasure.stripes import Stripes
from phalanx.checkpoint.format.folders import folder_name, prepare_folder
from phalanx.checkpoint.format.manifest import Manifest, new_manifest, write_manifest
from phalanx.checkpoint.format.part_file import write_part
from phalanx.checkpoint.format.stored import StoredParity
from phalanx.checkpoint.format.table import Entry, PartTable, lay_out
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage

Arrays = Mapping[str, np.ndarray]
KINDS = {"float32": "F32", "float64": "F64", "uint8": "U8", "uint16": "BF16", "int64": "I64"}


def tensors(seed: int = 0, *, scale: int = 1) -> dict[str, np.ndarray]:
    """Matrices, a vector, a number, bytes and something empty."""
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {
        f"model.layers.{layer}.w": random.normal(size=(37 * scale, 24)).astype(np.float32)
        for layer in range(3)
    }
    found["model.norm"] = random.normal(size=(50,)).astype(np.float32)
    found["model.half"] = random.integers(0, 2**15, (16, 9), dtype=np.uint16)
    found["optim.step.norm"] = np.float32(seed + 7)[()].reshape(())
    found["rng.cpu.0"] = random.integers(0, 255, (77,), dtype=np.uint8)
    found["model.empty"] = np.zeros((0, 4), np.float32)
    return found


def cut(arrays: Arrays, ranks: int, *, dim: int = 0) -> list[PartTable]:
    """Every tensor cut along `dim` (or 0) into equal parts rounded up; numbers go to rank 0."""
    parts: list[dict[str, list[tuple[TensorInfo, Box]]]] = [{} for _ in range(ranks)]
    for name, array in arrays.items():
        info = TensorInfo(dtype=KINDS[str(array.dtype)], shape=array.shape)
        along = min(dim, array.ndim - 1)
        for rank in range(ranks):
            offsets, sizes = [0] * array.ndim, list(array.shape)
            if array.ndim:
                rows = -(-array.shape[along] // ranks)
                offsets[along] = min(rank * rows, array.shape[along])
                sizes[along] = min(rows, array.shape[along] - offsets[along])
            if (array.ndim and all(sizes)) or rank == 0:
                parts[rank].setdefault(name, []).append((info, Box(tuple(offsets), tuple(sizes))))
    return [lay_out(boxes) for boxes in parts]


def make(
    root: str | Path,
    step: int,
    arrays: Arrays,
    *,
    config: StorageConfig | None = None,
    **cutting: Any,
) -> Manifest:
    """Write the checkpoint of a step below `root`; `cutting` is of `write`."""
    return write(open_storage(root, config), folder_name(step), step, arrays, **cutting)


def save(storage: Storage, step: int, *, seed: int = 0, ranks: int = 2) -> tuple[str, Manifest]:
    """Save `tensors(seed)` as a run does, each time in a new folder: its name, and the manifest."""
    folder = prepare_folder(storage, step)
    return folder, write(storage, folder, step, tensors(seed), ranks=ranks)


def write(
    storage: Storage,
    folder: str,
    step: int,
    arrays: Arrays,
    *,
    ranks: int = 4,
    dim: int = 0,
    nodes: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    parity: int = 0,
    meta: dict[str, Any] | None = None,
) -> Manifest:
    """Write a checkpoint, part by part as ranks do; nodes are one parity group unless told."""
    nodes = nodes or ranks
    groups = groups or [range(nodes)]
    parts, data = [], [bytearray() for _ in range(nodes)]
    for rank, table in enumerate(cut(arrays, ranks, dim=dim)):
        pieces = [piece_of(arrays, entry).tobytes() for entry in table.entries]
        member = rank // (ranks // nodes)
        data[member] += b"".join(pieces)
        parts.append(
            write_part(
                storage,
                f"{folder}/part-{rank:05d}.safetensors",
                table,
                lambda index, pieces=pieces: memoryview(pieces[index]),
                member=member,
            )
        )
    manifest = new_manifest(
        step=step,
        meta={"kind": "training", "step": step, "layout": {"pp": 1, "dp_shard": ranks}}
        | (meta or {}),
        parts=parts,
        world_size=ranks,
        parity=[
            file
            for group in groups
            if parity
            for file in _write_parity(storage, folder, group, [data[i] for i in group], parity)
        ],
        groups=groups if parity else (),
        num_parity=parity,
    )
    write_manifest(storage, folder, manifest)
    return manifest


def piece_of(arrays: Arrays, entry: Entry) -> np.ndarray:
    """What a stored box holds."""
    array = arrays[entry.name]
    return np.ascontiguousarray(array[entry.box.slices_in(whole(array.shape))])


def _write_parity(
    storage: Storage, folder: str, group: Sequence[int], data: list[bytearray], parity: int
) -> list[StoredParity]:
    """The parity files, encoded stripe by stripe as Stripes says."""
    lengths = [len(item) for item in data]
    stripes = Stripes.for_lengths(lengths, parity)
    memory = [bytearray(stripes.parity_bytes) for _ in data]
    codec, unit = Codec(stripes.k, parity), stripes.unit_bytes
    for stripe in range(stripes.n):
        sources = []
        for index, member in enumerate(stripes.data_members(stripe)):
            begin, end = stripes.data_range(index, lengths[member])
            sources.append(bytes(data[member][begin:end]).ljust(unit, b"\0"))
        made = [bytearray(unit) for _ in range(parity)]
        codec.encode(sources, made)
        for number, member in enumerate(stripes.parity_members(stripe)):
            memory[member][number * unit : (number + 1) * unit] = made[number]
    found = []
    for member, content in zip(group, memory, strict=True):
        file = f"parity-{member:05d}.bin"
        size = storage.write(f"{folder}/{file}", [content])
        digest = xxhash.xxh3_64_hexdigest(content)
        found.append(StoredParity(file=file, size=size, xxh3_64=digest, member=member))
    return found
