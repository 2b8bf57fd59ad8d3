"""The process that owns a node's snapshots and outlives the ranks that take them.

`python -m phalanx.checkpoint.holder` makes itself independent of who started it and returns once
the holder answers. The holder ends when it is told to, on SIGTERM, and when its ranks have been
gone for so long that nobody will come back; all its memory is free then. Torch-free.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from phalanx.checkpoint.holder.server.connection import Connection
from phalanx.checkpoint.holder.server.service import Service
from phalanx.checkpoint.holder.sockets import Lock, same_user, socket_path
from phalanx.checkpoint.holder.spec import TAKEN

FIRST_S = 60.0
"""Seconds that a holder waits for its first rank, at least."""
LOOK_S = 0.25
"""Seconds between two looks whether ranks are there."""
BACKLOG = 512

logger = logging.getLogger(__name__)


def main() -> int:
    """Start the holder; returns in the starting process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--dir", default="", help="where its run saves")
    parser.add_argument("--linger", type=float, required=True, help="seconds")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    path = socket_path(args.job, args.node)
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        return _outcome(ready, child)
    os.close(ready)
    os.setsid()
    code = 1
    try:
        code = _hold(path, told, directory=args.dir, linger_s=args.linger, log=args.log)
    finally:
        logging.shutdown()
        # Threads may be anywhere, even in the kernel: nothing of theirs is waited for.
        os._exit(code)


def _outcome(ready: int, child: int) -> int:
    """0 once the child says that it answers; else its exit code."""
    with open(ready, "rb") as pipe:
        if pipe.read(1):
            return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or 1


def _hold(path: Path, told: int, *, directory: str, linger_s: float, log: Path | None) -> int:
    lock = Lock(path.with_suffix(".lock"))
    if not lock.take():
        return TAKEN
    _log_to(log)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    path.unlink(missing_ok=True)  # of a holder that was killed: we have the lock
    service = Service(stop=stop, directory=directory)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(BACKLOG)
        accept = threading.Thread(target=_accept, args=(listening, service), daemon=True)
        accept.start()
        os.write(told, b"1")
        os.close(told)
        _detach_output(log)
        logger.info("holder of %s (%s), process %d", path.stem, directory, os.getpid())
        why = _wait(stop, service, linger_s)
        path.unlink(missing_ok=True)
        lock.give_back()
    logger.info("holder of %s ends: %s", path.stem, why)
    return 0


def _wait(stop: threading.Event, service: Service, linger_s: float) -> str:
    """Return when the holder is to end, and why."""
    while True:
        patience = linger_s if service.used else max(linger_s, FIRST_S)
        left = LOOK_S
        if not service.busy:
            left = min(left, service.idle_since + patience - time.monotonic())
        if left <= 0:
            return f"no rank for {patience:g} s"
        if stop.wait(left):
            return "it was told to"


def _accept(listening: socket.socket, service: Service) -> None:
    while True:
        try:
            sock, _ = listening.accept()
        except OSError:
            return
        if not same_user(sock):
            logger.warning("another user's process tried to connect")
            sock.close()
            continue
        connection = Connection(sock, service)
        threading.Thread(target=connection.run, name="client", daemon=True).start()


def _log_to(log: Path | None) -> None:
    handler: logging.Handler = logging.NullHandler()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log, delay=True)
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(handlers=[handler], level=logging.INFO, format=form)


def _detach_output(log: Path | None) -> None:
    """Let go of the starter's terminal and pipes; what a crash prints goes to the log."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    target = null
    if log is not None:
        with suppress(OSError):
            target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for fd, source in ((0, null), (1, target), (2, target)):
        os.dup2(source, fd)


if __name__ == "__main__":
    sys.exit(main())
