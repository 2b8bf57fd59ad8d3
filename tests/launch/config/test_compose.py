"""Overrides become a configuration, or one line that says what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.launch.config.compose import Source, check, compose, world_size
from phalanx.launch.config.keys import all_keys
from phalanx.launch.help import choices
from phalanx.train.config import Precision
from phalanx.train.data.config import DataConfig

MODELS = ", ".join(choices()["model"])


def message(overrides: list[str], source: Source | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        compose(overrides, source)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_values_reach_the_typed_configuration() -> None:
    config = compose(["model.dim=96", "precision=bf16", "run.name=mine", "verify.resume_in.tp=2"])
    assert config.model.dim == 96
    assert config.precision.compute is Precision.bf16
    assert config.checkpoint.dir == "runs/mine/checkpoints"
    assert config.verify.resume_in == {"tp": 2}
    config = compose(["verify.resume_in={tp: 2, dp_shard: 2}"])
    assert config.verify.resume_in == {"tp": 2, "dp_shard": 2}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stpes=3", "training.stpes=3: unknown key; did you mean training.steps"),
        ("dp_shard=2", "dp_shard=2: unknown key; did you mean parallel.dp_shard?"),
        ("modelx=tiny", "modelx=tiny: unknown key; did you mean model?"),
        ("modelx.dim=3", "modelx.dim=3: unknown key; did you mean model.dim"),
        ("zzz=3", "zzz=3: unknown key; `phalanx train --help` lists the keys"),
        ("+model.dmi=3", "model.dmi: unknown key; did you mean model.dim"),
        ("+zzz=3", "zzz: unknown key;"),
        ("model.dim=wide", "model.dim=wide: 'wide' is not a whole number"),
        ("optim.lr.peak=high", "optim.lr.peak=high: 'high' is not a number"),
        ("parallel.compile=maybe", "parallel.compile=maybe: 'maybe' is neither true nor false"),
        ("precision.compute=fp7", "precision.compute=fp7: 'fp7' is not known; choose one of fp64"),
        (
            "checkpoint.snapshot.parity=rs(2)",
            "checkpoint.snapshot.parity=rs(2): a value with parentheses needs quotes within the "
            "shell's: 'checkpoint.snapshot.parity=\"rs(2)\"'",
        ),
        ("checkpoint.dir=", "checkpoint.dir=: must name a folder, or a URL"),
        ("model=huge", f"model=huge: no such choice; choose one of {MODELS}"),
        ("training=long", "training=long: this is a group of keys"),
        ("experiment=null", "experiment=null: experiment takes the name of a choice: "),
        ("model.dim", "model.dim: not an override; write group=choice or key=value"),
        ("model.dim=[1", "model.dim=[1: not an override;"),
        ("model.dim=1,2", "model.dim=1,2: write model.dim=[1,2] for a list, or add --multirun"),
        ("run.dir=${rum.name}", "run.dir: Interpolation key 'rum.name' not found"),
        ("data.corpora=[{path: a, weigth2: 1}]", "data.corpora: unknown key weigth2"),
        ("training.steps=0", "training.steps=0: must be at least 1"),
        ("parallel.tp=4", "parallel.tp=4: does not divide model.num_heads="),
        ("parallel.pp=100", "parallel.pp=100 x 1 stages per rank = 100 pipeline stages, more than"),
    ],
)
def test_a_mistake_is_told_in_one_line(override: str, said: str) -> None:
    assert message([override]).startswith(said)


def test_a_mistake_in_a_users_file_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    source = Source(config_dir=str(tmp_path))
    (folder / "good.yaml").write_text("# @package _global_\ntraining: {steps: 7}\n")
    assert compose(["experiment=good"], source).training.steps == 7
    (folder / "key.yaml").write_text("# @package _global_\ntraining: {stepz: 7}\n")
    said = message(["experiment=key"], source)
    assert said.startswith("training.stepz: unknown key (in configs experiment/key); did you mean")
    (folder / "type.yaml").write_text("# @package _global_\ntraining: {steps: few}\n")
    said = message(["experiment=type"], source)
    assert said == "training.steps: 'few' is not a whole number (in configs experiment/type)"
    (folder / "broken.yaml").write_text("training: {steps: [1\n")
    assert "broken.yaml" in message(["experiment=broken"], source)
    assert "no such folder" in message([], Source(config_dir=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.storage.options={endpoint_url: http://h:1}",
        "checkpoint.storage.options.endpoint_url=http://h:1",
    ],
)
def test_a_drivers_options_are_any(override: str) -> None:
    assert compose([override]).checkpoint.storage.options == {"endpoint_url": "http://h:1"}


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (["parallel.pp=2", "parallel.dp_shard=2"], 4),
        (["parallel.pp=1", "parallel.tp=2", "parallel.dp_replicate=2", "parallel.dp_shard=3"], 12),
        (["parallel.pp=2", "parallel.dp_shard=-1", "launch.device=cpu"], 2),
        (["launch.ranks_per_node=6"], 6),
        (["launch=torchrun", "launch.nodes=3", "launch.ranks_per_node=2"], 6),
    ],
)
def test_world_size(overrides: list[str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert world_size(compose(overrides)) == ranks


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.ranks_per_node=3"], "but this run has 3 ranks"),
        (["training.global_batch_size=7"], "training.global_batch_size=7: not divisible by"),
        (["launch.device=cuda", "launch.ranks_per_node=4096"], "parallel: "),
        (["data.dir=nowhere"], "nowhere"),
    ],
)
def test_what_spans_parts_is_checked(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        check(compose(overrides))
    assert said in str(error.value)


def test_text_samples_need_a_tokenizer_and_a_prompt(demo_data: DataConfig) -> None:
    def checked(*overrides: str) -> None:
        folder = f"data.dir={demo_data.dir}"
        check(compose([folder, "model.vocab_size=300", "launch.device=cpu", *overrides]))

    foreign = f"data.corpora=[{{path: {demo_data.dir}/tokens}}]"
    checked("monitor.sample.tokens=8")
    checked(foreign, "monitor.sample.tokens=0")
    checked(foreign, "monitor.sample.tokens=8", f"data.tokenizer={demo_data.dir}/tokenizer.json")
    with pytest.raises(ValueError, match=r"^monitor\.sample\.tokens=8: ") as caught:
        checked(foreign, "monitor.sample.tokens=8")
    for remedy in ("data.tokenizer=path/to/tokenizer.json", "monitor.sample.tokens=0"):
        assert remedy in str(caught.value)
    with pytest.raises(ValueError, match=r"^data\.tokenizer=gone\.json: no such file"):
        checked(foreign, "monitor.sample.tokens=8", "data.tokenizer=gone.json")
    checked("monitor.sample.tokens=0", "monitor.sample.prompt=''")
    with pytest.raises(ValueError, match=r"^monitor\.sample\.prompt='': no tokens of .*json"):
        checked("monitor.sample.tokens=8", "monitor.sample.prompt=''")


def test_every_key_has_a_meaning() -> None:
    keys = all_keys()
    assert len(keys) > 60
    assert [key.name for key in keys if not key.meaning] == []
    assert len({key.name for key in keys}) == len(keys)


def test_composing_imports_no_torch() -> None:
    code = (
        "import sys; from phalanx.launch.config.compose import compose; compose([]); "
        "import phalanx.launch.cli; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
