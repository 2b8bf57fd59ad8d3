"""`phalanx verify --random`: layouts that the checks allow are equal to one process, every one."""

import json
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from phalanx.launch.cli import main
from phalanx.launch.config.compose import Source
from phalanx.launch.verbs.verify_random import checked
from phalanx.train.data.config import DataConfig
from phalanx.train.verify.draw import AXES, draws

pytestmark = pytest.mark.verify

Captured = pytest.CaptureFixture[str]


def fixed(data: DataConfig) -> list[str]:
    return [f"data.dir={data.dir}", "model.vocab_size=300", "launch.device=cpu"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_40_layouts_are_equal_to_one_process(
    demo_data: DataConfig, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "random.json"
    code = main(
        ["verify", "--random", "40", "--seed", "12", "--json", str(file), *fixed(demo_data)]
    )
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    found = json.loads(file.read_text())
    assert f"40 verified, 0 failed, {found['refused']} draws refused by the checks" in said.out
    assert [layout["passed"] for layout in found["layouts"]] == [True] * 40
    assert all(0 < layout["worst"] <= 1e-12 for layout in found["layouts"])


@pytest.mark.slow
@pytest.mark.parametrize("key", AXES)
def test_every_value_of_an_axis_is_allowed_somewhere(key: str, demo_data: DataConfig) -> None:
    for value in dict.fromkeys(AXES[key]):
        for overrides in islice(draws(1, [*fixed(demo_data), f"{key}={value}"]), 300):
            try:
                checked(overrides, Source())
            except ValueError:
                continue
            break
        else:
            raise AssertionError(f"{key}={value}: refused in 300 draws")


def test_a_defect_is_found_and_its_command_shows_it_again(
    demo_data: DataConfig, capsys: Captured
) -> None:
    argv = ["--random", "1", "--seed", "5", "parallel.pp=1", *fixed(demo_data)]
    with pytest.raises(SystemExit) as end:
        main(["verify", *argv, "verify.inject=grad_scale"])
    said = capsys.readouterr()
    assert end.value.code == 1
    assert "0 verified, 1 failed" in said.out
    assert "gradient scale: every gradient is 1.5 times" in said.out
    _, command = said.err.strip().splitlines()[-2:]
    assert "parallel.pp=1" in command
    with pytest.raises(SystemExit) as end:
        main(shlex.split(command)[1:])
    assert end.value.code == 1
    assert "gradient scale: every gradient is 1.5 times" in capsys.readouterr().out


def test_a_seed_draws_the_same_again_and_keeps_what_is_fixed() -> None:
    fixed_ = ["parallel.pp=2", "optim.name=adamw"]
    first, again = (list(islice(draws(3, fixed_), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(draws(4, fixed_), 50))
    for overrides in first:
        kept = [text for text in overrides if text.startswith(("parallel.pp=", "optim.name="))]
        assert kept == fixed_


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--random", "0"], "--random 0: must be a whole number, 1 or more"),
        (["--random", "many"], "--random many: must be"),
        (["--random", "2", "--seed", "-1"], "--seed -1: must be a whole number, 0 or more"),
        (["--seed", "3"], "--seed 3: goes with --random N"),
        (["--random", "2", "--multirun", "parallel.tp=1,2"], "leave --multirun and --cfg out"),
        (["--random", "2", "launch=torchrun"], "launch.launcher=torchrun"),
        (["--random", "2", "no.such.key=1"], "no.such.key"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], words: str, capsys: Captured) -> None:
    assert main(["verify", *argv]) == 2
    said: Any = capsys.readouterr().err
    assert re.match(r"phalanx: .*\n\Z", said)
    assert words in said
