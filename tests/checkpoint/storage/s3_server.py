"""An S3 server in a process of its own, and a network link to it that tests can cut."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from threading import Event, Lock, Thread

from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage

BUCKET = "models"
SERVER = """
import logging, sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test closes it, or is gone
"""


class Server:
    """moto's S3 over HTTP, with an empty bucket; what it holds is gone with its process."""

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        with client(self.port) as fs:
            fs.call_s3("create_bucket", Bucket=BUCKET)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It takes connections and does not answer."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def client(port: int) -> Iterator[object]:
    """s3fs itself, to look behind what is tested."""
    import s3fs

    yield s3fs.S3FileSystem(**options(port), skip_instance_cache=True, use_listings_cache=False)


def options(port: int) -> dict[str, object]:
    """What fsspec needs to reach the server."""
    return {"endpoint_url": f"http://127.0.0.1:{port}", "key": "someone", "secret": "secret"}


def open_bucket(port: int, folder: str, **config: object) -> Storage:
    """The storage of a folder in the bucket."""
    return open_storage(
        f"s3://{BUCKET}/{folder}",
        StorageConfig(options=options(port), **config),  # type: ignore[arg-type]
    )


class Link:
    """A TCP connection to a server that counts what is sent and may be cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = Lock()
        self._sockets: list[socket.socket] = []
        self.sent = 0
        """Bytes towards the server."""
        self.is_cut = Event()
        self._cut_at: int | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut_after(self, count: int) -> None:
        """Cut everything when `count` more bytes were sent."""
        with self._lock:
            self._cut_at = self.sent + count

    def cut(self) -> None:
        """Break every connection; new ones are refused."""
        with self._lock:
            sockets, self._sockets = [self._listener, *self._sockets], []
        for item in sockets:
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()
        self.is_cut.set()

    def mend(self) -> None:
        """Take connections again, at the same port."""
        self.is_cut.clear()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._sockets += [near, far]
                Thread(target=self._forward, args=(near, far, True), daemon=True).start()
                Thread(target=self._forward, args=(far, near, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError), closing(source), closing(sink):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                if up and self._passes(len(data)):
                    self.cut()

    def _passes(self, count: int) -> bool:
        with self._lock:
            self.sent += count
            if self._cut_at is None or self.sent < self._cut_at:
                return False
            self._cut_at = None
            return True
