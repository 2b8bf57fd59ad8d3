"""The checkpoint's parts that need no ranks: boxes, staging buffers, manifests, folders."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from phalanx.checkpoint.chunks import box
from phalanx.checkpoint.folders import complete_folders, folder_name, prepare_folder, prune
from phalanx.checkpoint.manifest import (
    BrokenCheckpointError,
    check_files,
    fingerprint,
    new_manifest,
    read_manifest,
    write_manifest,
)
from phalanx.checkpoint.staging import Stager


def make_complete(root: Path, step: int, content: bytes = b"abc") -> Path:
    folder = prepare_folder(root, step, broken=False)
    (folder / "__0_0.distcp").write_bytes(content)
    files = {"__0_0.distcp": fingerprint(folder / "__0_0.distcp")}
    write_manifest(
        folder, new_manifest(step=step, meta={"lr": 0.1, "x": [1]}, files=files, world_size=1)
    )
    return folder


def chunks_of(rows: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """torch.chunk with the empty parts that FSDP and DTensor add."""
    chunks = list(torch.chunk(rows, parts)) if rows.numel() else []
    return chunks + [rows[:0]] * (parts - len(chunks))


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_box_is_fsdp_over_tp_for_any_size(dp: int, tp: int) -> None:
    placements = (Replicate(), _StridedShard(0, split_factor=tp), Shard(0))
    for size in range(1, 23):
        rows = torch.arange(size)
        for i in range(dp):
            for j in range(tp):
                expected = chunks_of(chunks_of(rows, tp)[j], dp)[i]
                sizes, offsets = box(
                    "w", (size, 3), placements, mesh_sizes=(2, dp, tp), coordinate=(1, i, j)
                )
                assert sizes == (len(expected), 3)
                if len(expected):
                    assert offsets == (int(expected[0]), 0)


def test_box_of_two_plain_shards_cuts_left_to_right() -> None:
    sizes, offsets = box("w", (8, 6), (Shard(0), Shard(0)), mesh_sizes=(2, 2), coordinate=(1, 0))
    assert (sizes, offsets) == ((2, 6), (4, 0))
    sizes, offsets = box("w", (8, 6), (Shard(1), Shard(0)), mesh_sizes=(3, 2), coordinate=(2, 1))
    assert (sizes, offsets) == ((4, 2), (4, 4))


def test_box_refuses_what_it_does_not_understand() -> None:
    with pytest.raises(ValueError, match=r"w: placement Partial.*cannot be saved"):
        box("w", (8,), (Partial(),), mesh_sizes=(2,), coordinate=(0,))
    with pytest.raises(ValueError, match="split_factor=2"):
        box(
            "w",
            (8,),
            (_StridedShard(0, split_factor=4), Shard(0)),
            mesh_sizes=(2, 2),
            coordinate=(0, 0),
        )


def test_staging_copies_and_reuses_its_buffers() -> None:
    stager = Stager()
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(3)}
    first = stager.stage(tensors)
    pointers = {name: chunk.local.data_ptr() for name, chunk in first.items()}
    tensors["a"].add_(1)
    assert torch.equal(first["a"].local, torch.arange(6.0).reshape(2, 3).t())
    second = stager.stage(tensors)
    assert {name: chunk.local.data_ptr() for name, chunk in second.items()} == pointers
    assert torch.equal(second["a"].local, tensors["a"])
    changed = stager.stage({"a": torch.zeros(7)})
    assert changed["a"].local.shape == (7,)
    assert set(stager._buffers) == {"a"}


def test_manifest_returns_what_was_written(tmp_path: Path) -> None:
    folder = make_complete(tmp_path, 7)
    manifest = read_manifest(folder)
    assert manifest.step == 7
    assert manifest.meta == {"lr": 0.1, "x": [1]}
    assert manifest.torch_version == torch.__version__
    assert check_files(folder, manifest, manifest.files) is None


def test_damaged_manifest_is_refused(tmp_path: Path) -> None:
    folder = make_complete(tmp_path, 7)
    path = folder / "manifest.json"
    text = path.read_text()
    for damaged, reason in (
        (text.replace('"step": 7', '"step": 8'), "its own checksum"),
        (text[: len(text) // 2], "cannot be read"),
        (text.replace('"version": 1', '"version": 9'), "version 9"),
        (json.dumps([]), "cannot be read"),
        ("", "cannot be read"),
    ):
        path.write_text(damaged)
        with pytest.raises(BrokenCheckpointError, match=reason):
            read_manifest(folder)
    path.unlink()
    with pytest.raises(BrokenCheckpointError, match="never completed"):
        read_manifest(folder)


def test_damaged_files_are_found(tmp_path: Path) -> None:
    folder = make_complete(tmp_path, 7, content=b"x" * 1000)
    manifest = read_manifest(folder)
    data = folder / "__0_0.distcp"
    for content, reason in (
        (b"x" * 999, "999 bytes instead of 1000"),
        (b"x" * 500 + b"y" + b"x" * 499, "is damaged: checksum"),
    ):
        data.write_bytes(content)
        assert reason in (check_files(folder, manifest, manifest.files) or "")
    data.unlink()
    assert check_files(folder, manifest, manifest.files) == "__0_0.distcp is missing"


def test_replacing_a_complete_step_keeps_the_old_until_the_new_stands(tmp_path: Path) -> None:
    make_complete(tmp_path, 5, content=b"old")
    fresh = prepare_folder(tmp_path, 5, broken=False)
    old = complete_folders(tmp_path)[5]
    assert (old / "__0_0.distcp").read_bytes() == b"old"
    (fresh / "__0_0.distcp").write_bytes(b"half")
    again = make_complete(tmp_path, 5, content=b"new")  # the half-written one is thrown away
    assert complete_folders(tmp_path) == {5: again}
    assert (again / "__0_0.distcp").read_bytes() == b"new"
    prune(tmp_path, saved=5, keep=2, keep_every=0, rejected=())
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(5)]


@pytest.mark.parametrize(
    ("keep", "keep_every", "rejected", "left"),
    [
        (2, 0, (), [40, 50]),
        (1, 20, (), [20, 40, 50]),
        (0, 0, (), [10, 20, 30, 40, 50]),
        (2, 0, (40,), [30, 50]),
        (1, 0, (50,), [50]),  # saved anew, so no longer rejected
        (1, 0, (10, 40), [50]),
    ],
)
def test_prune(
    tmp_path: Path, keep: int, keep_every: int, rejected: tuple[int, ...], left: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        make_complete(tmp_path, step)
    prepare_folder(tmp_path, 35, broken=False)  # a crash's leftover
    (tmp_path / "notes").mkdir()
    prune(tmp_path, saved=50, keep=keep, keep_every=keep_every, rejected=rejected)
    assert sorted(complete_folders(tmp_path)) == left
    assert {path.name for path in tmp_path.iterdir()} == {"notes", *map(folder_name, left)}


def test_imported_weights_are_kept(tmp_path: Path) -> None:
    for step in (0, 10, 20):
        make_complete(tmp_path, step)
    prune(tmp_path, saved=20, keep=1, keep_every=0, rejected=())
    assert list(complete_folders(tmp_path)) == [0, 20]


def test_prune_keeps_what_was_just_saved_below_a_rejected_step(tmp_path: Path) -> None:
    for step in (10, 15, 20):
        make_complete(tmp_path, step)
    prune(tmp_path, saved=15, keep=1, keep_every=0, rejected=(20,))
    assert list(complete_folders(tmp_path)) == [15]
