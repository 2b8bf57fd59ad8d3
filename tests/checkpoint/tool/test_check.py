"""Damaged data makes every action of `phalanx checkpoint` exit with 1 and name file and shard; 2 is
for what the user wrote."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from phalanx.train.model.config import ModelConfig
from phalanx.train.model.hf_weights import parameter_shapes
from tests.checkpoint.stored import make
from tests.checkpoint.tool.command import Captured, cut_off, flip, run

MODEL = ModelConfig(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=24)
STEP, PART = "step_00000010", "part-00001.safetensors"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """One checkpoint of a model, by three ranks."""
    arrays = {
        f"model.{name}": np.ones(shape, np.float32)
        for name, shape in parameter_shapes(MODEL).items()
    }
    make(tmp_path / "src", 10, arrays, ranks=3, meta={"config": {"model": asdict(MODEL)}})
    return tmp_path / "src"


LAST = "model.head.weight[22:32,0:16]"
"""The last shard of PART."""


@pytest.mark.parametrize("action", ["export", "convert", "restore", "restore far"])
@pytest.mark.parametrize("damage", [flip, cut_off, Path.unlink])
def test_a_damaged_file_and_its_shard_are_named(
    action: str, damage: Callable[[Path], None], checkpoints: Path, capsys: Captured
) -> None:
    damage(checkpoints / STEP / PART)
    verb, _, far = action.partition(" ")
    target = f"memory://{checkpoints}" if far else str(checkpoints.parent / "dst")
    code, out, err = run(capsys, verb, checkpoints, target)
    assert (code, out) == (1, "")
    assert err.startswith(f"phalanx: checkpoint {verb}: ")
    assert err.count("\n") == 1
    assert PART in err
    assert "model." in err or (far and "missing" in err)
    assert "rank 0" not in err
    assert "Error" not in err
    assert not (checkpoints.parent / "dst" / STEP / "manifest.json").exists()
    if verb != "restore":
        assert not (checkpoints.parent / "dst").exists()


@pytest.mark.parametrize("action", ["export", "convert", "restore", "show"])
def test_a_damaged_manifest_is_named(action: str, checkpoints: Path, capsys: Captured) -> None:
    cut_off(checkpoints / STEP / "manifest.json")
    target = () if action == "show" else (checkpoints.parent / "dst",)
    code, out, err = run(capsys, action, checkpoints, *target)
    assert (code, out) == (1, "")
    said = f"phalanx: checkpoint {action}: {checkpoints}/{STEP}: manifest.json is damaged"
    assert err.startswith(said)


def test_show_tells_missing_and_cut_files(checkpoints: Path, capsys: Captured) -> None:
    shutil.copytree(checkpoints, checkpoints.parent / "whole")
    assert run(capsys, "show", checkpoints)[0] == 0
    cut_off(checkpoints / STEP / "part-00000.safetensors")
    (checkpoints / STEP / PART).unlink()
    code, out, _ = run(capsys, "show", checkpoints, "model.embed.*")
    assert code == 1
    assert "model.embed.weight  F32   32x16  " in out
    first, second = out.splitlines()[-2:]
    assert first.startswith("broken: part-00000.safetensors has ")
    assert second == f"broken: {PART} is missing"
    code, out, _ = run(capsys, "show", checkpoints, "--json", "-")
    wrong = json.loads(out)["wrong_files"]
    assert (code, [item["file"] for item in wrong]) == (1, ["part-00000.safetensors", PART])
    assert f"broken: {wrong[1]['reason']}" == second
    code, out, _ = run(capsys, "show", "--diff", checkpoints, checkpoints.parent / "whole")
    assert code == 1
    assert out.splitlines()[-1] == f"{checkpoints}/{STEP} is broken: {PART} is missing"


def test_a_restore_is_not_laid_over_what_is_damaged(checkpoints: Path, capsys: Captured) -> None:
    target = checkpoints.parent / "dst"
    assert run(capsys, "restore", checkpoints, target)[0] == 0
    cut_off(target / STEP / "manifest.json")
    code, _, err = run(capsys, "restore", checkpoints, target)
    assert (code, "a broken checkpoint stands there" in err) == (1, True)
    shutil.rmtree(target)
    (target / STEP).mkdir(parents=True)
    (target / STEP / "restore.journal").write_text('{"unit": 1}\n')
    code, _, err = run(capsys, "restore", checkpoints, target)
    assert (code, "restore.journal: is damaged" in err) == (1, True)


@pytest.mark.parametrize("damage", [cut_off, Path.unlink])
def test_convert_names_the_file_and_tensor_of_torchs_folder(
    damage: Callable[[Path], None], checkpoints: Path, capsys: Captured
) -> None:
    theirs = checkpoints.parent / "dcp"
    assert run(capsys, "convert", checkpoints, theirs)[0] == 0
    bad = sorted(theirs.glob("*.distcp"))[3]
    damage(bad)
    code, out, err = run(capsys, "convert", theirs, checkpoints.parent / "back")
    assert (code, out) == (1, "")
    assert str(bad) in err
    assert " model." in err


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def name_a_missing_file(folder: Path) -> None:
    content = json.dumps({"weight_map": {"a": "model-00002.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda folder: cut_off(folder / "config.json"), 1, "config.json is damaged: "),
        (lambda folder: cut_off(folder / "model.safetensors"), 1, "model.safetensors is damaged: "),
        (break_index, 1, "index.json is damaged: no weight_map"),
        (name_a_missing_file, 1, "model-00002.safetensors is missing; model.safetensors.index"),
        (lambda folder: (folder / "config.json").unlink(), 2, "no config.json there"),
        (lambda folder: (folder / "model.safetensors").unlink(), 2, "only safetensors can be"),
    ],
)
def test_import_of_a_damaged_folder(
    damage: Callable[[Path], None], code: int, said: str, tmp_path: Path, capsys: Captured
) -> None:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = dict.fromkeys(sizes, 2) | {"vocab_size": 8, "head_dim": 2}
    config |= {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "hf" / "model.safetensors")
    damage(tmp_path / "hf")
    found, out, err = run(capsys, "import", tmp_path / "hf", tmp_path / "dst")
    assert (found, out) == (code, "")
    assert said in err
    assert str(tmp_path / "hf") in err
    assert err.count("\n") == 1


def test_what_the_user_wrote_is_bad_input(checkpoints: Path, capsys: Captured) -> None:
    full = checkpoints.parent / "full"
    full.mkdir()
    (full / "file").write_text("")
    for argv in (
        ("export", checkpoints, full),
        ("export", "--dtype", "int4", checkpoints, checkpoints.parent / "dst"),
        ("convert", checkpoints, full),
        ("restore", checkpoints.parent / "nowhere", full),
        ("import", checkpoints.parent / "nowhere", full),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), argv
