"""torchrun: starting it, and being one of its workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from phalanx.launch import env
from phalanx.launch.bad_input import BadInput
from phalanx.launch.ranks.failure import Failure, RankFailed, Stopped, first_failure
from phalanx.launch.ranks.logs import redirect
from phalanx.train.config import Config, LaunchConfig

CULPRIT_S = 2.0
"""How long a rank that failed because another did waits for that one to tell its failure."""
POLL_S = 0.2
"""Time between looks at signals and at torchrun's workers."""


def run_torchrun(arguments: Sequence[str], *, config: Config, world_size: int) -> None:
    """`python -m torch.distributed.run ... -m phalanx.train ARGUMENTS` on this node, to its end.

    Raises:
        RankFailed: a rank of this node failed.
        Stopped: a signal ended ranks that could not yet save, or a second one ended all.
        BadInput: launch.nodes > 1 without launch.address.
    """
    started = time.time()
    log_dir = Path(config.run.dir) / "logs"
    command = [*_torchrun(config.launch, world_size), "-m", "phalanx.train", *arguments]
    threads = env.threads_per_rank(config.launch, world_size // config.launch.nodes)
    with _Agent() as agent:
        code = agent.run(command, {"OMP_NUM_THREADS": str(threads)} | os.environ)
    if not code:
        return
    failures = _read_failures(log_dir, since=started)
    asked = len(agent.signals)
    if asked > 1 or (asked and all(failure.follows for failure in failures)):
        raise Stopped(agent.signals[0])
    if failures:
        raise first_failure(failures)
    text = f"torchrun ended with exit code {code}; its messages above name the rank"
    raise RankFailed(Failure(rank=0, host=socket.gethostname(), text=text))


class _Agent:
    """torchrun's own process, and what becomes of signals while it runs.

    Asked to stop, torchrun ends with 1 and leaves its workers 30 s. So its workers are asked
    instead: they end their step, save and return, and torchrun ends with 0.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Agent":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def run(self, command: Sequence[str], environ: dict[str, str]) -> int:
        """Start torchrun; its exit code."""
        process = subprocess.Popen(command, start_new_session=True, env=environ)
        agent = psutil.Process(process.pid)
        had_workers = asked = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
            if had_workers and not self.signals:
                continue
            with suppress(psutil.NoSuchProcess):
                workers = _workers(agent)
                had_workers = had_workers or bool(workers)
                if len(self.signals) > 1:
                    _each([*agent.children(recursive=True), agent], psutil.Process.kill)
                elif self.signals and not asked:
                    _each(workers if had_workers else [agent], psutil.Process.terminate)
                    asked = bool(workers) or not had_workers

    def _hear(self, signum: int, _frame: Any) -> None:
        """Only noted here: a second signal may interrupt what the first one started."""
        self.signals.append(signum)


def _each(processes: list[psutil.Process], do: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            do(process)


def _workers(agent: psutil.Process) -> list[psutil.Process]:
    """The ranks among torchrun's children that run."""
    workers = []
    for child in agent.children():
        with suppress(psutil.Error):  # ended since
            if env.torchrun_place(child.environ()) is not None:
                workers.append(child)
    return workers


def _torchrun(launch: LaunchConfig, world_size: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={launch.nodes}"]
    command.append(f"--nproc-per-node={world_size // launch.nodes}")
    if launch.nodes == 1:
        return [*command, "--standalone"]
    if launch.address is None:
        raise BadInput(
            f"launch.nodes={launch.nodes}: torchrun needs launch.address=HOST:PORT, the same on "
            "every node, where HOST is one of them"
        )
    return [*command, "--rdzv-backend=c10d", f"--rdzv-endpoint={launch.address}"]


def run_as_worker(
    fn: Callable[..., Any], *args: Any, config: LaunchConfig, log_dir: Path | None
) -> Any:
    """Be the rank that torchrun's variables describe; exits with 1 when `fn` raises."""
    from phalanx.parallel.ranks import Ranks

    place = env.torchrun_place()
    if place is None:
        raise RuntimeError("not started by torchrun: TORCHELASTIC_RUN_ID is not set")
    ranks = Ranks(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        node_size=place.ranks_per_node,
        init_method="env://",
        device_type=env.device_type(config, place.local_world_size),
        threads=env.threads_per_rank(config, place.local_world_size),
        timeout_s=config.timeout_s,
    )
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    log = redirect(rank=ranks.rank, log_dir=log_dir)
    try:
        return fn(ranks, *args)
    except Exception as error:
        failure = Failure.caught(error, rank=ranks.rank, log=log)
        if log_dir is not None:
            _failure_file(log_dir, ranks.rank).write_text(json.dumps(vars(failure)))
        if failure.follows and failure.log:
            # The culprit's traceback shall be the one that is seen, and torchrun ends every rank
            # once the first has exited: leave it the time to speak.
            name = f"rank {failure.rank} on {failure.host}"
            terminal.write(f"phalanx: {name} lost a peer; its traceback is in {failure.log}\n")
            time.sleep(CULPRIT_S)
        else:
            terminal.write(f"{failure.last_words}\n")
        for stream in (terminal, sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)  # a background thread may be waiting for ranks that will never come


def _failure_file(log_dir: Path, rank: int) -> Path:
    return log_dir / f"failure{rank}.json"


def _read_failures(log_dir: Path, *, since: float) -> list[Failure]:
    """What this run's workers left, in order."""
    files = [file for file in log_dir.glob("failure*.json") if file.stat().st_mtime >= since]
    failures = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        with suppress(json.JSONDecodeError):  # cut short by torchrun's kill
            failures.append(Failure(**json.loads(file.read_text())))
    return failures
