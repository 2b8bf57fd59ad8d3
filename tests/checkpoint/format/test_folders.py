"""Which folders are checkpoints, what is kept, and that a complete one is never lost."""

from pathlib import Path

import pytest

from phalanx.checkpoint.format.folders import (
    complete_folders,
    folder_name,
    prepare_folder,
    prune,
    remove_folder,
    stands_by_backup,
)
from phalanx.checkpoint.format.manifest import NAME, new_manifest, write_manifest
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.open import open_storage


def save(storage: Storage, step: int, content: bytes = b"abc") -> str:
    folder = prepare_folder(storage, step)
    storage.write(f"{folder}/data", [content])
    manifest = new_manifest(step=step, meta={}, parts=(), world_size=1)
    write_manifest(storage, folder, manifest)
    return folder


def test_names_sort_by_step_and_then_by_how_often_it_was_saved(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "none")
    assert complete_folders(storage) == {}
    for step in (123_456_789, 9, 100):
        save(storage, step)
    for _ in range(11):
        last = save(storage, 100)
    assert last == folder_name(100, revision=11) == "step_00000100.r11"
    storage.write("step_00000050/data", [b"half"])
    storage.write("step_00000100.old/manifest.json", [b"{}"])
    assert list(complete_folders(storage).items()) == [
        (9, "step_00000009"),
        (100, "step_00000100.r11"),
        (123_456_789, "step_123456789"),
    ]


def test_saving_a_step_anew_keeps_the_old_until_the_new_stands(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    old = save(storage, 5, b"old")
    fresh = prepare_folder(storage, 5)
    storage.write(f"{fresh}/data", [b"half"])
    assert complete_folders(storage) == {5: old}
    again = save(storage, 5, b"new")
    assert again == folder_name(5, revision=2)  # who writes the other one may not be dead
    assert complete_folders(storage) == {5: again}
    assert storage.read(f"{old}/data") == b"old"
    deleted, problems = prune(storage, saved=5, keep=2, keep_every=0, rejected=())
    assert (deleted, problems) == ([old, fresh], [])
    assert storage.names() == [again]
    assert storage.read(f"{again}/data") == b"new"
    assert prepare_folder(storage, 5) == folder_name(5, revision=3)


@pytest.mark.parametrize(
    ("keep", "keep_every", "rejected", "left"),
    [
        (2, 0, (), [40, 50]),
        (1, 20, (), [20, 40, 50]),
        (0, 0, (), [10, 20, 30, 40, 50]),
        (2, 0, (40,), [30, 40, 50]),  # newer than what is kept: it may be mended
        (1, 0, (40,), [50]),
        (1, 0, (50,), [50]),  # saved anew, so no longer rejected
        (1, 0, (10, 40), [50]),
    ],
)
def test_prune(
    tmp_path: Path, keep: int, keep_every: int, rejected: tuple[int, ...], left: list[int]
) -> None:
    storage = open_storage(tmp_path)
    for step in (10, 20, 30, 40, 50):
        save(storage, step)
    storage.write("step_00000035/data", [b"a crash's leftover"])
    storage.write("step_00000060/data", [b"in the making"])
    storage.write("notes/today", [b"a user's own"])
    deleted, problems = prune(
        storage, saved=50, keep=keep, keep_every=keep_every, rejected=rejected
    )
    assert problems == []
    assert "step_00000035" in deleted
    assert list(complete_folders(storage)) == left
    assert storage.names() == ["notes", *map(folder_name, left), "step_00000060"]


def test_imported_weights_are_kept(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for step in (0, 10, 20):
        save(storage, step)
    prune(storage, saved=20, keep=1, keep_every=0, rejected=())
    assert list(complete_folders(storage)) == [0, 20]


def test_prune_keeps_what_was_just_saved_below_a_rejected_step(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for step in (10, 15, 20):
        save(storage, step)
    prune(storage, saved=15, keep=1, keep_every=0, rejected=(20,))
    assert list(complete_folders(storage)) == [15, 20]
    save(storage, 25)
    prune(storage, saved=25, keep=1, keep_every=0, rejected=(20,))
    assert list(complete_folders(storage)) == [25]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("alive", [1, 2])
def test_a_folder_whose_deleting_was_interrupted_does_not_count(
    tmp_path: Path, alive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts while it is whole but for the backup; and what is left goes the next time."""
    storage = open_storage(tmp_path)
    folder = save(storage, 5)
    real, calls = storage.delete, list[str]()

    def dies_later(path: str) -> None:
        if len(calls) == alive:
            raise Interrupted
        calls.append(path)
        real(path)

    monkeypatch.setattr(storage, "delete", dies_later)
    with pytest.raises(Interrupted):
        remove_folder(storage, folder)
    assert complete_folders(storage) == ({5: folder} if alive == 1 else {})
    assert stands_by_backup(storage, folder) is None
    assert "data" in storage.names(folder)
    monkeypatch.undo()
    save(storage, 7)
    assert prune(storage, saved=7, keep=1, keep_every=0, rejected=())[0] == [folder]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(0, 0, True), (2, 0, True), (1, 0, False), (1, 5, True)]
)
def test_prune_keeps_what_only_lost_its_manifest(
    tmp_path: Path, keep: int, keep_every: int, left: bool
) -> None:
    """As long as if it were rejected: then a repair no longer pays."""
    storage = open_storage(tmp_path)
    folders = [save(storage, step) for step in (4, 5, 6)]
    storage.delete(f"{folders[1]}/{NAME}")
    assert stands_by_backup(storage, folders[1]) is not None
    prune(storage, saved=6, keep=keep, keep_every=keep_every, rejected=())
    assert (folders[1] in storage.names()) == left
    anew = save(storage, 5)
    prune(storage, saved=6, keep=0, keep_every=0, rejected=())
    assert storage.names()[-2:] == [anew, folders[2]]  # not the lost one, which no one needs now


def test_what_cannot_be_deleted_is_told_and_costs_only_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    for step in (10, 20):
        save(storage, step)

    def refuses(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(storage, "delete", refuses)
    deleted, problems = prune(storage, saved=20, keep=1, keep_every=0, rejected=())
    assert deleted == []
    assert len(problems) == 1
    assert "step_00000010: " in problems[0]
    assert "Permission denied" in problems[0]
