"""Checkpoints from and to torch.distributed.checkpoint, and what one process writes."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from phalanx.checkpoint.chunks import Chunk, plain_chunk
from phalanx.checkpoint.dcp.convert import from_dcp, to_dcp
from phalanx.checkpoint.errors import BrokenCheckpointError, CheckpointError
from phalanx.checkpoint.format.checksums import check_files
from phalanx.checkpoint.format.folders import complete_folders
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.format.writer import write_groups, write_tensors
from phalanx.checkpoint.load.fit import check_fit
from phalanx.checkpoint.load.reshard import load
from phalanx.checkpoint.load.sources import StorageSource
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.open import open_storage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.w": torch.randn(6, 5),
        "model.b": torch.randn(7).bfloat16(),
        "model.f8": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "optim.count": torch.tensor(3),
        "optim.mask": torch.tensor([True, False, True]),
        "rng": torch.arange(9, dtype=torch.uint8),
        "none": torch.zeros(0, 4),
    }


def chunks_of(tensors: dict[str, Tensor]) -> dict[str, Chunk]:
    return {name: plain_chunk(tensor) for name, tensor in tensors.items()}


def as_loaded(storage: Storage, folder: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    source = StorageSource(storage, folder, read_manifest(storage, folder))
    moved = load(source, chunks_of(found), peers=Peers(None))
    assert moved.read == moved.needed == sum(tensor.nbytes for tensor in like.values())
    assert moved.forwarded == 0
    return found


def assert_same(found: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name


# --- written by one process -----------------------------------------------------------------------


def test_what_is_written_is_loaded(tmp_path: Path) -> None:
    storage, tensors = open_storage(tmp_path), some_tensors()
    folder = write_tensors(storage, 30, chunks_of(tensors), {"kind": "x"}, file_bytes=40)
    assert complete_folders(storage) == {30: folder}
    manifest = read_manifest(storage, folder)
    assert manifest.meta == {"kind": "x"}
    assert len(manifest.parts) > 2
    assert check_files(storage, folder, manifest, manifest.files) == {}
    assert_same(as_loaded(storage, folder, tensors), tensors)
    plain = {}
    for part in manifest.parts:
        plain |= load_file(tmp_path / folder / part.file)
    assert_same(plain, tensors)


def test_transposed_and_mapped_tensors_are_written(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    tensors = {"a": torch.arange(12.0).view(3, 4).t(), "b": torch.arange(10)[::3]}
    folder = write_tensors(storage, 1, chunks_of(tensors), {})
    assert_same(as_loaded(storage, folder, tensors), tensors)


def test_groups_are_asked_for_one_by_one_and_must_cover(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    whole = torch.arange(10.0)

    def boxes(*ranges: tuple[int, int]) -> Any:
        for number, (begin, end) in enumerate(ranges):
            assert len(storage.names("step_00000002")) == number
            local = whole[begin:end]
            yield [("a", Chunk(local=local, size=whole.shape, offsets=torch.Size([begin])))]

    folder = write_groups(storage, 2, boxes((0, 4), (4, 10)), {})
    assert_same(as_loaded(storage, folder, {"a": whole}), {"a": whole})
    storage.delete(folder)
    with pytest.raises(ValueError, match="step 2 cannot be written: a: the boxes hold 9 of 10"):
        write_groups(storage, 2, boxes((0, 4), (5, 10)), {})
    assert complete_folders(storage) == {}


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(ValueError, match="complex64: checkpoints hold no such type; .*float32"):
        write_tensors(storage, 1, chunks_of({"a": torch.zeros(2, dtype=torch.complex64)}), {})
    with pytest.raises(ValueError, match="meta: only what JSON holds"):
        write_tensors(storage, 1, {}, {"x": object()})
    assert complete_folders(storage) == {}


# --- what fits ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    storage, tensors = open_storage(tmp_path), some_tensors()
    folder = write_tensors(storage, 1, chunks_of(tensors), {})
    source = StorageSource(storage, folder, read_manifest(storage, folder))
    for wrong, text in (
        ({"model.w": tensors["model.w"], "gone": torch.zeros(2, 5)}, "lacks 1 of 2 .*gone .2, 5."),
        ({"model.w": torch.zeros(5, 6)}, "model.w is .6, 5. there and .5, 6. here"),
        ({"rng": torch.zeros(9)}, "rng is torch.uint8 there and torch.float32 here"),
    ):
        chunks, problem, _ = check_fit(source, wrong)
        assert not chunks
        assert problem is not None
        assert re.search(text, problem), problem
    wider = {"model.b": torch.zeros(7), "model.f8": torch.zeros(3, 3, dtype=torch.bfloat16)}
    chunks, problem, rounded = check_fit(source, wider)
    assert (chunks.keys(), problem, rounded) == (wider.keys(), None, [])
    narrower = {
        "model.w": torch.zeros(6, 5, dtype=torch.bfloat16),
        "model.b": torch.zeros(7, dtype=torch.float16),
        "rng": tensors["rng"],
    }
    assert check_fit(source, narrower)[1:] == (None, ["model.w", "model.b"])


# --- read from storage ----------------------------------------------------------------------------


def test_damage_is_named(tmp_path: Path) -> None:
    storage, tensors = open_storage(tmp_path), some_tensors()
    folder = write_tensors(storage, 1, chunks_of(tensors), {}, file_bytes=1)
    manifest = read_manifest(storage, folder)
    part = next(p for p in manifest.parts if p.table.entries[0].name == "model.w")
    file = tmp_path / folder / part.file
    good = file.read_bytes()

    def refused(only: str = "model.w") -> str:
        source = StorageSource(storage, folder, manifest)
        with pytest.raises(CheckpointError) as caught:
            load(source, chunks_of({only: tensors[only].clone()}), peers=Peers(None))
        return str(caught.value)

    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert f"{folder}/{part.file} is damaged: model.w has checksum" in refused()
    assert_same(
        as_loaded(storage, folder, {"model.b": tensors["model.b"]}),
        {"model.b": tensors["model.b"]},
    )
    with pytest.raises(BrokenCheckpointError, match=f"{part.file} is damaged: model.w"):
        to_dcp(storage, folder, tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()
    file.write_bytes(good[:-1])
    assert part.file in refused()
    file.unlink()
    assert f"{part.file} is missing; it holds model.w" in refused()


# --- from and to DCP ------------------------------------------------------------------------------


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    model = {name[6:]: t for name, t in tensors.items() if name.startswith("model.")}
    rest = {name: t for name, t in tensors.items() if not name.startswith("model.")}
    return {"model": model, **rest}


def test_dcp_there_and_back(tmp_path: Path) -> None:
    storage, tensors = open_storage(tmp_path / "ours"), some_tensors()
    dcp.save({**nested(tensors), "epoch": 3}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    with pytest.raises(ValueError, match="does not tell its step; give --step"):
        from_dcp(tmp_path / "theirs", storage)
    told: list[int] = []
    done = from_dcp(tmp_path / "theirs", storage, step=7, on_bytes=told.append)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert (done.step, done.bytes, sum(told), done.skipped) == (7, total, total, ["epoch"])
    assert_same(as_loaded(storage, done.folder, tensors), tensors)

    told.clear()
    to_dcp(storage, done.folder, tmp_path / "back", on_bytes=told.append)
    assert sum(told) == total
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    dcp.load(found, checkpoint_id=tmp_path / "back", no_dist=True)
    assert_same(found, tensors)
    again = from_dcp(tmp_path / "back", open_storage(tmp_path / "again"))
    assert again.step == 7
    with pytest.raises(ValueError, match="is not empty"):
        to_dcp(storage, done.folder, tmp_path / "back")


def test_boxes_stay_as_they_were_cut(tmp_path: Path) -> None:
    storage, a = open_storage(tmp_path / "ours"), torch.arange(40.0).view(8, 5)

    def boxes() -> Any:
        for begin, end in ((0, 3), (3, 8)):
            local = a[begin:end]
            yield [("a", Chunk(local=local, size=a.shape, offsets=torch.Size([begin, 0])))]

    folder = write_groups(storage, 4, boxes(), {"tokens": 5})
    to_dcp(storage, folder, tmp_path / "dcp")
    found = {"a": torch.zeros(8, 5)}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(found["a"], a)
    again = open_storage(tmp_path / "again")
    done = from_dcp(tmp_path / "dcp", again)
    manifest = read_manifest(again, done.folder)
    assert (manifest.step, manifest.meta) == (4, {"tokens": 5})
    assert [e.box.sizes for p in manifest.parts for e in p.table.entries] == [(3, 5), (5, 5)]
    assert_same(as_loaded(again, done.folder, {"a": a}), {"a": a})


def old_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As version 1 wrote it: DCP's files and a manifest of their checksums."""
    dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    files = {
        path.name: {
            "size": path.stat().st_size,
            "xxh3_64": xxhash.xxh3_64_hexdigest(path.read_bytes()),
        }
        for path in folder.iterdir()
    }
    body = {"version": 1, "step": 12, "time": 0.0, "torch": "2", "world_size": 1}
    body |= {"meta": {"tokens": 99}, "files": files}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = xxhash.xxh3_64(canonical.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body, indent=1))


def test_older_checkpoints_are_taken_over_whole_or_not(tmp_path: Path) -> None:
    tensors, old = some_tensors(), tmp_path / "old"
    old_checkpoint(old, tensors)
    storage = open_storage(tmp_path / "ours")
    done = from_dcp(old, storage)
    assert read_manifest(storage, done.folder).meta == {"tokens": 99}
    assert done.step == 12
    assert_same(as_loaded(storage, done.folder, tensors), tensors)

    data = old / "__0_0.distcp"
    good = data.read_bytes()
    for bad, text in (
        (good[:-1], "bytes instead of"),
        (good[:-9] + bytes([good[-9] ^ 16]) + good[-8:], "__0_0.distcp is damaged"),
    ):
        data.write_bytes(bad)
        with pytest.raises(BrokenCheckpointError, match=text):
            from_dcp(old, open_storage(tmp_path / "none"))
    data.write_bytes(good)
    manifest = old / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 12', '"step": 13'))
    with pytest.raises(BrokenCheckpointError, match="its own checksum"):
        from_dcp(old, open_storage(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_foreign_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "theirs"
    dcp.save({"a": torch.zeros(3)}, checkpoint_id=theirs, no_dist=True)
    with (theirs / ".metadata").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(BrokenCheckpointError, match=r"it names .*which no checkpoint needs"):
        from_dcp(theirs, open_storage(tmp_path / "ours"), step=1)
    assert not (tmp_path / "evil").exists()
    (theirs / ".metadata").write_bytes(b"\x80\x04no")
    with pytest.raises(BrokenCheckpointError, match="cannot be read"):
        from_dcp(theirs, open_storage(tmp_path / "ours"), step=1)
    with pytest.raises(ValueError, match="no .metadata there"):
        from_dcp(tmp_path, open_storage(tmp_path / "ours"), step=1)
    assert not (tmp_path / "ours").exists()


def test_damaged_dcp_data_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    dcp.save({"a": torch.zeros(300)}, checkpoint_id=theirs, no_dist=True)
    data = theirs / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:200])
    storage = open_storage(tmp_path / "ours")
    with pytest.raises(BrokenCheckpointError, match=r"__0_0.distcp is damaged: a at \[0\] "):
        from_dcp(theirs, storage, step=1)
    assert complete_folders(storage) == {}


def test_any_storage_serves(tmp_path: Path) -> None:
    storage, tensors = open_storage("memory://test_any_storage_serves"), some_tensors()
    folder = write_tensors(storage, 1, chunks_of(tensors), {})
    assert_same(as_loaded(storage, folder, tensors), tensors)
    to_dcp(storage, folder, tmp_path / "dcp")
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same(found, tensors)
