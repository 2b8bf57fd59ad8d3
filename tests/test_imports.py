"""Imports run down the floors only, and what answers a wrong key needs no torch."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

FLOORS = ["launch", "train", "fault", "checkpoint", "parallel", "configs"]

TORCH_FREE = [
    "phalanx.train.config",
    "phalanx.train.data.config",
    "phalanx.train.engine.calendar",
    "phalanx.train.model.flops",
    "phalanx.train.plan.pipeline",
    "phalanx.train.resume.check",
    "phalanx.checkpoint.boxes",
    "phalanx.checkpoint.errors",
    "phalanx.checkpoint.holder.server.service",
    "phalanx.parallel.kernels.block_format",
    "phalanx.launch.cli",
    "phalanx.launch.config.compose",
    "phalanx.launch.ranks.failure",
    "phalanx.launch.verbs.plan.verb",
]


def test_imports_run_down_only() -> None:
    done = _lint_imports(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout


def test_the_contract_can_fail(tmp_path: Path) -> None:
    """Turned upside down, the same contract over the same packages is broken."""
    settings = _linter_settings()
    lines = ["[importlinter]", "root_packages ="]
    lines += [f"    {name}" for name in settings["root_packages"]]
    lines += ["[importlinter:contract:1]", "name = Upside down", "type = layers", "layers ="]
    lines += [f"    {layer}" for layer in reversed(settings["contracts"][0]["layers"])]
    upside_down = tmp_path / "upside_down.ini"
    upside_down.write_text("\n".join(lines) + "\n")

    done = _lint_imports(upside_down)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "phalanx.train is not allowed to import phalanx.parallel" in done.stdout


def test_the_contract_holds_the_floors() -> None:
    """Every floor is named, from the top down; launch and bench share the highest."""
    layers = _linter_settings()["contracts"][0]["layers"]
    assert layers[0] == "phalanx.launch : phalanx.bench"
    assert layers[1:] == [f"phalanx.{floor}" for floor in FLOORS[1:]]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def _lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", str(config), "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def _linter_settings() -> dict[str, Any]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return settings["tool"]["importlinter"]
