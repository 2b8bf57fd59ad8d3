"""Manifests, files of parts, their checksums, and that boxes cover every tensor once."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from phalanx.checkpoint.boxes import Box, TensorInfo
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.checksums import check_files
from phalanx.checkpoint.format.coverage import uncovered, why_uncovered
from phalanx.checkpoint.format.manifest import (
    BACKUP,
    NAME,
    new_manifest,
    read_manifest,
    write_manifest,
)
from phalanx.checkpoint.format.part_file import write_part
from phalanx.checkpoint.format.stored import StoredParity, StoredPart
from phalanx.checkpoint.format.table import Entry, PartTable, lay_out
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.open import open_storage
from tests.checkpoint.stored import piece_of, save, tensors, write


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def table_of(*rows: tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> Any:
    return PartTable.from_json(rows)


def stored(table: PartTable, file: str = "part-00000.safetensors", **facts: Any) -> StoredPart:
    return StoredPart(
        file=file,
        size=facts.pop("size", 64 + table.nbytes),
        xxh3_64="0" * 16,
        table=table,
        digests=("0" * 16,) * len(table.entries),
        **facts,
    )


def test_a_manifest_returns_what_was_written(storage: Storage) -> None:
    part = stored(table_of(("w", "F32", (8, 4), (4, 0), (4, 4)), ("s", "I64", (), (), ())))
    parity = StoredParity(file="parity-00001.bin", size=64, xxh3_64="ab" * 8, member=1)
    written = new_manifest(
        step=7,
        meta={"lr": 0.1, "x": [1, None, "ä"], "huge": 1e308},
        parts=[part],
        parity=[parity],
        groups=[(0, 1)],
        num_parity=1,
        world_size=3,
    )
    write_manifest(storage, "step_00000007", written)
    assert read_manifest(storage, "step_00000007") == written
    assert read_manifest(storage, "step_00000007", name=BACKUP) == written
    assert written.torch_version == version("torch")
    assert written.phalanx_version == version("phalanx-train")
    assert set(written.files) == {part.file, parity.file}
    assert written.nbytes == part.size + parity.size
    assert StoredPart.from_json(json.loads(json.dumps(part.to_json()))) == part
    assert StoredParity.from_json(json.loads(json.dumps(parity.to_json()))) == parity
    json.loads(storage.read(f"step_00000007/{NAME}"))  # whoever looks finds JSON


def test_every_damage_of_one_bit_or_cut_is_refused(storage: Storage, tmp_path: Path) -> None:
    folder, _ = save(storage, 3)
    text = storage.read(f"{folder}/{NAME}")
    rng = random.Random(0)
    ends = [0, 1, 11, len(text) // 2, *range(len(text) - 40, len(text))]
    damaged = [text[:end] for end in ends]
    for at in [*range(40), *range(len(text) - 40, len(text)), *rng.sample(range(len(text)), 400)]:
        flipped = bytearray(text)
        flipped[at] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    damaged += [text + b" ", text + text, b"[]", b"null", b'{"version": "2"}', bytes(1000)]
    for broken in damaged:
        (tmp_path / folder / NAME).write_bytes(broken)
        with pytest.raises(BrokenCheckpointError, match=r"damaged: its own checksum|version"):
            read_manifest(storage, folder)
    assert read_manifest(storage, folder, name=BACKUP).step == 3


def test_no_manifest_and_other_versions_say_so(storage: Storage) -> None:
    with pytest.raises(BrokenCheckpointError, match="never completed"):
        read_manifest(storage, "step_00000001")
    storage.write(f"a/{NAME}", [b'{\n "version": 1,\n "step": 7,\n "checksum": "x"\n}'])
    with pytest.raises(BrokenCheckpointError, match="older version.*`phalanx checkpoint convert`"):
        read_manifest(storage, "a")
    storage.write(f"a/{NAME}", [b'{"version": 9, "form": "unknown"}'])
    with pytest.raises(BrokenCheckpointError, match="version 9: made by a newer version"):
        read_manifest(storage, "a")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([stored(table_of(("w", "F32", (8,), (6,), (4,))))], r"w\[6:10\] is no box of \(8,\)"),
        ([stored(table_of(("w", "F32", (8,), (-1,), (4,))))], "is no box"),
        ([stored(table_of(("w", "F32", (8,), (0,), (8,))), size=64)], "cannot hold 32 bytes"),
        ([stored(table_of(), file="../x")], "no name of a file"),
        ([stored(table_of(), file=NAME)], "no name of a file"),
        ([stored(table_of(), file="a"), stored(table_of(), file="a")], "listed twice"),
        (
            [
                stored(table_of(("w", "F32", (8,), (0,), (4,))), file="a"),
                stored(table_of(("w", "BF16", (8,), (4,), (4,))), file="b"),
            ],
            r"w is BF16 \(8,\) in b and F32 \(8,\) in another file",
        ),
        ([stored(table_of(("w", "F32", (8,), (0,), (8,))), member=3)], "in no parity group"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_both_ways(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, parts: list[StoredPart], reason: str
) -> None:
    manifest = new_manifest(
        step=1, meta={}, parts=parts, world_size=1, groups=[(0, 1)], num_parity=1
    )
    write_unchecked(storage, "a", manifest, monkeypatch)
    with pytest.raises(BrokenCheckpointError, match=reason):
        read_manifest(storage, "a")
    with pytest.raises(ValueError, match=reason):
        write_manifest(storage, "b", manifest)
    assert storage.names("b") == []


def write_unchecked(
    storage: Storage, folder: str, manifest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program with a bug, or of someone else, might."""
    with monkeypatch.context() as patch:
        patch.setattr("phalanx.checkpoint.format.manifest._check", lambda _manifest: None)
        write_manifest(storage, folder, manifest)


def test_part_files_are_safetensors(storage: Storage, tmp_path: Path) -> None:
    arrays = tensors(5) | {"f64": np.arange(7.0), "i64": np.array(5)}
    del arrays["model.half"]  # NumPy has no such type
    manifest = write(storage, "a", 3, arrays, ranks=3)
    for part in manifest.parts:
        found = load_file(tmp_path / "a" / part.file)
        assert len(found) == len(part.table.entries)
        for entry in part.table.entries:
            array = piece_of(arrays, entry)
            np.testing.assert_array_equal(found[entry.key], array)
            assert found[entry.key].dtype == array.dtype
    assert uncovered(manifest) is None
    assert check_files(storage, "a", manifest, manifest.files) == {}


def test_an_empty_part_and_empty_boxes_are_files_too(storage: Storage) -> None:
    info = TensorInfo(dtype="F32", shape=(0, 4))
    tables = lay_out({}), lay_out({"none": [(info, Box((0, 0), (0, 4)))]})
    parts = [
        write_part(storage, f"a/part-{i}", table, lambda _: memoryview(b""))
        for i, table in enumerate(tables)
    ]
    write_manifest(storage, "a", new_manifest(step=1, meta={}, parts=parts, world_size=2))
    manifest = read_manifest(storage, "a")
    assert check_files(storage, "a", manifest, manifest.files) == {}
    assert uncovered(manifest) is None


def test_damaged_files_are_found_and_the_broken_box_named(storage: Storage) -> None:
    folder, manifest = save(storage, 3)
    part = manifest.parts[1]
    path = f"{folder}/{part.file}"
    good = storage.read(path)

    def check(content: bytes) -> str:
        storage.write(path, [content])
        return check_files(storage, folder, manifest, manifest.files).get(part.file, "")

    def flipped(at: int) -> bytes:
        return good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :]

    for entry in part.table.entries:
        begin = part.data_begin + entry.begin
        for at in (begin, begin + entry.nbytes - 1):
            assert check(flipped(at)).endswith(f"; broken: {entry.key}")
    for at in (0, 8, part.data_begin - 1):
        assert check(flipped(at)).endswith("; broken: header")
    assert check(bytes(len(good))).endswith(
        "broken: header, model.layers.0.w[19:37,0:24], model.layers.1.w[19:37,0:24] and 4 more"
    )
    assert f"has {len(good) - 1} bytes instead of {len(good)}" in check(good[:-1])
    assert "bytes instead of" in check(good + b"\0")
    assert check(good) == ""
    storage.delete(path)
    assert check_files(storage, folder, manifest, manifest.files) == {
        part.file: f"{part.file} is missing"
    }


def test_swapped_and_foreign_files_are_found(storage: Storage) -> None:
    folder, manifest = save(storage, 3, seed=1)
    other, _ = save(storage, 4, seed=2)
    a, b = (part.file for part in manifest.parts)
    contents = {name: storage.read(f"{folder}/{name}") for name in (a, b)}
    storage.write(f"{folder}/{a}", [contents[b]])
    storage.write(f"{folder}/{b}", [contents[a]])
    assert set(check_files(storage, folder, manifest, manifest.files)) == {a, b}
    storage.write(f"{folder}/{b}", [contents[b]])
    storage.write(f"{folder}/{a}", [storage.read(f"{other}/{a}")])  # same boxes, another step's
    broken = check_files(storage, folder, manifest, manifest.files)
    assert set(broken) == {a}
    assert "model.layers.0.w[0:19,0:24]" in broken[a]


BOXES: list[tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]], str | None]] = [
    ((), [((), ())], None),
    ((), [], "0 of 1"),
    ((), [((), ()), ((), ())], "overlap"),
    ((6,), [((0,), (4,)), ((4,), (2,))], None),
    ((6,), [((0,), (4,)), ((5,), (1,))], "5 of 6"),
    ((6,), [((0,), (4,)), ((3,), (2,))], r"\[0:4\] and \[3:5\] overlap"),
    ((6,), [((0,), (6,)), ((0,), (6,))], "overlap"),
    ((4, 4), [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 4))], None),
    ((4, 4), [((0, 0), (4, 2)), ((2, 1), (2, 3)), ((0, 2), (1, 2))], "overlap"),
    ((0, 4), [], None),
]


@pytest.mark.parametrize(("shape", "boxes", "reason"), BOXES)
def test_coverage(shape: Any, boxes: Any, reason: str | None) -> None:
    found = why_uncovered(shape, [Box(*box) for box in boxes])
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found or "")


def random_cuts(rng: random.Random, shape: tuple[int, ...], count: int) -> list[Box]:
    """A tensor cut into boxes by repeated halving at random places."""
    boxes = [Box((0,) * len(shape), shape)]
    while len(boxes) < count:
        box = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        if box.sizes[dim] < 2:
            boxes.append(box)
            continue
        at = rng.randrange(1, box.sizes[dim])
        for begin, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += begin
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return boxes


def test_coverage_agrees_with_counting_every_element() -> None:
    rng = random.Random(1)
    for round_ in range(200):
        shape = tuple(rng.randrange(3, 9) for _ in range(rng.randrange(1, 4)))
        boxes = random_cuts(rng, shape, rng.randrange(1, 4))
        if round_ % 2:
            index = rng.randrange(len(boxes))
            moved = boxes[index].offsets
            dim = rng.randrange(len(shape))
            step = rng.choice((-1, 1))
            begin = moved[dim] + step
            if begin >= 0 and begin + boxes[index].sizes[dim] <= shape[dim]:
                offsets = (*moved[:dim], begin, *moved[dim + 1 :])
                boxes[index] = Box(offsets, boxes[index].sizes)
        counts = np.zeros(shape, dtype=int)
        for box in boxes:
            counts[box.slices_in(Box((0,) * len(shape), shape))] += 1
        assert (why_uncovered(shape, boxes) is None) == bool((counts == 1).all())


def test_an_uncovered_tensor_is_named(storage: Storage) -> None:
    _, manifest = save(storage, 3)
    lost = dataclasses.replace(manifest, parts=manifest.parts[:1])
    assert uncovered(lost) == "model.layers.0.w: the boxes hold 456 of 888 elements"
    twice = dataclasses.replace(manifest, parts=(*manifest.parts, manifest.parts[0]))
    assert "overlap" in (uncovered(twice) or "")


def test_tens_of_thousands_of_boxes_are_read_in_a_second(storage: Storage) -> None:
    entries: list[Entry] = []
    for tensor in range(500):
        info = TensorInfo(dtype="F32", shape=(4096, 100))
        for column in range(100):
            box = Box((0, column), (4096, 1))
            name = f"layers.{tensor}.attention.wq.weight/exp_avg"
            entries.append(Entry(name=name, info=info, box=box, begin=len(entries) * 16384))
    part = stored(PartTable(tuple(entries)))
    write_manifest(storage, "a", new_manifest(step=1, meta={}, parts=[part], world_size=1))
    start = time.process_time()
    assert uncovered(read_manifest(storage, "a")) is None
    assert time.process_time() - start < 10  # 0.7 s where nothing else runs


def test_reading_a_manifest_imports_neither_torch_nor_a_driver(
    storage: Storage, tmp_path: Path
) -> None:
    folder, _ = save(storage, 3)
    code = f"""
import sys
from phalanx.checkpoint.format.checksums import check_files
from phalanx.checkpoint.format.folders import complete_folders
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.storage.open import open_storage
storage = open_storage({str(tmp_path)!r})
assert complete_folders(storage) == {{3: {folder!r}}}
manifest = read_manifest(storage, {folder!r})
assert check_files(storage, {folder!r}, manifest, manifest.files) == {{}}
sys.exit(" ".join({{"torch", "fsspec", "s3fs", "numpy"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
