"""Messages between ranks and holders (unix sockets) and from holder to holder (TCP).

A message is a JSON object behind its length; file descriptors may travel with it, and raw bytes may
follow whose number the message says. Torch-free.
"""

import hmac
import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

CHUNK_BYTES = 1 << 20
"""Bytes that are sent, folded and hashed at a time."""
LENGTH_BYTES = 4
LOCAL_LIMIT = 1 << 30
"""Longest message of this machine: an epoch's tables of all ranks."""
PEER_LIMIT = 1 << 16
"""Longest message of another machine, but for bytes that follow it."""
MAX_FDS = 16
GREETING_S = 10.0
"""Seconds that the first words between two holders may take."""
SILENCE_S = 45
"""Seconds after which bytes sent to another machine must have been taken there; longer than the
other may have reason to wait before it takes them."""

ALIVE_S = 0.5
"""Seconds between two looks whether who waits for an answer is still there."""

PUSH = "push"
"""Role of a caller that sends its data, for parity."""
FETCH = "fetch"
"""Role of a caller that rebuilds a lost member."""

Address = tuple[str, int]
"""Host and port."""


def address_of(value: Any) -> Address | None:
    """An address, or None, as JSON held it."""
    return None if value is None else (str(value[0]), int(value[1]))


class RefusedError(ConnectionError):
    """The other holder does not know the epoch, or not this token."""


def send(
    sock: socket.socket,
    message: Mapping[str, Any],
    payload: Iterable[memoryview] = (),
    *,
    fds: Sequence[int] = (),
) -> None:
    """Send a message, and the raw bytes that it announces.

    Raises:
        OSError: the other side is gone.
    """
    pieces = [memoryview(framed(message)), *payload]
    if fds:
        sent = socket.send_fds(sock, [pieces[0]], list(fds))
        pieces[0] = pieces[0][sent:]
    while pieces:
        sent = sock.sendmsg(pieces)
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.pop(0))
        if pieces:
            pieces[0] = pieces[0][sent:]


def framed(message: Mapping[str, Any]) -> bytes:
    """A message as it travels."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return len(text).to_bytes(LENGTH_BYTES, "big") + text


def receive(sock: socket.socket, *, limit: int = LOCAL_LIMIT) -> tuple[dict[str, Any], list[int]]:
    """The next message, and the file descriptors that came with it.

    Raises:
        ConnectionError: the other side is gone, or what it sent is no message.
        OSError: the connection broke, or timed out.
    """
    fds: list[int] = []
    head = bytearray(LENGTH_BYTES)
    if sock.family == socket.AF_UNIX:
        first, fds, _, _ = socket.recv_fds(sock, LENGTH_BYTES, MAX_FDS)
        if not first:
            raise ConnectionResetError("the other side hung up")
        head[: len(first)] = first
        receive_into(sock, memoryview(head)[len(first) :])
    else:
        receive_into(sock, memoryview(head))
    length = int.from_bytes(head, "big")
    if length > limit:
        raise ConnectionError(f"a message of {length} bytes, where {limit} are the most")
    text = bytearray(length)
    receive_into(sock, memoryview(text))
    try:
        message = json.loads(text)
    except ValueError as error:
        raise ConnectionError(f"no message: {error}") from None
    if not isinstance(message, dict):
        raise ConnectionError(f"no message: a JSON {type(message).__name__}")
    return message, fds


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Fill `view` with raw bytes.

    Raises:
        ConnectionError: the other side is gone.
        OSError: the connection broke, or timed out.
    """
    while len(view):
        count = sock.recv_into(view)
        if not count:
            raise ConnectionResetError("the other side hung up")
        view = view[count:]


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side has closed; only where it has nothing to say meanwhile."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def hang_up(sock: socket.socket) -> None:
    """End a connection: threads that wait for it, here too, wake up; the last one closes it."""
    with suppress(OSError):  # it was gone already
        sock.shutdown(socket.SHUT_RDWR)


def dial(address: Address, greeting: Mapping[str, Any], *, patience_s: float) -> socket.socket:
    """Connect to another holder and say who calls; it must know the epoch and its token.

    Args:
        greeting: {"epoch", "token", "role", ...}.
        patience_s: seconds within which the other may still open the epoch.

    Raises:
        RefusedError: the other does not take the greeting.
        OSError: it cannot be reached.
    """
    deadline = time.monotonic() + patience_s
    while True:
        sock = socket.create_connection(address, timeout=GREETING_S)
        try:
            _tune(sock, sends=greeting.get("role") == PUSH)
            send(sock, greeting)
            answer, _ = receive(sock, limit=PEER_LIMIT)
            if "error" not in answer:
                sock.settimeout(None)
                return sock
        except BaseException:
            sock.close()
            raise
        sock.close()
        if not answer.get("again") or time.monotonic() > deadline:
            raise RefusedError(str(answer["error"]))
        time.sleep(0.05)


def hear_greeting(sock: socket.socket, tokens: Mapping[str, str]) -> dict[str, Any]:
    """The caller's first words, once its token was found right; `tokens` by epoch.

    Raises:
        ConnectionError: it is none of ours, or too early; it was told so.
        OSError: the connection broke, or timed out.
    """
    sock.settimeout(GREETING_S)
    greeting, _ = receive(sock, limit=PEER_LIMIT)
    _tune(sock, sends=greeting.get("role") == FETCH)
    epoch, token = str(greeting.get("epoch")), str(greeting.get("token"))
    expected = tokens.get(epoch)
    if expected is None:
        send(sock, {"error": f"no epoch {epoch:.40} here", "again": True})
        raise RefusedError(f"a caller asked for an unknown epoch {epoch:.40}")
    if not hmac.compare_digest(expected.encode(), token.encode()):
        send(sock, {"error": "wrong token"})
        raise RefusedError(f"a caller had a wrong token for epoch {epoch:.40}")
    send(sock, {})
    sock.settimeout(None)
    return greeting


def _tune(sock: socket.socket, *, sends: bool) -> None:
    """Send at once; notice when the other machine is gone without a word.

    The side that listens notices after ten seconds (by keep-alive). The side that sends cannot tell
    that from a peer with reason to wait, and gives it longer; a timeout for what was sent would
    also be that of keep-alive, so that only one of the two is set.
    """
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
    if sends:
        options["TCP_USER_TIMEOUT"] = SILENCE_S * 1000
    for name, value in options.items():
        sock.setsockopt(tcp, getattr(socket, name), value)
