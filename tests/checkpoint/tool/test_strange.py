"""Folders where files should be, pipes, links to themselves, lost manifests: each is told in a row
of its own, in one line, and what is healthy beside it is still shown."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from phalanx.checkpoint.format.manifest import BACKUP, NAME
from tests.checkpoint.stored import make, tensors
from tests.checkpoint.tool.command import Captured, cut_off, flip, run

BAD, PART, PARITY = "step_00000002", "part-00001.safetensors", "parity-00001.bin"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Two checkpoints of three nodes, of which one may be lost."""
    for step in (2, 4):
        make(tmp_path / "q" / "checkpoints", step, tensors(step), ranks=3, nodes=3, parity=1)
    return tmp_path / "q"


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_a_lost_manifest_is_kept_by_gc_and_mended(run_folder: Path, capsys: Captured) -> None:
    bad = run_folder / "checkpoints" / BAD
    (bad / NAME).unlink()
    said = "manifest.json is missing; its backup stands"
    code, out, _ = run(capsys, "ls", run_folder)
    assert (code, f"broken: {said}" in out) == (1, True)
    code, out, _ = run(capsys, "gc", run_folder)
    assert (code, said in out, (bad / BACKUP).exists()) == (0, True, True)
    assert run(capsys, "verify", run_folder)[0] == 1
    assert run(capsys, "verify", "--repair", run_folder)[0] == 0
    assert (bad / NAME).read_bytes() == (bad / BACKUP).read_bytes()


@pytest.mark.parametrize("damage", [flip, cut_off])
def test_a_lost_manifest_and_a_damaged_file_are_mended(
    damage: Callable[[Path], None], run_folder: Path, capsys: Captured
) -> None:
    bad = run_folder / "checkpoints" / BAD
    (bad / NAME).unlink()
    damage(bad / PART)
    assert run(capsys, "gc", run_folder)[0] == 0
    assert run(capsys, "verify", run_folder)[0] == 1
    assert run(capsys, "verify", "--repair", run_folder)[0] == 0
    assert run(capsys, "verify", run_folder)[0] == 0


@pytest.mark.parametrize("kind", [folder, loop, pipe])
@pytest.mark.parametrize("name", [NAME, BACKUP, PART, PARITY])
def test_what_is_no_file_is_one_row_and_mended_once_it_is_gone(
    name: str, kind: Callable[[Path], None], run_folder: Path, capsys: Captured
) -> None:
    bad = run_folder / "checkpoints" / BAD
    kind(bad / name)
    for verb in ("ls", "gc", "verify"):
        code, out, err = run(capsys, verb, run_folder)
        assert (code, err) == (int(verb != "gc" and (verb, name) != ("ls", BACKUP)), "")
        assert out.count("complete") == (2 if name == BACKUP and verb != "verify" else 1)
        assert (verb, name) in {("ls", BACKUP), ("gc", BACKUP)} or "; remove it" in out
    code, out, _ = run(capsys, "verify", "--repair", run_folder)
    if kind is folder:  # it may hold something
        assert (code, "another copy" in out) == (1, False)
        assert "  remove what is no file and repair again: phalanx " in out
        (bad / name).rmdir()
        assert run(capsys, "verify", "--repair", run_folder)[0] == 0
    assert run(capsys, "verify", run_folder)[0] == 0


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("kind", [folder, loop, pipe])
def test_a_restore_from_what_is_no_file(
    kind: Callable[[Path], None], far: bool, run_folder: Path, capsys: Captured
) -> None:
    kind(run_folder / "checkpoints" / BAD / PART)
    target = f"memory://{run_folder}" if far else run_folder.parent / "dst"
    code, _, err = run(capsys, "restore", "--step", 2, run_folder, target)
    assert (code, err.count("\n"), "it goes on" in err) == (1, 1, False)
    assert PART in err
    assert "; remove it" in err


def test_a_file_in_place_of_a_checkpoint(run_folder: Path, capsys: Captured) -> None:
    bad = run_folder / "checkpoints" / BAD
    shutil.rmtree(bad)
    bad.write_text("")
    said = "is a file, not a folder"
    for verb, expected in (("ls", 1), ("gc", 0), ("verify", 1)):
        code, out, err = run(capsys, verb, run_folder)
        assert (code, err, said in out) == (expected, "", True)
        assert out.count("complete") == 1
    code, _, err = run(capsys, "verify", bad)
    assert (code, said in err) == (2, True)


@pytest.mark.parametrize("content", ["a: [b", "- 1", "checkpoint: 5", "checkpoint: {storage: [1]}"])
def test_a_damaged_config_of_a_run(content: str, run_folder: Path, capsys: Captured) -> None:
    (run_folder / "config.yaml").write_text(content)
    assert run(capsys, "ls", run_folder)[0] == 0  # its checkpoints stand there
    (run_folder / "checkpoints").rename(run_folder / "elsewhere")
    code, _, err = run(capsys, "ls", run_folder)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{run_folder}/config.yaml: cannot be read (" in err


@pytest.mark.parametrize(
    "content", ['{"version":"x","body":{}', '{"body":{}', "[2", '{"version":2']
)
def test_a_manifest_that_was_made_up(content: str, run_folder: Path, capsys: Captured) -> None:
    bad = run_folder / "checkpoints" / BAD
    text = f'{content},"checksum":"{xxhash.xxh3_64_hexdigest(content.encode())}"}}\n'
    (bad / NAME).write_text(text)
    for verb in ("ls", "verify"):
        code, out, err = run(capsys, verb, run_folder)
        assert (code, err, "manifest.json contradicts itself: " in out) == (1, "", True)
        assert out.count("complete") == 1


def test_a_strangers_manifests(run_folder: Path, capsys: Captured) -> None:
    for name in (NAME, BACKUP):
        shutil.copy(
            run_folder / "checkpoints" / BAD / name, run_folder / "checkpoints/step_00000004"
        )
    for argv in (
        ("show", run_folder),
        ("show", "--diff", run_folder, run_folder),
        ("restore", run_folder, run_folder.parent / "dst"),
        ("convert", run_folder, run_folder.parent / "dst"),
    ):
        code, _, err = run(capsys, *argv)
        assert (code, "step_00000004: manifest.json is of step 2" in err) == (1, True), argv
    code, out, _ = run(capsys, "verify", run_folder)
    assert (code, "manifest.json is of step 2; manifest.backup.json is of step 2; " in out) == (
        1,
        True,
    )


def test_both_manifests_damaged(run_folder: Path, capsys: Captured) -> None:
    for name in (NAME, BACKUP):
        cut_off(run_folder / "checkpoints" / BAD / name)
    code, out, _ = run(capsys, "verify", run_folder)
    assert code == 1
    assert all(f"{name} is damaged" in out for name in (NAME, BACKUP))
    assert "another copy" in out


def test_where_nothing_can_be_written_is_bad_input(run_folder: Path, capsys: Captured) -> None:
    file = run_folder.parent / "file"
    file.write_text("")
    for target, said in (
        (run_folder, f"is a run's folder; give {run_folder}/checkpoints"),
        (file, "is a file, not a folder"),
        (f"{file}/step_00000004", "is a file, not a folder"),
        ("/dev/null", "is a file, not a folder"),
    ):
        code, _, err = run(capsys, "restore", run_folder, target)
        assert (code, err.count("\n"), said in err) == (2, 1, True), target
    for verb in ("export", "convert"):
        code, _, err = run(capsys, verb, run_folder, file)
        assert (code, "is a file, not a folder" in err) == (2, True)


def test_a_full_disk_behind_standard_output(
    run_folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        code, _, err = run(capsys, "ls", run_folder)
        assert (code, err.count("\n"), "standard output" in err) == (1, 1, True)


def test_no_damaged_bytes_of_torchs_folder_are_converted(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path / "src", 10, {"model.w": np.ones((64, 64), np.float32)}, ranks=2)
    theirs = tmp_path / "dcp"
    assert run(capsys, "convert", tmp_path / "src", theirs)[0] == 0
    bad = next(iter(sorted(theirs.glob("*.distcp"))))
    content = bytearray(bad.read_bytes())
    content[content.index(np.ones(8, np.float32).tobytes()) + 100] ^= 1
    bad.write_bytes(content)
    code, out, err = run(capsys, "convert", theirs, tmp_path / "back")
    assert (code, out) == (1, "")
    assert f"{bad} is damaged: model.w at [" in err
    assert not list((tmp_path / "back").glob("*/manifest.json"))
