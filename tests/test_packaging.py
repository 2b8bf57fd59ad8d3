"""The package list is whole, and a wheel carries everything a run needs and nothing generic."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.packaging

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *SETUPTOOLS["package-dir"].values()):
        if (ROOT / name).exists():
            _copy(ROOT / name, source / name)
    _run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(source)]
    )
    (built,) = folder.glob("*.whl")
    return built


def test_packages_are_the_folders_that_hold_an_init() -> None:
    listed = SETUPTOOLS["packages"]
    found = [
        ".".join(("phalanx", *init.parent.relative_to(ROOT).parts))
        for top in SETUPTOOLS["package-dir"].values()
        for init in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)


def test_every_top_folder_of_sources_is_mapped() -> None:
    with_code = {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"tests"}
    assert SETUPTOOLS["package-dir"] == {f"phalanx.{name}": name for name in with_code}


def test_every_python_file_is_in_a_package() -> None:
    homeless = [
        path.relative_to(ROOT)
        for top in SETUPTOOLS["package-dir"].values()
        for path in (ROOT / top).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    ]
    assert homeless == []


def test_no_root_package_shadows_the_namespace() -> None:
    assert not (ROOT / "phalanx").exists()


def test_every_top_package_is_marked_typed() -> None:
    missing = [
        top for top in SETUPTOOLS["package-dir"].values() if not (ROOT / top / "py.typed").exists()
    ]
    assert missing == []


def test_wheel_holds_every_yaml_and_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"phalanx/{path.relative_to(ROOT)}"
        for top in SETUPTOOLS["package-dir"].values()
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (ROOT / top).rglob(pattern)
    }
    assert len(expected) > 50
    assert expected - names == set()


def test_wheel_adds_one_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"phalanx"}


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment_from_another_folder(
    wheel: Path, tmp_path: Path
) -> None:
    """Only the dependencies come from this environment; phalanx itself comes from the wheel."""
    venv, folder = tmp_path / "venv", tmp_path / "elsewhere"
    folder.mkdir()
    _run([sys.executable, "-m", "venv", str(venv)])
    python, phalanx = venv / "bin" / "python", venv / "bin" / "phalanx"
    _run([str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)])
    # A folder named on PYTHONPATH gives its packages but runs none of its .pth files, so the
    # editable install of this checkout stays unseen.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}

    where = _run([str(python), "-c", "import phalanx.train as t; print(t.__file__)"], folder, env)
    assert Path(where.strip()).is_relative_to(venv)
    said = _run([str(phalanx), "--version"], folder, env)
    assert said.strip() == f"phalanx {PYPROJECT['project']['version']}"
    assert "num_layers: 4" in _run([str(phalanx), "train", "--cfg", "job"], folder, env)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def _run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
