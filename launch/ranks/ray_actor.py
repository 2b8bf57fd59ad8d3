"""What runs inside Ray's workers: one actor a rank. launch.ray imports it once Ray is found."""

import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from phalanx.launch import env
from phalanx.launch.ranks.failure import Failure
from phalanx.launch.ranks.logs import redirect
from phalanx.train.config import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class ActorPlace:
    """Where an actor runs."""

    node: str
    address: str
    host: str
    pid: int


class Rank:
    """One rank's actor. It has one thread, the main one, so that the work may handle signals."""

    def place(self) -> "ActorPlace":
        """Where this actor is."""
        return ActorPlace(
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def open_store(self, host: str) -> str:
        """Listen for the others on a port that the kernel picks (see launch.local)."""
        from torch.distributed import TCPStore

        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        return f"tcp://{host}:{self.store.port}"

    def run(
        self,
        work: bytes,
        plan: dict[str, Any],
        config: LaunchConfig,
        around: tuple[str, list[str], Path | None],
    ) -> dict[str, Any]:
        """The rank's work: its result, or its failure."""
        from phalanx.parallel.ranks import Ranks

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not Ray's, which would exit quietly
        folder, path, log_dir = around
        with suppress(OSError):  # another machine need not have the folder
            os.chdir(folder)
        sys.path += [item for item in path if item not in sys.path]
        log = redirect(rank=plan["rank"], log_dir=log_dir)
        threads = env.threads_per_rank(config, plan["local_world_size"])
        try:
            fn, args = ray.cloudpickle.loads(work)
            ranks = Ranks(threads=threads, timeout_s=config.timeout_s, **plan)
            return {"result": fn(ranks, *args)}
        except BaseException as error:
            return {"failure": Failure.caught(error, rank=plan["rank"], log=log)}
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def send_sigterm(pids: list[int]) -> None:
    """Runs as a task on the node of these processes: a busy actor answers no call."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
