"""`phalanx checkpoint` as a user meets it: lists, shows, differs, deletes, and says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoint.format.job import read_job
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.tool import ls as ls_module
from phalanx.checkpoint.tool.holders import InMemory
from phalanx.checkpoint.tool.report import age, columns, size
from tests.checkpoint.stored import make, tensors
from tests.checkpoint.tool.command import Captured, run


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> list[InMemory]:
    """What holders are said to have: nothing, unless a test adds to it."""
    found: list[InMemory] = []

    def in_memory(storage: Storage | None = None) -> tuple[list[InMemory], list[str]]:
        job = None if storage is None else read_job(storage)
        return [item for item in found if storage is None or item.job == job], []

    monkeypatch.setattr(ls_module, "in_memory", in_memory)
    return found


def as_json(captured: Captured, *argv: str) -> tuple[int, Any]:
    code, out, _ = run(captured, *argv, "--json", "-")
    return code, json.loads(out)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A run: a good one, a damaged one, one whose manifest is cut off, one half written."""
    root = tmp_path / "run" / "checkpoints"
    for step in (100, 200, 300, 400):
        make(root, step, tensors(step), ranks=6, nodes=3, parity=1)
    (root / "step_00000200" / "part-00001.safetensors").write_bytes(b"cut off")
    manifest = root / "step_00000300" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    shutil.copytree(root / "step_00000400", root / "step_00000500")
    (root / "step_00000500" / "manifest.json").unlink()
    (root / "step_00000500" / "manifest.backup.json").unlink()
    return root


def test_ls_tells_good_damaged_and_half_written_apart(checkpoints: Path, capsys: Captured) -> None:
    code, out, _ = run(capsys, "ls", str(checkpoints.parent))
    assert code == 1
    lines = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert list(lines) == ["100", "200", "300", "400", "500"]
    assert lines["100"].endswith("dp_shard=6  2+1         complete")
    assert "broken: part-00001.safetensors has 7 bytes, not " in lines["200"]
    assert "broken: manifest.json is damaged: its own checksum" in lines["300"]
    assert lines["500"].endswith(
        "unfinished: no manifest.json: the save did not end, or still runs"
    )
    code, found = as_json(capsys, "ls", str(checkpoints))
    assert code == 1
    assert [item["state"] for item in found["checkpoints"]] == [
        "complete", "broken", "broken", "complete", "unfinished",
    ]  # fmt: skip
    assert found["checkpoints"][0]["parity"] == 1
    assert found["checkpoints"][0]["bytes"] > 10_000


def test_ls_of_one_checkpoint_and_of_memory(
    checkpoints: Path, memory: list[InMemory], capsys: Captured
) -> None:
    assert run(capsys, "ls", str(checkpoints / "step_00000100"))[0] == 0
    code, out, _ = run(capsys, "ls")
    assert (code, out) == (0, "no snapshot in this machine's memory\n")
    memory.append(
        InMemory(
            directory="/runs/one/checkpoints",
            job="0123456789abcdef",
            node=1,
            forgotten=False,
            step=120,
            state="committed",
            time=None,
            bytes=5_000_000_000,
            layout="dp_shard=4",
            protection="3+1",
            members=(1,),
        )
    )
    assert "in this machine's memory" not in run(capsys, "ls", str(checkpoints))[1]  # no run's
    (checkpoints / "job.json").write_text('{"job": "0123456789abcdef"}')
    code, out, _ = run(capsys, "ls", str(checkpoints / "step_00000100"))
    assert code == 0
    row = "120    -  5 GB  0123456789abcdef  1     dp_shard=4  3+1         committed"
    assert out.splitlines()[-1].strip() == f"{row}  /runs/one/checkpoints"
    assert as_json(capsys, "ls")[1]["memory"][0]["step"] == 120


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "checkpoint : unknown; choose one of ls, show, verify, restore, convert"),
        (("list",), "checkpoint list: unknown; choose one of ls"),
        (("ls", "nowhere"), "nowhere: no such folder, or an empty one; give a run's folder"),
        (("ls", "."), ".: no checkpoints there; give a run's folder"),
        (("ls", "{root}/../file"), "file: is a file, not a folder"),
        (("ls", "nosuch://bucket/x"), "nosuch"),
        (("verify",), "checkpoint verify: give one place: verify PLACE [--repair"),
        (("verify", "{root}", "--from", "x"), "--from x: is what to repair from; add --repair"),
        (("verify", "{root}", "--step", "7"), "--step 7: {root} has no complete one; complete are"),
        (("verify", "{root}", "--step", "x"), "--step x: must be a whole number, 0 or more"),
        (("verify", "{root}", "--fix"), "checkpoint verify: unrecognized arguments: --fix; usage"),
        (("show", "{root}", "no.*"), "no.*: no tensor of {root}/step_00000400 is called so"),
        (("show", "--diff", "{root}"), "checkpoint show: give two places"),
        (("restore", "{root}"), "checkpoint restore: give two places: restore SRC DST"),
        (("restore", "{root}", "d", "--limit", "fast"), "--limit fast: must be a number of"),
        (("restore", "{root}", "d", "--layout", "tp"), "--layout tp: write each once, as in"),
        (("restore", "{root}", "d", "--staging", "s"), "--staging s: has no effect without"),
        (("restore", "{root}", "d/step_00000007"), "is of step 400, so its folder is called"),
        (("gc", "{root}/step_00000100"), "is one checkpoint; give the folder that holds it"),
        (("gc", "{root}", "--keep", "0"), "--keep 0: must be a whole number, 1 or more"),
        (("gc", "{root}", "--memory", "--keep", "2"), "--keep 2: has no effect with --memory"),
        (("gc", "{root}/step_00000100", "--memory"), "is one checkpoint; give the folder that"),
        (("gc", "{root}/../file", "--memory"), "file: is a file, not a folder"),
        (("ls", "{root}", "--option", "key"), "--option key: write KEY=VALUE, as in"),
        (("ls", "{root}", "--json", "no/a.json"), "--json no/a.json: cannot be written"),
        (("convert", "{root}"), "checkpoint convert: give two places"),
        (("import", "a"), "checkpoint import: give two folders: SOURCE TARGET"),
    ],
)
def test_bad_input_is_one_line_and_2(
    argv: tuple[str, ...], said: str, checkpoints: Path, capsys: Captured
) -> None:
    (checkpoints.parent / "file").write_text("")
    code, out, err = run(capsys, *(text.format(root=checkpoints) for text in argv))
    assert (code, out) == (2, "")
    assert said.format(root=checkpoints) in err
    assert err.count("\n") == 1


def test_show_lists_tensors_shards_and_settings(checkpoints: Path, capsys: Captured) -> None:
    code, out, _ = run(capsys, "show", str(checkpoints), "model.layers.?.w", "--shards")
    assert code == 0
    assert out.splitlines()[0] == f"{checkpoints}/step_00000400"
    assert "model.layers.0.w  F32   37x24" in out
    assert "[7:14,0:24]           part-00001.safetensors" in out
    assert out.splitlines()[-1] == "3 tensors in 18 shards, 10.7 KB"
    _, found = as_json(capsys, "show", str(checkpoints), "--step", "100")
    by_name = {item["name"]: item for item in found["tensors"]}
    assert by_name["model.half"]["dtype"] == "BF16"
    assert by_name["optim.step.norm"]["shape"] == []
    content = (checkpoints / "step_00000100" / "part-00001.safetensors").read_bytes()
    shard = by_name["model.layers.1.w"]["shards"][1]
    assert (shard["file"], shard["offsets"]) == ("part-00001.safetensors", [7, 0])
    wanted = tensors(100)["model.layers.1.w"][7:14].tobytes()
    assert content[shard["begin"] :][: len(wanted)] == wanted


def test_diff_sees_through_layouts(tmp_path: Path, capsys: Captured) -> None:
    one = tensors(1)
    make(tmp_path / "a", 10, one, ranks=4, meta={"config": {"lr": 0.1, "seed": 1}})
    make(tmp_path / "b", 10, one, ranks=3, dim=1, meta={"config": {"lr": 0.2, "seed": 1}})
    code, found = as_json(capsys, "show", "--diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (code, found["tensors"], found["equal"]) == (0, [], len(one))
    assert {"name": "config.lr", "a": 0.1, "b": 0.2} in found["settings"]
    other = {name: array.copy() for name, array in one.items() if name != "model.norm"}
    other["model.layers.1.w"][3, 5] += 0.5
    other["model.half"] = other["model.half"][:8]
    other["new"] = np.zeros(3, np.float32)
    make(tmp_path / "c", 10, other, ranks=3, dim=1)
    code, out, _ = run(capsys, "show", "--diff", str(tmp_path / "a"), str(tmp_path / "c"))
    assert code == 1
    assert "model.half        A BF16 [16, 9], B BF16 [8, 9]" in out
    assert "model.layers.1.w  1 of 888 elements, by at most 0.5" in out
    assert "model.norm        only in A" in out
    assert "new               only in B" in out


def test_diff_names_a_damaged_shard(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path / "a", 10, tensors(1), ranks=4)
    make(tmp_path / "b", 10, tensors(1), ranks=3)
    path = tmp_path / "a" / "step_00000010" / "part-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, _, err = run(capsys, "show", "--diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 1
    assert "part-00002.safetensors: rng.cpu.0[40:60] is damaged" in err


def test_gc_deletes_leftovers_only(checkpoints: Path, capsys: Captured) -> None:
    shutil.copytree(checkpoints / "step_00000500", checkpoints / "step_00000150")
    shutil.copytree(checkpoints / "step_00000400", checkpoints / "step_00000400.r1")
    (checkpoints / "step_00000500" / "restore.journal").write_text("{}")
    make(checkpoints, 0, tensors(0))
    before = sorted(path.name for path in checkpoints.iterdir())
    assert run(capsys, "gc", str(checkpoints), "--dry-run")[0] == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    code, found = as_json(capsys, "gc", str(checkpoints.parent), "--keep", "1")
    assert code == 0
    kept = {item["folder"]: item["why"] for item in found["folders"] if item["kept"]}
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(kept)
    assert kept.keys() == {
        "step_00000000", "step_00000200", "step_00000300", "step_00000400.r1", "step_00000500",
    }  # fmt: skip
    assert kept["step_00000000"] == "imported weights"
    assert kept["step_00000200"].startswith("broken, but a repair may mend it")
    assert kept["step_00000500"] == "a restore that can go on"


def test_gc_spares_a_save_that_may_still_run(checkpoints: Path, capsys: Captured) -> None:
    assert run(capsys, "gc", str(checkpoints))[0] == 0
    assert (checkpoints / "step_00000500").is_dir()


def test_json_goes_to_a_file_beside_the_lines(
    checkpoints: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "out.json"
    code, out, err = run(capsys, "ls", str(checkpoints), "--json", str(file))
    assert (code, err) == (1, f"wrote {file}\n")
    assert "complete" in out
    assert len(json.loads(file.read_text())["checkpoints"]) == 5


def test_a_run_whose_checkpoints_are_elsewhere_is_followed(
    checkpoints: Path, tmp_path: Path, capsys: Captured
) -> None:
    run_folder = tmp_path / "other"
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text(
        f"checkpoint:\n  dir: file://{checkpoints}\n  storage:\n    options: {{}}\n"
    )
    found = as_json(capsys, "ls", str(run_folder))[1]
    assert [item["step"] for item in found["checkpoints"]] == [100, 200, 300, 400, 500]


def test_convert_to_torch_and_back(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path / "ours", 10, tensors(1), ranks=3)
    code, out, _ = run(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "dcp"))
    assert code == 0
    assert out.startswith(f"wrote {tmp_path}/dcp: step 10, 8 tensors, ")
    assert (tmp_path / "dcp" / ".metadata").is_file()
    code, found = as_json(capsys, "convert", str(tmp_path / "dcp"), str(tmp_path / "back"))
    assert (code, found["step"]) == (0, 10)
    assert run(capsys, "verify", str(tmp_path / "back"))[0] == 0
    assert run(capsys, "show", "--diff", str(tmp_path / "ours"), str(tmp_path / "back"))[0] == 0
    code, _, err = run(capsys, "convert", str(tmp_path / "ours"), "s3://bucket/x")
    assert (code, "torch's folder must be on this machine" in err) == (2, True)


def test_a_run_before_its_first_save(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "job.json").write_text('{"job": "0123456789abcdef"}')
    code, out, _ = run(capsys, "ls", str(tmp_path))
    assert (code, out) == (0, f"{tmp_path}/checkpoints\n  no checkpoints yet\n")
    assert run(capsys, "verify", str(tmp_path))[0] == 0
    code, _, err = run(capsys, "restore", str(tmp_path), str(tmp_path / "dst"))
    assert (code, "no complete checkpoint there" in err) == (2, True)


def test_help_tells_the_actions_and_places(capsys: Captured) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for word in ("--repair", "--layout", "--dry-run", "--memory", "s3://", "Exit codes", "gc"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 110


def test_figures() -> None:
    assert [size(n) for n in (0, 999, 1000, 123_456, 999_600, 5e12)] == [
        "0 B", "999 B", "1 KB", "123 KB", "1 MB", "5 TB",
    ]  # fmt: skip
    assert age(None) == "-"
    assert columns([("a", "bb"), ("ccc", "d")], right=(1,)) == ["a    bb", "ccc   d"]
