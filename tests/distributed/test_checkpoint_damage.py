"""Damaged checkpoints are refused, and the newest whole one is taken."""

import os
import shutil
from pathlib import Path

import torch

from phalanx.checkpoint.folders import folder_name
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpointing import Run, manager_of, resume_and_save


def save_three(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=0)
        for step in (1, 2, 3):
            manager.save(step, {f"x{ranks.rank}": torch.full((1000,), float(step))}, {})
        manager.close()


def truncate(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", 100)


def flip(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def flip_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 50)


def rename_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / folder_name(9))
    remove(folder)


def test_broken_checkpoints_are_refused_with_the_reason(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_three, tmp_path / "good", world_size=2)
    for damage, reasons in (
        (truncate, ["__1_0.distcp has 100 bytes instead of"]),
        (flip, ["__0_0.distcp is damaged: checksum"]),
        (remove, ["__1_0.distcp is missing"]),
        (flip_metadata, [".metadata is damaged"]),
        (cut_manifest, ["manifest.json cannot be read"]),
        (rename_folder, ["its manifest is of step 3", "is missing"]),
    ):
        root = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "good", root)
        damage(root / folder_name(3))
        results = run_ranks(resume_and_save, root, 4, world_size=2)
        assert [result[:2] for result in results] == [(2, 2.0), (2, 2.0)]
        events = results[0][2]
        rejected = [facts for name, facts in events if name == "checkpoint_rejected"]
        assert len(rejected) == len(reasons)
        for facts, reason in zip(rejected, reasons, strict=True):
            assert reason in facts["reason"]
        assert [path.name for path in root.iterdir()] == [folder_name(4)]


def test_the_resumed_one_outlives_a_broken_newer_one(run_ranks: Run, tmp_path: Path) -> None:
    """With keep=1, a broken step 3 must not take the place of the step 2 that is saved anew."""
    root = tmp_path / "c"
    run_ranks(save_three, root, world_size=2)
    flip(root / folder_name(3))
    results = run_ranks(resume_and_save, root, 3, world_size=2)
    assert results[0][0] == 2
    assert [path.name for path in root.iterdir()] == [folder_name(3)]


def test_all_broken_means_none(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_three, tmp_path, world_size=2)
    for step in (1, 2, 3):
        remove(tmp_path / folder_name(step))
    (step, _, events), _ = run_ranks(resume_and_save, tmp_path, 1, world_size=2)
    assert step is None
    assert [facts["step"] for name, facts in events if "rejected" in name] == [3, 2, 1]
