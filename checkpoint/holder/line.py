"""One connection from a rank or a tool to its holder: requests, answers, memory. Torch-free."""

import os
import select
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

from phalanx.checkpoint.holder.memory import map_memory
from phalanx.checkpoint.holder.sockets import process_of, same_user, socket_path
from phalanx.checkpoint.holder.spec import HolderError
from phalanx.checkpoint.holder.transport import hung_up, receive, send

Self = TypeVar("Self", bound="Line")
STILL_S = 30.0
"""Seconds without an answer after which a holder is asked whether it still lives, and that it has
to say so. Its work may take longer; a process that stands still says nothing."""


class HolderGone(ConnectionError):
    """There is no holder, or it has died."""


class HolderSilent(HolderGone):
    """There is one, of no more use to a run than none: it answers nobody. Its memory is held."""


class Line:
    """The connection itself, for one thread at a time."""

    def __init__(self, sock: socket.socket, *, still_s: float) -> None:
        self._sock = sock
        self._still_s = still_s

    @classmethod
    def connect(cls: type[Self], job: str, node: int, *, still_s: float | None = None) -> Self:
        """Connect to the holder of a job's node on this machine.

        Args:
            still_s: instead of STILL_S.

        Raises:
            HolderGone: there is none.
            HolderSilent: it takes no connection.
            PermissionError: it is another user's.
        """
        still_s = STILL_S if still_s is None else still_s
        path = socket_path(job, node)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(still_s)
        try:
            sock.connect(str(path))
            sock.settimeout(None)
            if not same_user(sock):
                raise PermissionError(f"{path} belongs to another user's process")
        except (FileNotFoundError, ConnectionError) as error:
            sock.close()
            raise HolderGone(f"no holder of {job}, node {node}: {error}") from None
        except (TimeoutError, BlockingIOError):  # as many wait to be let in as can
            sock.close()
            raise HolderSilent(f"the holder of {job}, node {node} takes no connection") from None
        except BaseException:
            sock.close()
            raise
        return cls(sock, still_s=still_s)

    @property
    def gone(self) -> bool:
        """Whether the holder has died, as far as is known here; asks nothing."""
        return hung_up(self._sock)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. What this client attached stays mapped as long as somebody has its views."""
        self._sock.close()

    def _call(self, name: str, **arguments: Any) -> Any:
        value, fds = self._call_for_fds(name, **arguments)
        assert not fds, name
        return value

    def _call_for_fds(self, name: str, **arguments: Any) -> tuple[Any, list[int]]:
        try:
            send(self._sock, {"do": name, **arguments})
            self._await_answer()
            answer, fds = receive(self._sock)
        except (TimeoutError, BlockingIOError):  # of `_await_answer`: this socket has no timeout
            process = process_of(self._sock)
            self._sock.close()
            raise HolderSilent(f"process {process} has answered nobody for a while") from None
        except OSError as error:
            self._sock.close()
            raise HolderGone(f"the holder has died ({error})") from None
        except BaseException:
            self._sock.close()  # the answer to this would be taken for the next one's
            raise
        if "error" in answer:
            raise HolderError(answer["error"])
        return answer.get("value"), fds

    def _await_answer(self) -> None:
        """Wait for it as long as the holder lives.

        Raises:
            OSError: it does not answer another caller either.
        """
        answer = select.poll()
        answer.register(self._sock, select.POLLIN)
        while not answer.poll(self._still_s * 1000):
            with socket.socket(socket.AF_UNIX) as other:
                other.settimeout(self._still_s)
                other.connect(self._sock.getpeername())
                send(other, {"do": "hello"})
                receive(other)


def mapped(
    lengths: Sequence[int], fds: Sequence[int], *, write: bool, populate: Sequence[bool]
) -> list[memoryview]:
    """Memory that was sent: one descriptor for each length that is not 0."""
    left = iter(fds)
    try:
        return [
            map_memory(next(left), nbytes, write=write, populate=now)
            if nbytes
            else memoryview(bytearray())
            for nbytes, now in zip(lengths, populate, strict=True)
        ]
    finally:
        for fd in fds:
            os.close(fd)
