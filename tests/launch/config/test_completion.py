"""Completion as a shell asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.launch.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("phalanx ver", {"train", "verify", "doctor"}, {"model="}),
        ("phalanx train model=", {"model=tiny", "model=llama3_8b"}, {"train"}),
        ("phalanx train pipeline=zb_v parallel.p", {"parallel.pp="}, {"parallel.tp="}),
        ("phalanx bench step optim", {"optim=", "optim."}, {"step"}),
        ("phalanx checkpoint ls mod", set(), {"model="}),
    ],
)
def test_words_that_may_come_next(
    line: str,
    offered: set[str],
    not_offered: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    words = set(capsys.readouterr().out.split())
    assert offered <= words
    assert not not_offered & words


def test_bash_completes() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = """eval "$(phalanx -sc install=bash)"
        COMP_LINE="phalanx train pipeline=zb_" COMP_CWORD=2 COMP_POINT=25 hydra_bash_completion
        echo "${COMPREPLY[@]}" """
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["pipeline=zb_h1", "pipeline=zb_h2", "pipeline=zb_v"], done.stderr


@pytest.mark.parametrize("argv", [["-sc"], ["-sc", "install=tcsh"], ["train", "-sc", "bash"]])
def test_what_hydra_does_not_answer_is_one_line(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    assert "takes install=SHELL" in capsys.readouterr().err
