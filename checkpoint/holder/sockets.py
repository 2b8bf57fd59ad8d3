"""Where the holders of this user on this machine are found, and that nobody else's are.

A holder's socket lies in a folder that only its user can enter; the lock beside it is held for as
long as the holder lives. Torch-free.
"""

import fcntl
import os
import re
import signal
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9._-]{1,60}")
"""What a job may be called: its name is part of a file's."""


def folder() -> Path:
    """The folder of this user's sockets; made where it lacks.

    Raises:
        PermissionError: somebody else made it, or others may enter it.
    """
    path = Path(f"/tmp/phalanx-{os.getuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise PermissionError(
            f"{path}: must be a folder of user {os.getuid()} that nobody else can enter (mode "
            f"0700), but it belongs to user {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}"
        )
    return path


def socket_path(job: str, node: int) -> Path:
    """The socket of a job's holder.

    Raises:
        ValueError: no file can have the job's name.
        PermissionError: see `folder`.
    """
    if not NAME.fullmatch(job):
        raise ValueError(
            f"job={job!r}: must be 1 to 60 letters, digits, dots, dashes and underscores"
        )
    return folder() / f"{job}-{node}.sock"


def all_sockets() -> list[tuple[str, int]]:
    """(job, node) of every socket that there is, of holders that live or were killed.

    Raises:
        PermissionError: see `folder`.
    """
    found = []
    for path in sorted(folder().glob("*.sock")):
        job, _, node = path.stem.rpartition("-")
        if job and node.isdigit():
            found.append((job, int(node)))
    return found


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket is this user's."""
    return _peer(sock)[1] == os.getuid()


def process_of(sock: socket.socket) -> int:
    """The process at the other end; 0 where it is of a container and not seen here."""
    return _peer(sock)[0]


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; for a holder, those that listened."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def kill_silent(job: str, node: int) -> None:
    """kill -9 a holder that has the lock and answers nobody: it has stopped, or cannot get on."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.settimeout(1.0)
        sock.connect(str(socket_path(job, node)))
        pid, uid = _peer(sock)
        if uid == os.getuid() and pid > 0:  # 0: of a container whose processes are not seen here
            os.kill(pid, signal.SIGKILL)


def nobody_at(job: str, node: int) -> bool:
    """Whether there is no holder; one that stands still is there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(socket_path(job, node)))
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:  # more wait for it than can
            pass
    return False


def remove_left(job: str, node: int) -> None:
    """Remove the socket and the lock of a holder that was killed.

    Whoever starts or ends there just now has the lock, and then nothing happens.
    """
    path = socket_path(job, node)
    lock = Lock(path.with_suffix(".lock"))
    if not lock.take():
        return
    if nobody_at(job, node):  # also where something else cleaned /tmp of a living one's lock
        path.unlink(missing_ok=True)
    lock.give_back()


class Lock:
    """The right to be the holder of a node; the kernel gives it back with the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def take(self) -> bool:
        """Whether it is ours now; not where another process has it."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    self._fd = fd
                    return True
            os.close(fd)  # the file was deleted between open and lock by the one before

    def give_back(self) -> None:
        """Delete the file, then let go of it."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
