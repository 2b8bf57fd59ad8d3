"""Answering the requests of ranks and tools, each on a connection of its own. Torch-free."""

import logging
import os
import socket
from typing import Any

from phalanx.checkpoint.holder.server.live import LiveEpoch
from phalanx.checkpoint.holder.server.service import Service
from phalanx.checkpoint.holder.spec import HolderError, Spec
from phalanx.checkpoint.holder.transport import hung_up, receive, send

logger = logging.getLogger(__name__)
Reply = tuple[dict[str, Any], list[int]]


class Connection:
    """One client's connection; requests are answered one after the other."""

    def __init__(self, sock: socket.socket, service: Service) -> None:
        self._sock, self._service = sock, service
        self._ranks: set[tuple[LiveEpoch, int]] = set()

    def run(self) -> None:
        """Answer requests until the client hangs up."""
        try:
            while True:
                request, fds = receive(self._sock)
                for fd in fds:
                    os.close(fd)
                answer, fds = self._answer(request)
                try:
                    send(self._sock, answer, fds=fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except OSError as error:
            logger.debug("a client's connection ended: %s", error)
        finally:
            for epoch, rank in self._ranks:
                epoch.detach(rank, self)
            self._service.leave(self)
            self._sock.close()

    def _alive(self) -> bool:
        return not hung_up(self._sock)

    def _answer(self, request: dict[str, Any]) -> Reply:
        try:
            operation = getattr(self, f"_do_{request.get('do')}", None)
            if operation is None:
                raise HolderError(f"unknown request {request.get('do')!r:.50}")
            value = operation(request)
            return value if isinstance(value, tuple) else ({"value": value}, [])
        except ConnectionAbortedError:
            raise
        except HolderError as error:
            return {"error": str(error)}, []
        except Exception as error:
            logger.exception("request %s", request.get("do"))
            return {"error": f"{type(error).__name__}: {error}"}, []

    # --- requests by name -------------------------------------------------------------------------

    def _do_hello(self, request: dict[str, Any]) -> Any:
        return os.getpid()

    def _do_directory(self, request: dict[str, Any]) -> Any:
        return self._service.directory

    def _do_in_use(self, request: dict[str, Any]) -> Any:
        return self._service.in_use(float(request["quiet_s"]))

    def _do_retire(self, request: dict[str, Any]) -> Any:
        self._service.retire(float(request["quiet_s"]))

    def _do_inventory(self, request: dict[str, Any]) -> Any:
        return self._service.inventory().to_json()

    def _do_listen(self, request: dict[str, Any]) -> Any:
        self._service.join(self)
        return list(self._service.listen(str(request["host"])))  # a tuple would be a Reply

    def _do_open(self, request: dict[str, Any]) -> Any:
        self._service.join(self)
        spec = Spec.from_json(request["spec"])
        self._service.open(spec, member=int(request["member"]), populate=int(request["populate"]))

    def _do_attach(self, request: dict[str, Any]) -> Reply:
        self._service.join(self)
        epoch, rank = self._service.live(request["epoch"]), int(request["rank"])
        value, fds = epoch.attach(rank, self)
        self._ranks.add((epoch, rank))
        return {"value": value}, fds

    def _do_begin(self, request: dict[str, Any]) -> Any:
        self._service.live(request["epoch"]).begin(request["slot"], request["step"])

    def _do_filled(self, request: dict[str, Any]) -> Any:
        epoch, rank = self._service.live(request["epoch"]), int(request["rank"])
        epoch.filled(rank, request["slot"], request["step"], request["bytes"])

    def _do_protect(self, request: dict[str, Any]) -> Any:
        epoch = self._service.live(request["epoch"])
        generation = epoch.protect(request["slot"], request["step"], alive=self._alive)
        return {
            "digest": generation.digest,
            "encode_s": generation.encode_s,
            "sent_s": generation.sent_s,
            "sent_bytes": generation.sent_bytes,
        }

    def _do_commit(self, request: dict[str, Any]) -> Any:
        self._service.live(request["epoch"]).commit(
            request["slot"], request["step"], digests=request["digests"], meta=request["meta"]
        )

    def _do_forget(self, request: dict[str, Any]) -> Any:
        self._service.forget(request["epoch"])

    def _do_finish(self, request: dict[str, Any]) -> Any:
        self._service.finish()

    def _do_verify(self, request: dict[str, Any]) -> Any:
        self._service.join(self)
        return self._service.epoch(request["epoch"]).verify(request["member"], request["slot"])

    def _do_read(self, request: dict[str, Any]) -> Reply:
        self._service.join(self)
        epoch = self._service.epoch(request["epoch"])
        nbytes, fds = epoch.reader(request["member"], request["rank"], request["slot"])
        return {"value": nbytes}, fds

    def _do_rebuild(self, request: dict[str, Any]) -> Any:
        self._service.join(self)
        self._service.rebuild(
            Spec.from_json(request["spec"]),
            member=request["member"],
            step=request["step"],
            meta=request["meta"],
            digests=request["digests"],
            sources={int(m): (str(a[0]), int(a[1])) for m, a in request["sources"].items()},
        )

    def _do_drain(self, request: dict[str, Any]) -> Any:
        self._service.join(self)
        return self._service.drain(request, alive=self._alive)
