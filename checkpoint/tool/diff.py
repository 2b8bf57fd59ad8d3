"""`phalanx checkpoint show --diff A B`: in what two checkpoints differ, whatever their layouts."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from phalanx.checkpoint.boxes import ITEM_BYTES, TensorInfo, whole
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.tool.places import CheckpointPlace
from phalanx.checkpoint.tool.progress import byte_bar
from phalanx.checkpoint.tool.reading import Array, Reader, tensors_of
from phalanx.checkpoint.tool.report import Outcome, columns, plural
from phalanx.checkpoint.tool.show import shards_of
from phalanx.checkpoint.tool.state import wrong_files

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def diff(a: CheckpointPlace, b: CheckpointPlace, *, step: int | None = None) -> Outcome:
    """Compare tensors bit by bit, and what the savers told about themselves.

    Tensors that are cut alike are compared by their checksums; of others, contents are read. Files
    that are missing or of a wrong size are told.

    Raises:
        ValueError: a checkpoint is missing.
        BrokenCheckpointError: a manifest, or a shard that had to be read, is damaged.
    """
    folders = a.one(step), b.one(step)
    manifests = a.manifest(folders[0]), b.manifest(folders[1])
    settings = list(_settings(*manifests))
    tensors = list(_tensors((a, b), folders, manifests))
    urls = a.url(folders[0]), b.url(folders[1])
    lines = [f"A {urls[0]}", f"B {urls[1]}"]
    if settings:
        shown = [(name, str(one), str(two)) for name, one, two in settings]
        lines += ["", *columns([("setting", "A", "B"), *shown])]
    if tensors:
        lines += ["", *columns([("tensor", "differs"), *tensors])]
    same = len(tensors_of(manifests[0]).keys() | tensors_of(manifests[1]).keys()) - len(tensors)
    lines += ["", f"{plural(same, 'tensor')} equal, {len(tensors)} not"]
    wrong = [
        {"url": place.url(folder), "file": file, "reason": why}
        for place, folder, manifest in zip((a, b), folders, manifests, strict=True)
        for file, why in wrong_files(place.storage, folder, manifest.files.values()).items()
    ]
    lines += [f"{item['url']} is broken: {item['reason']}" for item in wrong]
    content = {
        "a": urls[0],
        "b": urls[1],
        "settings": [{"name": n, "a": one, "b": two} for n, one, two in settings],
        "tensors": [{"name": name, "differs": what} for name, what in tensors],
        "equal": same,
        "wrong_files": wrong,
    }
    return Outcome(lines=lines, content=content, fine=not tensors and not wrong)


def _settings(a: Manifest, b: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """What the savers tell of themselves and differs."""
    flat = [
        dict(_flat({"step": m.step, "torch": m.torch_version, "ranks": m.world_size} | m.meta))
        for m in (a, b)
    ]
    for name in sorted(flat[0].keys() | flat[1].keys()):
        one, two = flat[0].get(name, "-"), flat[1].get(name, "-")
        if one != two:
            yield name, one, two


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _tensors(
    places: tuple[CheckpointPlace, CheckpointPlace],
    folders: tuple[str, str],
    manifests: tuple[Manifest, Manifest],
) -> Iterator[tuple[str, str]]:
    """Names of tensors that differ, and how."""
    infos = [tensors_of(manifest) for manifest in manifests]
    readers = [
        Reader(place.storage, folder, manifest)
        for place, folder, manifest in zip(places, folders, manifests, strict=True)
    ]
    pieces = [_digests(manifest) for manifest in manifests]
    names = sorted(infos[0].keys() | infos[1].keys())
    unlike = [
        name
        for name in names
        if infos[0].get(name) == infos[1].get(name) and pieces[0][name] != pieces[1][name]
    ]
    total = sum(whole(infos[0][n].shape).numel * ITEM_BYTES[infos[0][n].dtype] for n in unlike)
    with byte_bar("comparing", total) as done:
        for name in names:
            one, two = infos[0].get(name), infos[1].get(name)
            if one is None or two is None:
                yield name, f"only in {'B' if one is None else 'A'}"
            elif one != two:
                yield name, f"A {one.dtype} {list(one.shape)}, B {two.dtype} {list(two.shape)}"
            elif pieces[0][name] != pieces[1][name]:
                box = whole(one.shape)
                a, b = (reader.read(name, box) for reader in readers)
                done(box.numel * ITEM_BYTES[one.dtype])
                if not np.array_equal(a, b):
                    yield name, _how(one, a, b)


def _digests(manifest: Manifest) -> dict[str, set[tuple[Any, str]]]:
    """Boxes and their checksums, by tensor."""
    return {
        name: {(entry.box, digest) for _, entry, digest in pieces}
        for name, pieces in shards_of(manifest).items()
    }


def _how(info: TensorInfo, a: Array, b: Array) -> str:
    """How many elements differ, and by how much at most."""
    count = int((a != b).sum())
    text = f"{count:,} of {a.size:,} elements"
    numbers = _as_floats(info.dtype, a), _as_floats(info.dtype, b)
    if numbers[0] is None or numbers[1] is None:
        return text
    with np.errstate(invalid="ignore", over="ignore"):
        most = np.nanmax(np.abs(numbers[0] - numbers[1]), initial=0.0)
    return f"{text}, by at most {most:.3g}"


def _as_floats(dtype: str, values: Array) -> Array | None:
    """Opaque items as the numbers that they are; None for what is no float."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in _FLOATS:
        return values.view(_FLOATS[dtype]).astype(np.float64)
    return None
