"""What tests of survival share: runs of `phalanx train` as processes of their own, killed and
started again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from phalanx.launch.cli import main
from phalanx.train.data.config import DataConfig
from tests.checkpoint.ranks import holder_pids

SMALL = """
    training.seq_len=32 training.global_batch_size=16 training.microbatch_size=4
    training.eval_batches=0 model.vocab_size=300 model.dim=36 model.num_layers=3 model.num_heads=4
    model.num_kv_heads=2 model.head_dim=10 model.ffn_dim=52 optim.lr.warmup_steps=4
    parallel.pp=1 parallel.dp_shard=1 launch.device=cpu launch.threads_per_rank=1
    launch.timeout_s=60 monitor.tensorboard=false monitor.sample.tokens=0
    checkpoint.every=0 checkpoint.save_last=false
    checkpoint.snapshot.every=1 checkpoint.snapshot.linger_s=60
""".split()
"""Overrides of a run that takes a snapshot at every step, and never a checkpoint."""


class Run:
    """A run's folder, and the process that trains in it."""

    def __init__(self, folder: Path, data: DataConfig, *overrides: str) -> None:
        self.folder = folder
        self.overrides = list(overrides)
        self._arguments = [f"run.dir={folder}", f"data.dir={data.dir}", *SMALL]
        self._process: subprocess.Popen[str] | None = None

    def start(self, *overrides: str) -> None:
        """Begin, or go on."""
        environ = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phalanx.train", *self._arguments, *self.overrides, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environ,
        )

    def finish(self, *overrides: str) -> str:
        """Train to the end; all that was printed."""
        self.start(*overrides)
        text = self.wait()
        assert self.process.returncode == 0, text
        return text

    def finish_here(self, *overrides: str) -> None:
        """Train to the end where nothing is killed: in this process, whose ranks need not wait for
        torch to be imported once more."""
        assert main(["train", *self._arguments, *self.overrides, *overrides]) == 0

    def wait(self) -> str:
        """All that was printed until the end."""
        return self.process.communicate(timeout=240)[0]

    @property
    def process(self) -> subprocess.Popen[str]:
        """The newest start's."""
        assert self._process is not None
        return self._process

    def wait_for_lines(self, count: int) -> None:
        """Until so many steps are logged."""
        deadline = time.monotonic() + 120
        while len(self.metrics()) < count:
            assert self.process.poll() is None, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.003)

    def ranks(self) -> list[psutil.Process]:
        """The ranks, by rank; the one child of the launcher starts them one after the other."""
        [server] = [p for p in self._below() if p.ppid() == self.process.pid]
        return sorted(server.children(), key=lambda process: process.pid)

    def kill(self, who: str) -> str:
        """kill -9 "one rank", "all ranks", "launcher" or "everything" but the holders; returns
        what was printed when every process of this start is gone."""
        below = self._below()
        launcher = psutil.Process(self.process.pid)
        victims = {
            "one rank": lambda: self.ranks()[-1:],
            "all ranks": self.ranks,
            "launcher": lambda: [launcher],
            "everything": lambda: [launcher, *below],
        }[who]()
        for victim in victims:
            with suppress(psutil.NoSuchProcess):  # who started it was killed before
                victim.kill()
        text = self.wait()
        assert self.process.returncode != 0
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive
        return text

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def metrics(self) -> list[tuple[int, float, float]]:
        """(step, loss, norm) of every whole line of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [(m["step"], m["loss"], m["grad_norm"]) for m in map(json.loads, lines)]

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Lines of events.jsonl; with `names`, those alone."""
        path = self.folder / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return [event for event in events if not names or event["event"] in names]

    def holders(self) -> dict[int, int]:
        """Processes of this run's holders, by node."""
        return holder_pids(self.folder / "checkpoints")

    def clean_up(self) -> None:
        """End all that is left of it."""
        if self._process is not None and self._process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                self.kill("everything")
        with suppress(FileNotFoundError):
            end_all(self.holders().values())


def going_on_from(text: str) -> tuple[str, int]:
    """("snapshot in memory" or "checkpoint", step) that a start said it goes on from."""
    own = text.partition("\nlast lines of ")[0]  # the log has those of earlier starts too
    found = re.findall(r"going on from the (.*) of step (\d+)", own)
    assert len(found) == 1, text
    return found[0][0], int(found[0][1])


def end_all(pids: Iterable[int]) -> None:
    """kill -9, and wait until they are gone."""
    pids = list(pids)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    """Whether the process is there, and not only its remains."""
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        # While a thread is left, so are the process's connections.
        return state != "Z" or len(list((process / "task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true: Callable[[], bool], *, within_s: float = 30.0) -> float:
    """Seconds until it is."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < within_s
        time.sleep(0.005)
    return time.monotonic() - start


def snapshot_bytes(pid: int) -> dict[str, int]:
    """Bytes of host memory behind each piece of snapshots' memory that a process owns, by name."""
    found: dict[str, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection that just ended
            match = re.match(r"/memfd:(phalanx-\S+)", os.readlink(link))
            if match:
                found[match[1]] = link.stat().st_blocks * 512
    return found
