"""`phalanx checkpoint verify --repair` where not all can be mended: the rest is."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from phalanx.checkpoint.format.manifest import BACKUP, NAME, read_manifest, write_manifest
from phalanx.checkpoint.format.stored import StoredPart
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.check import verify
from phalanx.checkpoint.tool.places import find
from phalanx.launch.cli import main
from tests.checkpoint.stored import make, tensors

Captured = pytest.CaptureFixture[str]
STEP = "step_00000100"


def part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def flip(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut_off(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


def become_each_other(folder: Path, name: str) -> None:
    """The file and the first part bear each other's names."""
    one, other = folder / name, folder / part(0)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Two groups of three nodes each, of which one may be lost: (0, 2, 4) and (1, 3, 5)."""
    groups = [(0, 2, 4), (1, 3, 5)]
    make(tmp_path / "good", 100, tensors(1), ranks=6, groups=groups, parity=1)
    return tmp_path / "good"


Damage = Callable[[Path, str], None]


@pytest.mark.parametrize("lost", [flip, remove, cut_off])
@pytest.mark.parametrize(
    ("damage", "mended"),
    [
        (flip, [part(4)]),
        (remove, [part(4), "parity-00004.bin"]),
        (remove, [BACKUP]),
        (cut_off, [NAME]),
        (flip, [part(2), "parity-00002.bin", NAME]),
        (become_each_other, [part(2)]),
        (become_each_other, [NAME]),
    ],
)
def test_what_can_be_mended_is_and_the_rest_is_left_and_named(
    good: Path, capsys: Captured, lost: Damage, damage: Damage, mended: Sequence[str]
) -> None:
    """Two nodes of the second group have lost their files: more than parity makes up for."""
    shutil.copytree(good, good.parent / "copy")
    copy, left = good.parent / "copy" / STEP, [part(1), part(3)]
    for name in left:
        lost(copy, name)
    for name in mended:
        damage(copy, name)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", "verify", "--repair", str(copy)])
    assert end.value.code == 1
    after = {path.name: path.read_bytes() for path in copy.iterdir()}
    wanted = {path.name: path.read_bytes() for path in (good / STEP).iterdir()}
    for name in left:
        assert after.pop(name, None) == before.get(name)
        del wanted[name]
    assert after == wanted
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "cannot be mended" in line]
    assert [line.split()[0] for line in told] == left
    assert all(any(line.startswith(f"  {name}") for line in lines) for name in mended)
    assert lines[-1].startswith("  what is left needs another copy: --repair --from OTHER")


def test_without_repair_it_is_said_how_many_can_be_mended(good: Path) -> None:
    for number in (1, 3, 4):
        remove(good / STEP, part(number))
    lines = verify(find(str(good))).lines
    assert lines[-2] == f"  mend 1 of 3: phalanx checkpoint verify --repair {good}/{STEP}"
    assert lines[-1].startswith("  what is left needs another copy")


def test_parity_mends_what_the_other_copy_has_damaged(good: Path, tmp_path: Path) -> None:
    """Of two files, one can be had from the copy alone, and then the other from parity alone."""
    shutil.copytree(good / STEP, tmp_path / "bad" / STEP)
    make(tmp_path / "other", 100, tensors(1), ranks=6)
    flip(tmp_path / "other" / STEP, part(1))
    for number in (1, 3):
        remove(tmp_path / "bad" / STEP, part(number))
    report = verify(find(str(tmp_path / "bad")), repair=True, other=find(str(tmp_path / "other")))
    assert report.fine, report.lines
    [found] = report.content["checkpoints"]
    assert {item["file"]: item["mended_from"] for item in found["files"]} == {
        part(1): "parity",
        part(3): "the other copy",
    }
    assert (tmp_path / "bad" / STEP / part(1)).read_bytes() == (good / STEP / part(1)).read_bytes()


def test_another_copy_that_does_not_fit_spoils_nothing(good: Path, tmp_path: Path) -> None:
    """It is of another model: of its tensors some have fewer dims, and all have other values."""
    make(tmp_path / "other", 100, {name: a.reshape(-1) for name, a in tensors(2).items()})
    for number in (1, 3, 4):
        remove(good / STEP, part(number))
    report = verify(find(str(good)), repair=True, other=find(str(tmp_path / "other")))
    assert not report.fine
    assert report.content["checkpoints"][0]["left"] == [part(1), part(3)]
    failed = f"{part(1)} is missing; mending failed: {STEP}: model.layers.0.w has the shape [888]"
    assert failed in "\n".join(report.lines)
    assert (good / STEP / part(4)).exists()
    assert not (good / STEP / part(1)).exists()


@pytest.mark.parametrize("all_lost", [True, False])
def test_which_manifest_is_right_is_not_guessed(good: Path, tmp_path: Path, all_lost: bool) -> None:
    """The backup is of another checkpoint, with which this one has no file in common."""
    make(tmp_path / "other", 100, tensors(2), ranks=6)
    backup = good / STEP / BACKUP
    shutil.copyfile(tmp_path / "other" / STEP / BACKUP, backup)
    before = backup.read_bytes()
    for file in (good / STEP).glob("p*") if all_lost else [good / STEP / part(i) for i in (1, 3)]:
        file.unlink()
    report = verify(find(str(good)), repair=True)
    assert not report.fine
    assert (backup.read_bytes() == before) == all_lost
    assert ("which of the two is right is not clear" in "\n".join(report.lines)) == all_lost


def test_files_of_a_checkpoint_that_was_saved_wrong_are_mended_too(good: Path) -> None:
    """Of one tensor there is more than its boxes hold: no repair makes it whole."""
    storage = open_storage(good)
    manifest = read_manifest(storage, STEP)
    write_manifest(storage, STEP, replace(manifest, parts=tuple(map(longer, manifest.parts))))
    before = (good / STEP / part(4)).read_bytes()
    remove(good / STEP, part(4))
    report = verify(find(str(good)), repair=True)
    assert not report.fine
    assert "broken: model.norm: the boxes hold 50 of 60 elements" in report.lines[0]
    assert report.lines[1:] == [f"  {part(4)} is missing; mended from parity"]
    assert (good / STEP / part(4)).read_bytes() == before


def longer(stored: StoredPart) -> StoredPart:
    """The part of a run whose model.norm has 60 elements."""
    entries = [
        replace(entry, info=replace(entry.info, shape=(60,)))
        if entry.name == "model.norm"
        else entry
        for entry in stored.table.entries
    ]
    return replace(stored, table=PartTable(tuple(entries)))
