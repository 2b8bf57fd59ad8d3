"""Programs that launch ranks, and what these do; torch-free, so that a program starts at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests import ROOT

if TYPE_CHECKING:
    from phalanx.parallel.ranks import Ranks


def until_stopped(ranks: "Ranks", folder: Path) -> str:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _frame: heard.append(signum))
    (folder / f"ready{ranks.rank}").write_text(str(os.getpid()))
    while not heard:
        time.sleep(0.01)
    return signal.Signals(heard[0]).name


def report_pid_and_sleep(ranks: "Ranks", folder: Path) -> None:
    (folder / f"ready{ranks.rank}").write_text(str(os.getpid()))
    time.sleep(600)


def sees_terminal(ranks: "Ranks", folder: Path) -> bool:
    print("\r  0%\r 50%\r100%", flush=True)
    return sys.stdout.isatty()


def start_script(
    folder: Path, function: str, *, stdout: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """A program that launches two ranks of a function above and prints their results."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from phalanx.launch.ranks import forkserver
from phalanx.launch.ranks.start import launch
from phalanx.train.config import Device, LaunchConfig
from tests.launch.ranks.launched import {function}
forkserver.PRELOAD = ("torch",)  # all that these functions need
print(launch({function}, Path({str(folder)!r}), world_size=2,
    config=LaunchConfig(device=Device.cpu), log_dir=Path({str(folder)!r})))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def wait_for(folder: Path, count: int) -> list[int]:
    """Pids of the ranks, once all are ready."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        pids = [path.read_text() for path in folder.glob("ready*")]
        if len(pids) == count and all(pids):
            return [int(pid) for pid in pids]
        time.sleep(0.02)
    raise TimeoutError(f"{count} ranks did not start")
