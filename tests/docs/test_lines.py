"""Every command of README and docs runs as it stands, and prints what it is there for."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.launch.config.app import Command
from phalanx.launch.config.compose import compose
from phalanx.launch.verbs.table import VERBS
from tests import ROOT
from tests.checkpoint.ranks import holder_pids
from tests.docs.lines import DOCUMENTS, Line, commands, outputs, words_of, yaml_files
from tests.docs.rules import COMPOSED, EXPECTED, FIRST, LEFT_OUT, as_run, expected
from tests.killed_run import end_all

LINES = {document: commands(document) for document in DOCUMENTS}
ENVIRON = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
OWN_OPTIONS = ("--help", "--config-dir", "--json", "--random")
"""What overrides are not all that stands behind a verb with."""
LINE_S = 240
"""Seconds that one command may take on a busy machine."""


def runnable(document: str) -> list[Line]:
    """A document's commands but those that are left out."""
    return [line for line in LINES[document] if line.text not in LEFT_OUT]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's data, as `make train` prepares it, and text of somebody's own."""
    folder = tmp_path_factory.mktemp("docs")
    done = shell("phalanx data prepare", folder)
    assert done.returncode == 0, done.stdout
    (folder / "prepared.txt").write_text(done.stdout)
    (folder / "corpus").mkdir()
    pages = "\n\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    for number in range(4):
        (folder / "corpus" / f"{number}.txt").write_text(pages)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A fresh folder with what is prepared; holders of its runs end with the test."""
    (tmp_path / "datasets").symlink_to(prepared / "datasets")
    shutil.copytree(prepared / "corpus", tmp_path / "corpus")
    yield tmp_path
    for job in tmp_path.glob("runs/**/job.json"):
        end_all(holder_pids(job.parent).values())


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if runnable(name)])
def test_every_command_runs_as_it_stands(document: str, folder: Path) -> None:
    for name, text in yaml_files(document).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = shell(FIRST.get(document, as_run("phalanx train")), folder)
    assert done.returncode == 0, done.stdout
    wrong = [said for line in runnable(document) if (said := why_wrong(line, folder))]
    assert not wrong, "\n\n".join(wrong)


def why_wrong(line: Line, folder: Path) -> str:
    """What of the command is not as expected; "" where all is."""
    if needs_root(line.text):
        return ""
    if "corpora/web" in line.text:  # corpora that already are there
        make_corpora(folder)
    command = as_run(line.text)
    want = expected(command)
    done = shell(command, folder)
    if done.returncode == want.code and re.search(want.pattern, done.stdout, re.MULTILINE):
        return ""
    tail = "\n".join(done.stdout.splitlines()[-15:])
    return f"{line}\n-> {command}\nexit {done.returncode}, expected {want}\n{tail}"


def needs_root(text: str) -> bool:
    """Whether the command needs network namespaces and this machine has none to give."""
    able = os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
    return "bench slow_network" in text and not able


def make_corpora(folder: Path) -> None:
    """Megatron pairs `corpora/web` and `corpora/code`, of the text that was prepared before."""
    (folder / "corpora").mkdir()
    mine = folder / "datasets" / "mine"
    for name in ("web", "code"):
        for ending in ("bin", "idx"):
            shutil.copy(mine / f"tokens.{ending}", folder / "corpora" / f"{name}.{ending}")
    shutil.copy(mine / "tokenizer.json", folder / "corpora" / "tokenizer.json")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it as a user would type it; both outputs in `stdout`."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LINE_S,
    )


@pytest.mark.slow
@pytest.mark.docs
def test_the_demos_data_is_what_the_readme_says(prepared: Path) -> None:
    said = (prepared / "prepared.txt").read_text().splitlines()
    shown = words_of(ROOT / "README.md")
    assert len(said) == 3
    assert [line for line in said if " ".join(line.split()) not in shown] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_one(document: str) -> None:
    """Its verb exists, and its overrides compose: a wrong key is found without running it."""
    for line in runnable(document):
        program, verb, *rest = shlex.split(line.text)
        if program != "phalanx" or verb.startswith("-"):
            continue
        assert verb in VERBS, line
        assert any(re.search(pattern, as_run(line.text)) for pattern, _ in EXPECTED), line
        if VERBS[verb].takes_overrides and verb in ("train", "verify", "data"):
            argv = [word for word in rest if word not in ("prepare", "show")]
            if any(part in line.text for part in OWN_OPTIONS):
                continue
            compose(Command.parse(argv).jobs()[0])


def test_commands_are_found() -> None:
    counts = {document: len(lines) for document, lines in LINES.items()}
    assert counts["README.md"] > 35, counts
    assert sum(counts.values()) > 90, counts
    assert any("loss" in text for text in outputs("README.md"))


def test_what_is_left_out_exists() -> None:
    every = {line.text for lines in LINES.values() for line in lines}
    assert set(LEFT_OUT) - every == set()
    assert [part for part in COMPOSED if not any(part in text for text in every)] == []


def test_make_knows_its_targets() -> None:
    lines = [line for found in LINES.values() for line in found if line.text.startswith("make ")]
    assert len(lines) > 5
    for line in lines:
        done = subprocess.run(["bash", "-c", f"{line.text} -n"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, line
