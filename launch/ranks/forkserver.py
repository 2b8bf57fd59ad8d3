"""A process that has imported torch and forks ranks on request; and the launching side of it.

Importing torch takes seconds and a fork milliseconds: the first launch pays the import once, while
the launching process itself stays free of torch. The two talk over a socket pair in pickled,
length-prefixed messages. When the launching process dies, however it dies, the socket closes and
the server kills every rank; when the server dies, the kernel does (PR_SET_PDEATHSIG).
"""

import atexit
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any, NoReturn

PRELOAD = ("torch", "torch.distributed", "phalanx.parallel.ranks", "phalanx.train.trainer")
"""Imported before the first fork."""
_PR_SET_PDEATHSIG = 1
_HEADER = struct.Struct("!Q")


def send(sock: socket.socket, message: Any, fds: tuple[int, ...] = ()) -> None:
    """Send one message, with file descriptors."""
    body = pickle.dumps(message)
    socket.send_fds(sock, [_HEADER.pack(len(body))], fds)
    sock.sendall(body)


def receive(sock: socket.socket) -> tuple[Any, list[int]] | None:
    """The next message and its file descriptors; None when the other side has gone."""
    with suppress(ConnectionError):
        header, fds, _, _ = socket.recv_fds(sock, _HEADER.size, 8)
        if not header:
            return None
        header += _read(sock, _HEADER.size - len(header))
        return pickle.loads(_read(sock, _HEADER.unpack(header)[0])), fds
    return None


def _read(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionResetError("the other side closed the socket")
        parts += part
    return bytes(parts)


class ForkServer:
    """The launching process's handle on its server."""

    _shared: "ForkServer | None" = None

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        code = f"from {__name__} import serve; serve({theirs.fileno()}, {PRELOAD})"
        # A module that asks for CUDA while it is imported must not initialise it: forked ranks
        # could not use it any more. Asked through NVML, it does not.
        environ = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environ,
        )
        theirs.close()
        self._owner = os.getpid()

    @classmethod
    def shared(cls) -> "ForkServer":
        """This process's server, started if there is none."""
        server = cls._shared
        if server is None or server._owner != os.getpid() or server._process.poll() is not None:
            server = cls._shared = cls()
            atexit.register(server.close)
        return server

    def close(self) -> None:
        """End the server and every rank that it still has."""
        if self._owner == os.getpid():
            self.socket.close()
            self._process.kill()  # it may be in the middle of an import; ranks die with it
            self._process.wait()

    def fork(self, key: int, target: bytes, fds: tuple[int, ...]) -> None:
        """Ask for a process; `target` is a pickled callable, called with copies of `fds`."""
        send(self.socket, ("fork", key, target), fds)

    def kill(self, signum: int, keys: list[int]) -> None:
        """Send a signal to those of `keys` that still live."""
        send(self.socket, ("kill", signum, keys))

    def next_exit(self) -> tuple[int, int]:
        """(key, status) of a process that ended; status as subprocess returns it.

        Raises:
            RuntimeError: the server itself died.
        """
        message = receive(self.socket)
        if message is None:
            raise RuntimeError(
                f"the process that forks the ranks died (status {self._process.wait()})"
            )
        key, status = message[0]
        return key, status


def serve(fd: int, preload: tuple[str, ...]) -> NoReturn:
    """The server's whole life."""
    sock = socket.socket(fileno=fd)
    for signum in (signal.SIGINT, signal.SIGTERM):  # the launching process decides
        signal.signal(signum, signal.SIG_IGN)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for module in preload:
        # A module that cannot be imported fails in the rank that needs it, with its traceback.
        with suppress(Exception):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    children: dict[int, int] = {}
    sources: list[Any] = [sock, wake_r]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if wake_r in ready:
            os.read(wake_r, 4096)
            _reap(sock, children)
        if sock in ready:
            message = receive(sock)
            if message is None:
                break
            _obey(sock, message, children, (wake_r, wake_w))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _obey(
    sock: socket.socket,
    message: tuple[Any, list[int]],
    children: dict[int, int],
    wake: tuple[int, int],
) -> None:
    (verb, *rest), fds = message
    if verb == "kill":
        signum, keys = rest
        for pid, key in children.items():
            if key in keys:
                os.kill(pid, signum)
        return
    key, target = rest
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_rank(target, fds, server=server, close=(sock.detach(), *wake))
    children[pid] = key
    for fd in fds:
        os.close(fd)


def _reap(sock: socket.socket, children: dict[int, int]) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            key = children.pop(pid)
            with suppress(OSError):  # nobody listens any more: the next read ends the server
                send(sock, (key, os.waitstatus_to_exitcode(status)))


def _be_rank(target: bytes, fds: list[int], *, server: int, close: tuple[int, ...]) -> NoReturn:
    code = 1
    try:
        die_with_parent(server)
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        for fd in close:
            os.close(fd)
        pickle.loads(target)(*fds)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, `parent`, dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
