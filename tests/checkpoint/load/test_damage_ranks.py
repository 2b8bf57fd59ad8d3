"""Damaged checkpoints are refused, and the newest whole one is taken."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from phalanx.checkpoint.format.folders import folder_name
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import Events, Run, manager_of, resume_and_save, step_names


def save_three(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=0)
        for step in (1, 2, 3):
            tensor = torch.full((1000,), float(step))
            tensor[-1] = ranks.rank
            manager.save(step, {f"x{ranks.rank}": tensor}, {})
        manager.close()


def flip(folder: Path) -> None:
    path = folder / "part-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "part-00001.safetensors").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 50)


def rename_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / folder_name(9))
    remove(folder)


def test_broken_checkpoints_are_refused_with_the_reason(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_three, tmp_path / "good", world_size=2)
    for damage, reasons in (
        (flip, ["part-00000.safetensors is damaged: x0 has checksum"]),
        (remove, ["part-00001.safetensors is missing"]),
        (cut_manifest, ["manifest.json"]),
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
        newer = [folder_name(9)] if damage is rename_folder else []
        assert step_names(root) == [folder_name(4), *newer], "the refused one that is older goes"


def test_the_resumed_one_outlives_a_broken_newer_one(run_ranks: Run, tmp_path: Path) -> None:
    """With keep=1, a broken step 3 must not take the place of the step 2 that is saved anew."""
    root = tmp_path / "c"
    run_ranks(save_three, root, world_size=2)
    flip(root / folder_name(3))
    results = run_ranks(resume_and_save, root, 3, world_size=2)
    assert results[0][0] == 2
    assert step_names(root) == [folder_name(3) + ".r1"]


def resume_nothing(ranks: Ranks, root: Path) -> tuple[str, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events)
        tensors = {f"x{ranks.rank}": torch.zeros(1000)}
        with pytest.raises(ValueError, match="no checkpoint is left that can be loaded") as caught:
            manager.resume(lambda step, names, meta: tensors)
        manager.close()
        return str(caught.value), events


def test_all_broken_is_an_error_not_a_new_run(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_three, tmp_path, world_size=2)
    remove(tmp_path / folder_name(1))
    for step in (2, 3):
        flip(tmp_path / folder_name(step))
    (text, events), (other, _) = run_ranks(resume_nothing, tmp_path, world_size=2)
    assert text == other
    assert "step 3: " in text
    assert [facts["step"] for name, facts in events if "rejected" in name] == [3, 2, 1]
