"""What the `phalanx` command prints and returns."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from phalanx.launch import env
from phalanx.launch.cli import main
from phalanx.launch.config import app
from phalanx.launch.config.app import Command, Job
from phalanx.launch.ranks.failure import Failure, first_failure
from phalanx.launch.verbs import train
from phalanx.launch.verbs.table import VERBS
from phalanx.train.config import Config, Device

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that would have been trained; no rank is started and no data is read."""
    configs: list[Config] = []

    def launch(*args: Any, **_: object) -> list[object]:
        configs.append(args[1])
        return [None]

    monkeypatch.setattr(train, "launch", launch)
    monkeypatch.setattr(app, "check", lambda _config: None)
    monkeypatch.setattr(app, "warm_up", lambda: None)
    return configs


def test_version_and_help_name_every_verb(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("phalanx 0.")
    assert main([]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"phalanx {verb}" in out


def test_help_of_a_group_tells_choices_types_defaults_and_meaning(capsys: Captured) -> None:
    assert main(["train", "--help", "precision"]) == 0
    out = capsys.readouterr().out
    assert "precision=  bf16, fp32" in out
    assert "precision.compute = fp32   (fp64 | fp32 | bf16)" in out
    assert "Gradient reduction across data-parallel ranks." in out
    assert "model.dim" not in out


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb: str, capsys: Captured) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: phalanx {verb}")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fly"], "phalanx: fly: unknown verb; choose one of train, verify"),
        (["train", "model.dmi=3"], "phalanx: model.dmi=3: unknown key"),
        (["train", "--nonsense"], "phalanx: unrecognized arguments: --nonsense"),
        (["train", "--help", "modelx"], "phalanx: --help modelx: no such group or key"),
        (["train", "data.dir=nowhere"], "phalanx: data.dir=nowhere"),
        (["train", "-m", "model.dim=192,x"], "phalanx: model.dim=x: 'x' is not a whole number"),
        (["bench", "speed"], "phalanx: bench speed: unknown; choose one of step"),
        (["data", "eat"], "phalanx: data eat: unknown; choose prepare or show"),
        (["doctor", "who"], "phalanx: doctor: who: takes"),
        (["checkpoint", "import", "nowhere"], "phalanx: checkpoint import: give two folders"),
        (["checkpoint", "import", "a", "b"], "phalanx: checkpoint import: a: no such folder"),
        (["verify", "launch=torchrun", "--json"], "phalanx: argument --json: expected one"),
        (["verify", "--json", "/dev/null/x.json"], "phalanx: --json /dev/null/x.json: "),
        (["bench", "step", "--json", "/dev"], "phalanx: --json /dev: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_2(
    argv: list[str], said: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "warm_up", lambda: None)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1


def test_the_command_itself_answers_without_torch() -> None:
    code = (
        "import sys; from phalanx.launch.cli import main; code = main(['train', 'model.dmi=3']); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("phalanx: model.dmi=3: unknown key")


def test_train_writes_the_resolved_configuration(tmp_path: Path, trained: list[Config]) -> None:
    assert main(["train", f"run.dir={tmp_path}/run", "training.steps=5"]) == 0
    written = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert written.training.steps == 5
    assert written.checkpoint.dir == f"{tmp_path}/run/checkpoints"
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), written)) == trained[0]


@pytest.mark.parametrize(
    ("taken", "run_dir", "reason"),
    [
        ("file", "file", "it is no folder"),
        ("file", "file/run", "Not a directory"),
        ("run/config.yaml/folder", "run", "Is a directory"),
    ],
)
def test_a_run_folder_that_cannot_be_written_is_one_line_and_2(
    taken: str, run_dir: str, reason: str, tmp_path: Path, trained: list[Config], capsys: Captured
) -> None:
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("")
    assert main(["train", f"run.dir={tmp_path / run_dir}"]) == 2
    said = f"phalanx: run.dir={tmp_path / run_dir}: cannot be written ({reason})\n"
    assert capsys.readouterr().err == said
    assert trained == []


def test_a_checkpoint_folder_that_cannot_be_written_is_one_line_and_2(
    tmp_path: Path, trained: list[Config], capsys: Captured
) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "checkpoints"
    assert main(["train", f"run.dir={tmp_path}/run", f"checkpoint.dir={place}"]) == 2
    said = f"phalanx: checkpoint.dir={place}: cannot be written (Not a directory)\n"
    assert capsys.readouterr().err == said
    assert trained == []


def test_two_runs_are_never_in_one_folder(
    tmp_path: Path, trained: list[Config], capsys: Captured
) -> None:
    argv = ["train", f"run.dir={tmp_path}/run"]
    assert main(argv) == 0
    written = (tmp_path / "run" / "config.yaml").read_text()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / "config.yaml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        capsys.readouterr()
        assert main([*argv, "training.steps=7"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"phalanx: run.dir={tmp_path}/run: another run is training in it; ")
        assert err.count("\n") == 1
        other.kill()
    assert (tmp_path / "run" / "config.yaml").read_text() == written
    assert main(argv) == 0
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("gpus", "layout", "resume_in", "device"),
    [
        (1, ["parallel.dp_shard=2"], "{}", "cpu"),
        (2, ["parallel.dp_shard=2"], "{}", "cuda"),
        (2, ["parallel.dp_shard=2"], "{tp: 2, dp_shard: 2}", "cpu"),
        (4, ["parallel.dp_shard=2"], "{tp: 2, dp_shard: 2}", "cuda"),
        (4, ["parallel.dp_shard=2", "launch.device=cpu"], "{}", "cpu"),
    ],
)
def test_verify_runs_everything_on_one_kind_of_device(
    gpus: int,
    layout: list[str],
    resume_in: str,
    device: str,
    trained: list[Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Device] = []

    def verify(config: Config, launch: object, *, world_size: int) -> SimpleNamespace:
        seen.append(config.launch.device)
        assert world_size == 2
        return SimpleNamespace(table=str, to_json=dict, passed=True)

    monkeypatch.setattr(env, "gpu_count", lambda: gpus)
    monkeypatch.setitem(sys.modules, "phalanx.train.verify", SimpleNamespace(verify=verify))
    argv = ["verify", "parallel.pp=1", *layout, f"verify.resume_in={resume_in}"]
    assert main(argv) == 0
    assert seen == [Device(device)]


@pytest.mark.parametrize(("gpus", "device"), [(1, "cpu"), (2, "cuda")])
def test_bench_is_told_the_device(
    gpus: int, device: str, trained: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Device] = []

    def bench(request: Any) -> list[Any]:
        seen.append(request.config.launch.device)
        return []

    monkeypatch.setattr(env, "gpu_count", lambda: gpus)
    monkeypatch.setitem(sys.modules, "phalanx.bench.step", SimpleNamespace(bench=bench))
    assert main(["bench", "step", "parallel.pp=1", "parallel.dp_shard=2"]) == 0
    assert seen == [Device(device)]


@pytest.mark.parametrize(
    ("extra", "folders"),
    [
        (["run.dir={}/run", "training.seed=1,2"], ["run/0", "run/1"]),
        (["run.dir={}/a,{}/b"], ["a", "b"]),
        (["run.dir={}/seed${{training.seed}}", "training.seed=3,4"], ["seed3", "seed4"]),
    ],
)
def test_jobs_of_a_sweep_write_to_folders_of_their_own(
    extra: list[str],
    folders: list[str],
    tmp_path: Path,
    trained: list[Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [text.format(tmp_path, tmp_path) for text in extra]
    assert main(["train", "--multirun", *argv]) == 0
    assert [config.run.dir for config in trained] == [f"{tmp_path}/{name}" for name in folders]
    assert trained[0].checkpoint.dir == f"{tmp_path}/{folders[0]}/checkpoints"


def test_cfg_job_prints_and_trains_nothing(capsys: Captured, trained: list[Config]) -> None:
    assert main(["train", "--cfg", "job", "training.steps=5"]) == 0
    assert "steps: 5" in capsys.readouterr().out
    assert trained == []


def test_a_users_folder_adds_choices(tmp_path: Path, trained: list[Config]) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntraining: {steps: 9}\n")
    argv = ["--config-dir", str(tmp_path), "experiment=mine", f"run.dir={tmp_path}/run"]
    assert main(["train", *argv]) == 0
    assert trained[0].training.steps == 9


def test_a_users_root_file_replaces_ours(
    tmp_path: Path, trained: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text(
        "defaults: [schema, _self_]\ntraining: {steps: 11}\nrun: {dir: here}\n"
        "hydra: {output_subdir: null, run: {dir: .}}\n"
    )
    assert main(["train", "--config-path", "own"]) == 0
    assert trained[0].training.steps == 11


def test_arguments_for_other_processes_compose_the_same(tmp_path: Path) -> None:
    command = Command.parse(["--config-dir", str(tmp_path), "training.steps=4", "-m"])
    assert command.sweep
    assert command.jobs() == [["training.steps=4"]]
    seen: list[Job] = []
    argv = ["--config-dir", str(tmp_path), "training.steps=4"]
    app.run("data", argv, seen.append, starts_ranks=False)
    again = Command.parse(seen[0].arguments)
    assert (again.source.config_dir, again.overrides) == (str(tmp_path), ["training.steps=4"])


DEFECT = "Traceback ...\nZeroDivisionError: the culprit"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, [*DEFECT.splitlines(), "phalanx: rank 3 on node7 failed"]),
        ({"message": "x=1: must be 2"}, [*DEFECT.splitlines(), "phalanx: rank 3 on node7 failed"]),
        (
            {"message": "x=1: must be 2", "log": "a/rank3.log"},
            [
                "phalanx: error: x=1: must be 2",
                "phalanx: rank 3 on node7 failed; its traceback is in a/rank3.log",
            ],
        ),
    ],
)
def test_a_failed_rank_is_told_last_and_returns_1(
    trained: list[Config],
    facts: dict[str, str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    def launch(*_: object, **__: object) -> list[object]:
        raise first_failure([Failure(rank=3, host="node7", text=f"{DEFECT}\n", **facts)])

    monkeypatch.setattr(train, "launch", launch)
    assert main(["train", f"run.dir={tmp_path}/run"]) == 1
    assert capsys.readouterr().err.splitlines()[-len(said) :] == said


def test_a_defect_of_ours_keeps_its_traceback(
    trained: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: object, **__: object) -> list[object]:
        raise ValueError("not the user's fault")

    monkeypatch.setattr(train, "launch", launch)
    with pytest.raises(ValueError, match="not the user's fault"):
        main(["train", f"run.dir={tmp_path}/run"])


def test_doctor_finds_and_writes(tmp_path: Path, capsys: Captured) -> None:
    assert main(["doctor", f"run.dir={tmp_path}", "--json", str(tmp_path / "d.json")]) == 0
    found = json.loads((tmp_path / "d.json").read_text())
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert found["ok"]
    assert states["gloo"] == "ok"
    assert states["torch"] == "ok"
    assert "all-reduce over 2 ranks works" in capsys.readouterr().out
