"""Ranks as processes of this machine, forked from one that has torch imported."""

import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from phalanx.launch import env
from phalanx.launch.ranks.failure import GRACE_S, Failure, Stopped, death, first_failure
from phalanx.launch.ranks.forkserver import ForkServer
from phalanx.launch.ranks.rank import rank_main
from phalanx.train.config import LaunchConfig


def warm_up() -> None:
    """Start importing torch in the background, so that a later launch need not wait for it."""
    ForkServer.shared()


def launch_local(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int,
    config: LaunchConfig,
    log_dir: Path | None = None,
) -> list[Any]:
    """`phalanx.launch.ranks.start.launch` on this machine."""
    plan = {
        "world_size": world_size,
        "device_type": env.device_type(config, world_size),
        "threads": env.threads_per_rank(config, world_size),
        "timeout_s": config.timeout_s,
        "node_size": config.ranks_per_node if config.emulate_nodes else world_size,
    }
    with ExitStack() as stack:
        job = _Job(world_size, log_dir, stack)
        work = _pickled(fn, args)
        surroundings = (dict(os.environ), os.getcwd(), list(sys.path))
        for rank in range(world_size):
            main = partial(
                rank_main, rank=rank, plan=plan, work=work, log_dir=log_dir, around=surroundings
            )
            job.start(rank, pickle.dumps(main))
            if rank == 0 and world_size > 1:
                plan = plan | {"init_method": job.meeting_place()}
                if job.failures:
                    break
        return job.wait()


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bytes, dict[str, Any] | None]:
    """The work, and for a function of the running script how a rank finds that script."""
    script = None
    if fn.__module__ == "__main__":
        from multiprocessing.spawn import get_preparation_data

        found = get_preparation_data("rank")
        script = {key: found[key] for key in found if key.startswith("init_main")}
    return pickle.dumps((fn, args)), script


@dataclass
class _Job:
    """The ranks of one launch, as the launching process sees them."""

    world_size: int
    log_dir: Path | None
    stack: ExitStack
    pipes: dict[int, int] = field(default_factory=dict)
    answers: dict[int, bytearray] = field(default_factory=dict)
    status: dict[int, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    deadline: float | None = None

    def __post_init__(self) -> None:
        self.server = ForkServer.shared()
        self.selector = self.stack.enter_context(selectors.DefaultSelector())
        self.selector.register(self.server.socket, selectors.EVENT_READ, "exit")
        wake_r, self.wake_w = os.pipe()
        self.stack.callback(lambda: (os.close(wake_r), os.close(self.wake_w)))
        self.selector.register(wake_r, selectors.EVENT_READ, "signal")
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(signum, self._on_signal)
                self.stack.callback(signal.signal, signum, before)
        self.stack.callback(self._end)

    def start(self, rank: int, target: bytes) -> None:
        """Fork one rank."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self.pipes[rank] = ours
        self.answers[rank] = bytearray()
        self.stack.callback(os.close, ours)
        self.selector.register(ours, selectors.EVENT_READ, rank)
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):
                stream.flush()
        self.server.fork(rank, target, (theirs, 1, 2))
        os.close(theirs)

    def meeting_place(self) -> str:
        """The address where rank 0 lets the others meet."""
        while b"\n" not in self.answers[0] and 0 not in self.status:
            self._step()
        return bytes(self.answers[0]).partition(b"\n")[0].decode()

    def wait(self) -> list[Any]:
        """Every rank's result, by rank, when all have ended.

        Raises:
            RankFailed: a rank raised or died.
            Stopped: SIGTERM or SIGINT ended ranks that had no handler for it.
        """
        while len(self.status) < len(self.pipes):
            self._step()
        if self.failures:
            ended = any(status == -signal.SIGTERM for status in self.status.values())
            if len(self.signals) > 1 or (self.signals and ended):
                raise Stopped(self.signals[0])
            raise first_failure(self.failures)
        return [self._answer(rank)["result"] for rank in range(self.world_size)]

    def _step(self) -> None:
        timeout = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        events = self.selector.select(timeout)
        for key, _ in events:
            if key.data == "exit":
                self._on_exit(*self.server.next_exit())
            elif key.data == "signal":
                os.read(key.fd, 1)
                # The first signal asks; one more ends.
                self._kill(signal.SIGTERM if len(self.signals) == 1 else signal.SIGKILL)
            else:
                self._read(key.data)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.deadline = None
            self._kill(signal.SIGKILL)

    def _on_signal(self, signum: int, _frame: Any) -> None:
        self.signals.append(signum)
        os.write(self.wake_w, b"!")

    def _kill(self, signum: int) -> None:
        alive = [rank for rank in self.pipes if rank not in self.status]
        if alive:
            self.server.kill(signum, alive)

    def _read(self, rank: int) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self.pipes[rank], 1 << 20):
                self.answers[rank] += part
            with suppress(KeyError):
                self.selector.unregister(self.pipes[rank])

    def _answer(self, rank: int) -> dict[str, Any]:
        answer: dict[str, Any] = pickle.loads(self.answers[rank].partition(b"\n")[2])
        return answer

    def _on_exit(self, rank: int, status: int) -> None:
        if rank not in self.pipes:
            return
        self._read(rank)
        self.status[rank] = status
        complete = bool(self.answers[rank].partition(b"\n")[2]) and status == 0
        answer = self._answer(rank) if complete else {}
        if "result" in answer:
            return
        log = None if self.log_dir is None else self.log_dir / f"rank{rank}.log"
        failure = answer.get("failure") or Failure(
            rank=rank, host=socket.gethostname(), text=death(status, log)
        )
        self.failures.append(failure)
        if self.deadline is None:
            self.deadline = time.monotonic() + GRACE_S

    def _end(self) -> None:
        """No rank outlives its launch, whatever ended it."""
        with suppress(OSError, RuntimeError):
            self._kill(signal.SIGKILL)
            while len(self.status) < len(self.pipes):
                rank, status = self.server.next_exit()
                self.status[rank] = status
