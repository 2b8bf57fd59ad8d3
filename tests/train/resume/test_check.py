"""What stands in run.dir is looked at before anything is written to it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.format.folders import folder_name
from phalanx.checkpoint.format.manifest import new_manifest, write_manifest
from phalanx.checkpoint.storage.open import open_storage
from phalanx.launch import env
from phalanx.launch.cli import main
from phalanx.launch.config import app
from phalanx.launch.verbs import train
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import Config, TrainingConfig
from phalanx.train.resume.check import KIND, changed_settings, check_resume, plain_settings

SIZES = {"seed": 1, "seq_len": 256, "global_batch_size": 16}
REFUSED = [
    ("training.seed=2", "training.seed=2: the checkpoint was made with 1"),
    ("training.seq_len=128", "training.seq_len=128: the checkpoint was made with 256"),
    ("training.global_batch_size=8", "training.global_batch_size=8: the checkpoint was made with"),
    ("optim=adamw8bit", "optim.name=adamw8bit: the checkpoint was made with adamw, "),
    ("checkpoint.resume=false", "checkpoint.resume=false: "),
]


def save(root: Path, step: int, *, kind: str = KIND, **settings: int) -> Path:
    """A folder that holds the manifest of a run, and nothing else."""
    config = Config(training=TrainingConfig(**{**SIZES, **settings}))
    meta: dict[str, Any] = {
        "kind": kind,
        "step": step,
        "samples": step * config.training.global_batch_size,
        "config": plain_settings(config),
    }
    manifest = new_manifest(step=step, meta=meta, parts=[], world_size=1)
    write_manifest(open_storage(root), folder_name(step), manifest)
    return root / folder_name(step)


def config_for(root: Path, *, resume: bool = True, **settings: int) -> Config:
    return Config(
        training=TrainingConfig(**{**SIZES, **settings}),
        checkpoint=CheckpointConfig(dir=str(root), resume=resume),
    )


@pytest.mark.parametrize(("override", "said"), REFUSED)
def test_a_refused_resume_is_one_line_and_writes_nothing(
    override: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched: list[object] = []
    monkeypatch.setattr(train, "launch", lambda *args, **_: launched.append(args))
    monkeypatch.setattr(app, "check", lambda _config: None)
    monkeypatch.setattr(app, "warm_up", lambda: None)
    save(tmp_path / "checkpoints", 4)
    (tmp_path / "config.yaml").write_text("as it was\n")
    argv = ["train", f"run.dir={tmp_path}", *(f"training.{k}={v}" for k, v in SIZES.items())]
    assert main([*argv, override]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"phalanx: {said}")
    assert err.count("\n") == 1
    assert launched == []
    assert (tmp_path / "config.yaml").read_text() == "as it was\n"
    assert main(argv) == 0
    assert len(launched) == 1
    assert "seq_len: 256" in (tmp_path / "config.yaml").read_text()


def test_the_launching_process_refuses_without_torch(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 4)
    code = f"""
import sys
from phalanx.launch.config import app
from phalanx.launch.cli import main
app.check = lambda _config: None
app.warm_up = lambda: None
code = main(["train", "run.dir={tmp_path}", "training.seed=2"])
sys.exit(99 if "torch" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the checkpoint was made with" in done.stderr
    assert not (tmp_path / "config.yaml").exists()


def test_the_newest_whole_manifest_decides(tmp_path: Path) -> None:
    save(tmp_path, 4, seed=1)
    newest = save(tmp_path, 8, seed=2)
    with pytest.raises(ValueError, match="training.seed=1: the checkpoint was made with 2"):
        check_resume(config_for(tmp_path, seed=1))
    text = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text(text.replace('"step":8', '"step":9'))
    check_resume(config_for(tmp_path, seed=1))
    (newest / "manifest.json").unlink()
    check_resume(config_for(tmp_path, seed=1))


def test_weights_alone_fit_any_samples_but_not_a_run_that_must_be_new(tmp_path: Path) -> None:
    save(tmp_path, 0, kind="weights")
    check_resume(config_for(tmp_path, seed=2, seq_len=128))
    with pytest.raises(ValueError, match="checkpoint.resume=false: .* checkpoint of step 0"):
        check_resume(config_for(tmp_path, resume=False))


def test_an_empty_folder_refuses_nothing(tmp_path: Path) -> None:
    check_resume(config_for(tmp_path / "none", resume=False))
    check_resume(config_for(tmp_path, resume=False))


def test_what_rounds_differently_is_told() -> None:
    """Layouts may change unsaid, but not what travels rounded."""
    rounding = {"quantize_weights": Quantization.int8, "quantize_gradients": Quantization.int4}
    quantized = Config(zero=ZeroConfig(error_feedback=True, **rounding))  # type: ignore[arg-type]
    meta = {"config": plain_settings(quantized)}
    assert changed_settings(meta, quantized) == []
    assert changed_settings(meta, Config(zero=ZeroConfig(stage=1))) == [
        "zero.quantize_weights: 'int8' -> 'none'",
        "zero.quantize_gradients: 'int4' -> 'none'",
        "zero.error_feedback: True -> False",
    ]
    del meta["config"]["zero"]["quantize_weights"]  # as saved before there was the setting
    assert changed_settings(meta, quantized) == ["zero.quantize_weights: 'none' -> 'int8'"]


def test_notes_know_the_device_that_auto_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "launch", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(app, "check", lambda _config: None)
    monkeypatch.setattr(app, "warm_up", lambda: None)
    monkeypatch.setattr(env, "gpu_count", lambda: 0)
    assert main(["train", f"run.dir={tmp_path}", "zero.offload=cpu"]) == 0
    assert "note: zero.offload=cpu: no effect" in capsys.readouterr().err
    monkeypatch.setattr(env, "gpu_count", lambda: 4)
    assert main(["train", f"run.dir={tmp_path}", "zero.offload=cpu"]) == 0
    assert "offload" not in capsys.readouterr().err
