"""A small checkpoint in any storage, written part by part as ranks do."""

from typing import Any

import numpy as np

from phalanx.checkpoint.folders import prepare_folder
from phalanx.checkpoint.format import Box, TensorInfo, lay_out
from phalanx.checkpoint.manifest import Manifest, StoredPart, new_manifest, write_manifest
from phalanx.checkpoint.part_file import write_part
from phalanx.checkpoint.storage import Storage

DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8"}

Cut = dict[str, tuple[Box, np.ndarray]]
"""A box of each of some tensors, and what it holds."""


def some_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Of several types and ranks; one is a scalar, one has fewer rows than there are parts."""
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.standard_normal((40, 8)).astype(np.float32),
        "layers.0.bias": rng.standard_normal(7),
        "optim.codes": rng.integers(0, 256, (33, 3), dtype=np.uint8),
        "optim.step": np.array(seed, dtype=np.int64),
        "one": rng.standard_normal((1, 4)).astype(np.float32),
    }


def cut(tensors: dict[str, np.ndarray], parts: int) -> list[Cut]:
    """The tensors cut along their first dim, by part; scalars are in the first."""
    found: list[Cut] = [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            found[0][name] = (Box((), ()), tensor)
            continue
        begin = 0
        for part, rows in enumerate(np.array_split(tensor, parts)):
            if len(rows):
                found[part][name] = (Box((begin, *(0,) * (tensor.ndim - 1)), rows.shape), rows)
            begin += len(rows)
    return found


def save_part(storage: Storage, path: str, boxes: Cut, shapes: dict[str, Any]) -> StoredPart:
    """Write the file of one part."""
    table = lay_out(
        {
            name: [(TensorInfo(dtype=DTYPES[str(array.dtype)], shape=shapes[name]), box)]
            for name, (box, array) in boxes.items()
        }
    )

    def read(index: int) -> memoryview:
        return memoryview(boxes[table.entries[index].name][1].tobytes())

    return write_part(storage, path, table, read)


def save_checkpoint(
    storage: Storage, step: int, *, seed: int = 0, parts: int = 2
) -> tuple[str, Manifest]:
    """A complete checkpoint of `some_tensors(seed)`: its folder and its manifest."""
    tensors = some_tensors(seed)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    folder = prepare_folder(storage, step)
    stored = [
        save_part(storage, f"{folder}/part-{rank:05d}.safetensors", boxes, shapes)
        for rank, boxes in enumerate(cut(tensors, parts))
    ]
    manifest = new_manifest(step=step, meta={"lr": 0.1}, parts=stored, world_size=parts)
    write_manifest(storage, folder, manifest)
    return folder, manifest
