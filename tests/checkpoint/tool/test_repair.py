"""`phalanx checkpoint verify`: whatever is broken is named, and mended wherever it can be."""

import itertools
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoint.boxes import whole
from phalanx.checkpoint.format.manifest import BACKUP, NAME, read_manifest, write_manifest
from phalanx.checkpoint.storage.local import LocalStorage
from phalanx.checkpoint.storage.metered import Metered
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.check import verify
from phalanx.checkpoint.tool.places import find
from phalanx.checkpoint.tool.reading import Reader
from tests.checkpoint.stored import make, tensors

pytestmark = pytest.mark.storage

STEP = "step_00000100"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Four nodes of two ranks each, any two of which may be lost; parts of unequal size."""
    make(tmp_path / "good", 100, tensors(1), ranks=8, nodes=4, parity=2)
    return tmp_path / "good"


def copy_of(good: Path) -> Path:
    copy = good.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    return copy


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in (one / STEP).iterdir())
    return names == sorted(path.name for path in (other / STEP).iterdir()) and all(
        (one / STEP / name).read_bytes() == (other / STEP / name).read_bytes() for name in names
    )


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def test_a_good_one_is_fine_and_not_touched(good: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (good / STEP).iterdir()}
    report = verify(find(str(good)), repair=True)
    assert report.fine
    assert "complete, 12 files of" in report.lines[0]
    assert {path: path.stat().st_mtime_ns for path in (good / STEP).iterdir()} == before


def test_the_bad_shard_is_named(good: Path) -> None:
    manifest = read_manifest(open_storage(good), STEP)
    part = manifest.parts[3]
    entry = next(entry for entry in part.table.entries if entry.name == "model.layers.1.w")
    flip(good / STEP / part.file, part.data_begin + entry.begin + 5)
    report = verify(find(str(good / STEP)))
    assert not report.fine
    [file] = report.content["checkpoints"][0]["files"]
    assert file["file"] == part.file
    assert file["reason"].endswith("; broken: model.layers.1.w[15:20,0:24]")
    assert file["mendable_from"] == "parity"
    assert "  mend all: phalanx checkpoint verify --repair " in report.lines[-1]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_every_set_of_lost_nodes(good: Path, lost: int) -> None:
    manifest = read_manifest(open_storage(good), STEP)
    for nodes in itertools.combinations(range(4), lost):
        copy = copy_of(good)
        gone = [file for file in manifest.files.values() if file.member in nodes]
        for file in gone:
            (copy / STEP / file.file).unlink()
        report = verify(find(str(copy)), repair=True)
        assert report.fine == (lost <= 2), nodes
        assert same(good, copy) == (lost <= 2)
        [found] = report.content["checkpoints"]
        assert found["state"] == ("mended" if lost <= 2 else "broken")
        assert {item["file"] for item in found["files"]} == {file.file for file in gone}
        if lost > 2:
            assert "what is left needs another copy" in report.lines[-1]
            assert all(item["mended_from"] is None for item in found["files"])


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_single_faults_are_all_found_and_mended(good: Path, count: int) -> None:
    """Flips, truncations, deletions, swaps and strangers, of every file there is."""
    make(good.parent / "stranger", 100, tensors(2), ranks=8, nodes=4, parity=2)
    chance = random.Random(0)
    names = sorted(path.name for path in (good / STEP).iterdir())
    for number in range(count):
        copy = copy_of(good)
        path = copy / STEP / chance.choice(names)
        size = path.stat().st_size
        kind = ("flip", "truncate", "delete", "swap", "stranger")[number % 5]
        if kind == "flip":
            flip(path, chance.randrange(size))
        elif kind == "truncate":
            path.write_bytes(path.read_bytes()[: chance.randrange(size)])
        elif kind == "delete":
            path.unlink()
        elif kind == "swap":
            other = copy / STEP / chance.choice([name for name in names if name != path.name])
            content = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            shutil.copyfile(good.parent / "stranger" / STEP / path.name, path)
        if same(good, copy):
            assert kind == "swap"  # of the manifest and its backup
            continue
        said = verify(find(str(copy / STEP)))
        assert not said.fine, (kind, path.name)
        report = verify(find(str(copy / STEP)), repair=True)
        assert report.fine, (kind, path.name, report.lines)
        assert same(good, copy), (kind, path.name)


def test_repair_from_a_copy_in_another_layout(good: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", 100, tensors(1), ranks=3, dim=1)
    make(tmp_path / "wrong", 100, tensors(2), ranks=3, dim=1)
    copy = copy_of(good)
    for file in read_manifest(open_storage(good), STEP).files.values():
        if file.member:  # all nodes but the first: more than parity makes up for
            (copy / STEP / file.file).unlink()
    place = find(str(copy))
    assert not verify(place, repair=True).fine
    report = verify(place, repair=True, other=find(str(tmp_path / "wrong")))
    assert not report.fine
    assert "mending failed: part-" in "\n".join(report.lines)
    assert len(list((copy / STEP).glob("part-*"))) == 2
    make(tmp_path / "later", 200, tensors(1))
    report = verify(place, repair=True, other=find(str(tmp_path / "later")))
    assert report.lines[-1] == f"  {tmp_path}/later has no checkpoint of step 100 to mend from"
    assert verify(place, repair=True, other=find(str(tmp_path / "other"))).fine
    assert same(good, copy)


def test_a_folder_is_checked_whole_and_what_is_unfinished_is_no_fault(
    good: Path, tmp_path: Path
) -> None:
    make(good, 200, tensors(3))
    shutil.copytree(good / STEP, good / "step_00000300")
    (good / "step_00000300" / NAME).unlink()
    (good / "step_00000300" / BACKUP).unlink()
    report = verify(find(str(good)))
    assert report.fine
    states = [item["state"] for item in report.content["checkpoints"]]
    assert states == ["complete", "complete", "unfinished"]
    assert not verify(find(str(good / "step_00000300"))).fine


def test_a_save_that_ended_before_its_last_file_is_committed(good: Path) -> None:
    (good / STEP / NAME).unlink()
    assert not verify(find(str(good / STEP))).fine
    assert verify(find(str(good / STEP)), repair=True).fine
    assert read_manifest(open_storage(good), STEP).step == 100


def test_a_half_deleted_one_is_not_committed(good: Path) -> None:
    (good / STEP / NAME).unlink()
    (good / STEP / "part-00000.safetensors").unlink()
    report = verify(find(str(good)), repair=True)
    assert report.fine
    assert report.content["checkpoints"][0]["state"] == "unfinished"
    assert not (good / STEP / NAME).exists()
    assert verify(find(str(good / STEP)), repair=True).fine  # it is meant: then it is tried
    for name in (NAME, BACKUP):  # with these, deleting begins
        (good / STEP / name).unlink()
    report = verify(find(str(good / STEP)), repair=True)
    assert not report.fine
    assert report.content["checkpoints"][0]["state"] == "unfinished"


def test_without_parity_only_another_copy_helps(tmp_path: Path) -> None:
    make(tmp_path / "a", 100, tensors(1))
    (tmp_path / "a" / STEP / "part-00001.safetensors").unlink()
    report = verify(find(str(tmp_path / "a")), repair=True)
    assert not report.fine
    assert "part-00001.safetensors is missing; cannot be mended from parity" in report.lines[1]
    make(tmp_path / "b", 100, tensors(1))
    assert verify(find(str(tmp_path / "a")), repair=True, other=find(str(tmp_path / "b"))).fine


def test_a_box_that_no_file_holds_is_told(tmp_path: Path) -> None:
    """As it was saved: every checksum holds, and yet a tensor is not whole."""
    make(tmp_path / "a", 100, tensors(1))
    storage = open_storage(tmp_path / "a")
    manifest = read_manifest(storage, STEP)
    write_manifest(storage, STEP, replace(manifest, parts=manifest.parts[1:]))
    report = verify(find(str(tmp_path / "a")), repair=True)
    assert not report.fine
    assert report.lines == [
        f"{tmp_path}/a/{STEP}: broken: model.layers.0.w: the boxes hold 648 of 888 elements"
    ]


def test_each_file_is_read_once(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()
    read_into = Metered.read_into

    def counted(self: Metered, path: str, offset: int, view: memoryview) -> None:
        read.append(len(view))
        read_into(self, path, offset, view)

    monkeypatch.setattr(Metered, "read_into", counted)
    assert verify(find(str(good))).fine
    assert sum(read) == read_manifest(open_storage(good), STEP).nbytes


def test_a_repair_that_was_killed_half_way_goes_on(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files bore each other's names; of what was right only a copy put aside is left."""
    one, two = (good / STEP / f"part-0000{number}.safetensors" for number in (1, 5))
    before = {path.name: path.read_bytes() for path in (good / STEP).iterdir()}
    right = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(right)
    write, calls = LocalStorage.write, list[str]()

    def failing(self: LocalStorage, path: str, *args: Any, **kwargs: Any) -> int:
        calls.append(path)
        if len(calls) == 4:
            raise OSError("the machine goes down")
        return write(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", failing)
        with pytest.raises(OSError, match="goes down"):
            verify(find(str(good)), repair=True)
    for path in (good / STEP).glob("parity-*"):
        path.unlink()
    assert not verify(find(str(good))).fine
    verify(find(str(good)), repair=True)
    verify(find(str(good)), repair=True)
    assert {path.name: path.read_bytes() for path in (good / STEP).iterdir()} == before


def test_groups_are_mended_apart(tmp_path: Path) -> None:
    """A reader gets the values again, bit for bit, though a node is lost in each of two groups."""
    arrays = tensors(1)
    make(tmp_path / "a", 100, arrays, ranks=6, groups=[(0, 2, 4), (1, 3, 5)], parity=1)
    for member in (4, 1):
        for path in (tmp_path / "a" / STEP).glob(f"*{member:05d}*"):
            path.unlink()
    assert verify(find(str(tmp_path / "a")), repair=True).fine
    storage = open_storage(tmp_path / "a")
    reader = Reader(storage, STEP, read_manifest(storage, STEP))
    for name, array in arrays.items():
        found = reader.read(name, whole(array.shape))
        assert np.array_equal(found, array.view(found.dtype))
