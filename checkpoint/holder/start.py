"""Starting a node's holder, and finding those that there are. Torch-free."""

import subprocess
import sys
import time
from pathlib import Path

from phalanx.checkpoint.holder.client import HolderClient
from phalanx.checkpoint.holder.line import HolderGone
from phalanx.checkpoint.holder.sockets import all_sockets, kill_silent, nobody_at, remove_left
from phalanx.checkpoint.holder.spec import TAKEN, HolderError

START_S = 30.0
"""Seconds that a holder may take to start, or one that ends to be gone."""


def start_holder(
    job: str, node: int, *, directory: str = "", linger_s: float, log: Path | None
) -> None:
    """Start the holder of a node, if there is none; returns when it answers.

    Args:
        directory: where the job's run saves, as it says to who asks; "" = nowhere.
        linger_s: seconds that it stays when all its ranks are gone.
        log: the file that it writes what it has to say to.

    Raises:
        HolderError: it does not start; says why.
        ValueError: see `socket_path`.
        PermissionError: see `socket_path`.
    """
    command = [sys.executable, "-P", "-m", "phalanx.checkpoint.holder"]
    command += ["--job", job, "--node", str(node), "--dir", directory, "--linger", str(linger_s)]
    command += ["--log", str(log.absolute())] if log is not None else []
    deadline, killed = time.monotonic() + START_S, False
    while True:
        if _answers(job, node):
            return
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == TAKEN and time.monotonic() < deadline:
            time.sleep(0.02)  # it is about to answer, or about to end
        elif done.returncode == TAKEN and not killed:
            kill_silent(job, node)
            deadline, killed = time.monotonic() + START_S, True
        elif done.returncode:
            why = done.stderr.strip() or f"exit code {done.returncode}"
            raise HolderError(f"the holder of {job}, node {node}, does not start: {why}")


def find_holders() -> list[tuple[str, int]]:
    """(job, node) of this user's holders on this machine, also of those that do not answer.

    What holders left that were killed is removed.

    Raises:
        PermissionError: see `socket_path`.
    """
    found = []
    for job, node in all_sockets():
        if nobody_at(job, node):
            remove_left(job, node)
        else:
            found.append((job, node))
    return found


def _answers(job: str, node: int) -> bool:
    """Whether a run can use the holder; one that is being killed may still take connections."""
    try:
        with HolderClient.connect(job, node) as client:
            client.hello()
    except HolderGone:
        return False
    except HolderError:
        pass  # of another version, which does not know the request, but it is there
    return True
