"""`phalanx checkpoint restore`: what it goes on from, what it refuses, what it never lets through.

That it survives being killed is tested in tests/checkpoint/tool/test_restore_kill_ranks.py.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoint.boxes import Box, TensorInfo, whole
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import Manifest, read_manifest
from phalanx.checkpoint.format.table import Entry
from phalanx.checkpoint.storage.metered import Metered
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.check import examine
from phalanx.checkpoint.tool.places import find
from phalanx.checkpoint.tool.reading import Reader
from phalanx.checkpoint.tool.restore import recut
from phalanx.checkpoint.tool.restore.journal import Journal
from phalanx.checkpoint.tool.restore.plan import Cutting
from phalanx.checkpoint.tool.restore.units import slabs_of
from phalanx.checkpoint.tool.restore.verb import restore
from tests.checkpoint.stored import Arrays, cut, make, tensors

STEP = "step_00000100"


class Cut(ConnectionError):
    """What a test cuts a link with."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with parity that falls into many small units."""
    monkeypatch.setattr(recut, "UNIT_BYTES", (1024, 1024))
    make(tmp_path / "src", 100, tensors(1, scale=20), ranks=6, nodes=3, parity=1)
    return tmp_path / "src"


def recutting(arrays: Arrays, ranks: int, dim: int) -> Callable[[Manifest], Cutting]:
    tables = tuple(cut(arrays, ranks, dim=dim))
    return lambda _: Cutting(text=f"tp={ranks}", tables=tables, layout={"tp": ranks})


def cut_link_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let reading fail after so many units; returns the sizes of what was read."""
    read_into, read = Metered.read_into, list[int]()

    def failing(self: Metered, path: str, offset: int, view: memoryview) -> None:
        if len(read) >= count:
            raise Cut(f"{self.url}/{path}: connection reset")
        read.append(len(view))
        read_into(self, path, offset, view)

    monkeypatch.setattr(Metered, "read_into", failing)
    return read


def assert_holds(root: Path, arrays: Arrays) -> None:
    storage = open_storage(root)
    assert examine(storage, STEP).state == "complete"
    reader = Reader(storage, STEP, read_manifest(storage, STEP))
    for name, array in arrays.items():
        found = reader.read(name, whole(array.shape))
        assert np.array_equal(found, array.view(found.dtype)), name


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_copy_is_the_same_to_the_byte(source: Path, tmp_path: Path) -> None:
    report = restore(find(str(source)), str(tmp_path / "dst"))
    assert files(source / STEP) == files(tmp_path / "dst" / STEP)
    manifest = read_manifest(open_storage(source), STEP)
    data = sum(part.table.nbytes for part in manifest.parts)
    assert report.content["moved_bytes"] == data + sum(file.size for file in manifest.parity)
    again = restore(find(str(source)), str(tmp_path / "dst" / STEP))
    assert again.lines == [f"{tmp_path}/dst/{STEP}: stands already, nothing to do"]


@pytest.mark.parametrize(("ranks", "dim"), [(1, 0), (5, 0), (3, 1), (16, 1)])
def test_recut_is_what_ranks_of_that_layout_hold(
    source: Path, tmp_path: Path, ranks: int, dim: int
) -> None:
    arrays = tensors(1, scale=20)
    report = restore(find(str(source)), str(tmp_path / "dst"), cut=recutting(arrays, ranks, dim))
    assert "without parity" in report.lines[-1]
    assert_holds(tmp_path / "dst", arrays)
    manifest = read_manifest(open_storage(tmp_path / "dst"), STEP)
    assert (manifest.world_size, manifest.meta["layout"]) == (ranks, {"tp": ranks})
    assert [part.table for part in manifest.parts] == cut(arrays, ranks, dim=dim)
    before = read_manifest(open_storage(source), STEP)
    assert (manifest.time, manifest.num_parity) == (before.time, 0)
    same = make(tmp_path / "made", 100, arrays, ranks=ranks, dim=dim)
    assert [(p.size, p.xxh3_64, p.digests) for p in manifest.parts] == [
        (p.size, p.xxh3_64, p.digests) for p in same.parts
    ]


@pytest.mark.parametrize("recut_too", [False, True])
def test_a_cut_link_costs_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recut_too: bool
) -> None:
    arrays = tensors(1, scale=20)
    change = recutting(arrays, 3, 1) if recut_too else None
    dst = str(tmp_path / "dst")
    moved = 0
    for count in (0, 40, 60):
        with monkeypatch.context() as patch:
            read = cut_link_after(count, patch)
            with pytest.raises(Cut):
                restore(find(str(source)), dst, cut=change)
        moved += sum(read)
        assert examine(open_storage(tmp_path / "dst"), STEP).state == "restoring"
    journal = tmp_path / "dst" / STEP / "restore.journal"
    assert journal.read_bytes().count(b"unit") == 101  # and the unit's size, in the first line
    with journal.open("ab") as file:
        file.write(b'{"unit": 7, "xxh3')  # as a kill leaves it
    report = restore(find(str(source)), dst, cut=change)
    assert report.content["stood_bytes"] == moved
    assert moved + report.content["moved_bytes"] == report.content["bytes"]
    assert_holds(tmp_path / "dst", arrays)


def test_what_a_power_cut_took_is_read_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        read = cut_link_after(100, patch)
        with pytest.raises(Cut):
            restore(find(str(source)), str(tmp_path / "dst"))
    part = tmp_path / "dst" / STEP / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[3000:6000] = bytes(3000)
    part.write_bytes(content)
    report = restore(find(str(source)), str(tmp_path / "dst"))
    assert 3000 <= sum(read) - report.content["stood_bytes"] <= 3000 + 2 * 1024
    assert files(source / STEP) == files(tmp_path / "dst" / STEP)


def test_a_damaged_shard_is_named_and_the_rest_stays(source: Path, tmp_path: Path) -> None:
    path = source / STEP / "part-00002.safetensors"
    good = path.read_bytes()
    manifest = read_manifest(open_storage(source), STEP)
    entry = manifest.parts[2].table.entries[0]
    begin = manifest.parts[2].data_begin
    path.write_bytes(good[: begin + 9] + b"?" + good[begin + 10 :])
    with pytest.raises(BrokenCheckpointError) as caught:
        restore(find(str(source)), str(tmp_path / "dst"))
    assert f"part-00002.safetensors: {entry.key}: not what the manifest says" in str(caught.value)
    assert not (tmp_path / "dst" / STEP / "manifest.json").exists()
    path.write_bytes(good)
    report = restore(find(str(source)), str(tmp_path / "dst"))
    assert report.content["moved_bytes"] <= entry.nbytes + 2 * 1024
    assert files(source / STEP) == files(tmp_path / "dst" / STEP)


def test_other_arguments_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = tensors(1, scale=20)
    with monkeypatch.context() as patch:
        cut_link_after(5, patch)
        with pytest.raises(Cut):
            restore(find(str(source)), str(tmp_path / "dst"))
    with pytest.raises(ValueError, match="a restore with layout='' goes on here, not one with"):
        restore(find(str(source)), str(tmp_path / "dst"), cut=recutting(arrays, 3, 1))
    make(tmp_path / "other", 100, arrays)
    with pytest.raises(ValueError, match="a restore with source="):
        restore(find(str(tmp_path / "other")), str(tmp_path / "dst"))
    journal = Journal(tmp_path / "dst" / STEP / "restore.journal", _facts(source, tmp_path))
    with pytest.raises(ValueError, match="another restore is at work here"):
        restore(find(str(source)), str(tmp_path / "dst"))
    journal.close()
    (tmp_path / "saving" / STEP).mkdir(parents=True)
    (tmp_path / "saving" / STEP / "part-00000.safetensors").write_text("")
    with pytest.raises(ValueError, match="holds files of a save that did not end, or still runs"):
        restore(find(str(source)), str(tmp_path / "saving"))
    make(tmp_path / "full", 100, tensors(2))
    with pytest.raises(ValueError, match="another complete checkpoint stands there"):
        restore(find(str(source)), str(tmp_path / "full"))


def _facts(source: Path, tmp_path: Path) -> dict[str, Any]:
    first = (tmp_path / "dst" / STEP / "restore.journal").read_text().splitlines()[0]
    return dict(json.loads(first))


def test_it_goes_on_with_its_step_though_the_source_has_a_newer_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_link_after(5, patch)
        with pytest.raises(Cut):
            restore(find(str(source)), str(tmp_path / "dst"))
    make(source, 200, tensors(2))
    assert restore(find(str(source)), str(tmp_path / "dst")).content["step"] == 100
    assert restore(find(str(source)), str(tmp_path / "dst")).content["step"] == 200


def test_a_kill_between_the_manifest_and_the_end(source: Path, tmp_path: Path) -> None:
    restore(find(str(source)), str(tmp_path / "dst"))
    journal = tmp_path / "dst" / STEP / "restore.journal"
    journal.write_text("{}")
    assert "stands already" in restore(find(str(source)), str(tmp_path / "dst")).lines[0]
    assert not journal.exists()


def test_a_damaged_journal_is_not_believed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_link_after(30, patch)
        with pytest.raises(Cut):
            restore(find(str(source)), str(tmp_path / "dst"))
    journal = tmp_path / "dst" / STEP / "restore.journal"
    text = journal.read_text()
    lines = text.splitlines(keepends=True)
    lines[3] = lines[3].replace('"unit"', '"untt"')
    lines[4] = lines[4].replace("xxh3", "xxh9")
    journal.write_text("".join(lines))
    restore(find(str(source)), str(tmp_path / "dst"))
    assert files(source / STEP) == files(tmp_path / "dst" / STEP)
    (tmp_path / "again" / STEP).mkdir(parents=True)
    (tmp_path / "again" / STEP / journal.name).write_text(text.replace("unit_bytes", "unit_"))
    with pytest.raises(ValueError, match="restore.journal: is damaged; delete its folder"):
        restore(find(str(source)), str(tmp_path / "again"))


def test_a_journal_in_a_storage_of_whole_files_is_held_to_the_same(
    source: Path, tmp_path: Path
) -> None:
    target = open_storage(f"memory:/{tmp_path}/dst")
    journal = f"{STEP}/restore.journal"
    for text, said in (
        (
            '{"journal": 1, "source": "elsewhere", "files": []}',
            "a restore with source='elsewhere' ",
        ),
        ('{"journal": 2, "files": []}', "a restore with journal=2 goes on here, not one with"),
        ('{"journal": 1}', f"{STEP}/restore.journal: is damaged; delete its folder"),
        ("[1]", f"{STEP}/restore.journal: is damaged; delete its folder"),
        ('{"journ', f"{STEP}/restore.journal: is damaged; delete its folder"),
    ):
        target.write(journal, [text.encode()])
        with pytest.raises(ValueError, match=said):
            restore(find(str(source)), target.url)
    target.delete(journal)
    restore(find(str(source)), target.url)
    assert target.names(STEP) == sorted(path.name for path in (source / STEP).iterdir())


def test_dry_run_tells_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = restore(find(str(source)), str(tmp_path / "dst"), dry_run=True)
    assert report.fine
    assert f"would restore {source}/{STEP}" in report.lines[0]
    assert report.content["free_bytes"] > 0
    assert not (tmp_path / "dst").exists()


FULL_DISK = """
import resource, sys
from phalanx.launch.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main(["checkpoint", "restore", *sys.argv[1:]]))
"""


def test_no_room_is_told_before_anything_moves(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "dst")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "part-00000.safetensors" in done.stderr
    assert "run the same command again and it goes on" in done.stderr
    assert [path.name for path in (tmp_path / "dst" / STEP).iterdir()] == ["restore.journal"]
    restore(find(str(source)), str(tmp_path / "dst"))
    assert files(source / STEP) == files(tmp_path / "dst" / STEP)


@pytest.mark.parametrize("most", [4, 64, 1000, 10**9])
def test_slabs_follow_each_other_in_memory(most: int) -> None:
    info = TensorInfo(dtype="F32", shape=(9, 8, 7))
    entry = Entry(name="w", info=info, box=Box((1, 0, 2), (5, 8, 4)), begin=0)
    slabs = list(slabs_of(entry, most))
    places = np.arange(5 * 8 * 4).reshape(5, 8, 4)
    found = [places[slab.slices_in(entry.box)].reshape(-1) for slab in slabs]
    assert np.array_equal(np.concatenate(found), np.arange(5 * 8 * 4))
    assert all(4 * slab.numel <= most for slab in slabs)


def test_the_tool_needs_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from phalanx.launch.cli import main; codes = [main(['checkpoint', *argv]) for "
        "argv in (['ls'], ['verify', '--repair', SRC], ['show', SRC], ['restore', SRC, DST], "
        "['gc', DST])]; sys.exit(99 if 'torch' in sys.modules else max(codes))"
    )
    code = code.replace("SRC", repr(str(source))).replace("DST", repr(str(tmp_path / "dst")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
