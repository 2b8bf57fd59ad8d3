"""Connections from other nodes' holders: those that push, and those that rebuild. Torch-free."""

import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

from phalanx.checkpoint.holder_rebuild import give
from phalanx.checkpoint.transport import FETCH, hear_greeting

if TYPE_CHECKING:
    from phalanx.checkpoint.holder_service import Service

BACKLOG = 256

logger = logging.getLogger(__name__)


class PeerServer:
    """Listens on TCP, where the job has several nodes; lets in who has an epoch's token."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._listening: socket.socket | None = None
        self._host = ""
        self._lock = threading.Lock()

    @property
    def address(self) -> list[Any] | None:
        """[host, port]; None before `listen`."""
        if self._listening is None:
            return None
        return [self._host, self._listening.getsockname()[1]]

    def listen(self, host: str) -> list[Any]:
        """Listen on an address of this machine, from now on; [host, port].

        Raises:
            OSError: it is none of this machine's.
        """
        with self._lock:
            if self._listening is None or self._host != host:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._listening = socket.create_server((host, 0), family=family, backlog=BACKLOG)
                self._host = host
                threading.Thread(
                    target=self._accept, args=(self._listening,), name="peers", daemon=True
                ).start()
            address = self.address
            assert address is not None
            return address

    def _accept(self, listening: socket.socket) -> None:
        while True:
            sock, address = listening.accept()
            name = f"peer-{address[0]}"
            threading.Thread(target=self._serve, args=(sock,), name=name, daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            greeting = hear_greeting(sock, self._service.tokens())
            epoch = self._service.epoch(str(greeting["epoch"]))
            if greeting.get("role") == FETCH:
                give(sock, epoch)
                return
            protection = self._service.protection(epoch.spec.epoch)
            if protection is None:
                return
            protection.serve(sock, int(greeting["member"]))
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            logger.info("a peer's connection ended: %s", error)
        finally:
            sock.close()
