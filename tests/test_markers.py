"""Every file with slow tests names its area, so that an area can be run by itself."""

import re
import tomllib

import pytest


def test_files_with_slow_tests_have_an_area(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    options = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    areas = {line.partition(":")[0] for line in options["markers"]} - {"slow", "gpu"}
    marks_of = {
        path: set(re.findall(r"\bmark\.(\w+)", path.read_text()))
        for path in (root / "tests").rglob("test_*.py")
    }
    slow = {path: marks for path, marks in marks_of.items() if "slow" in marks}
    assert [str(path) for path, marks in slow.items() if not marks & areas] == []
    assert areas <= set().union(*slow.values())
