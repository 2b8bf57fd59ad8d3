"""What tests of `phalanx checkpoint` share: running it, and damaging a file."""

from pathlib import Path

import pytest

from phalanx.launch.cli import main

Captured = pytest.CaptureFixture[str]


def run(captured: Captured, *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = main(["checkpoint", *map(str, argv)])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *captured.readouterr()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
