"""Checkpoints in S3: a real server behind a real connection, which is cut."""

import os
import re
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from phalanx.checkpoint.format.checksums import check_files
from phalanx.checkpoint.format.folders import complete_folders, prepare_folder, prune
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.storage import retry
from phalanx.checkpoint.storage.base import ShortFileError, Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.storage.s3 import S3Storage
from tests.checkpoint.storage.s3_server import BUCKET, Link, Server, client, open_bucket, options
from tests.checkpoint.stored import save

pytestmark = pytest.mark.storage

MIB = 1 << 20
PIECE = 5 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    """A prefix of each test's own."""
    return re.sub(r"\W", "_", request.node.name)


@pytest.fixture
def storage(server: Server, folder: str) -> Storage:
    return open_bucket(server.port, folder, piece_mb=5)


def uploads(server: Server, folder: str) -> list[str]:
    """Keys of uploads that were begun and neither completed nor ended."""
    with client(server.port) as fs:
        answer = fs.call_s3("list_multipart_uploads", Bucket=BUCKET)  # type: ignore[attr-defined]
    keys = [upload["Key"] for upload in answer.get("Uploads", [])]
    return [key for key in keys if key.startswith(f"{folder}/")]


def test_files_come_back_as_they_were_written(storage: Storage, server: Server) -> None:
    told: list[int] = []
    content = os.urandom(3 * PIECE + 7)
    pieces = (content[:3], bytearray(content[3 : 4 * MIB]), memoryview(content)[4 * MIB :])
    assert storage.write("a/large", pieces, on_bytes=told.append) == len(content)
    assert told == [PIECE, PIECE, PIECE, 7]
    assert storage.read("a/large") == content
    part = bytearray(2 * PIECE + 1)
    storage.read_into("a/large", 5, memoryview(part))
    assert part == content[5 : 5 + len(part)]
    assert storage.write("a/small", [b"1", b"23"]) == 3
    assert storage.write("a/none", []) == 0
    assert storage.read("a/none") == b""
    assert storage.names("a") == ["large", "none", "small"]
    assert storage.size("a/small") == 3
    assert storage.local is None


def test_only_what_is_below_a_folder_is_deleted(storage: Storage) -> None:
    assert storage.names() == []
    for path in ("a/x", "a/sub/y", "a.r1/x", "ab/x", "b"):
        storage.write(path, [b"1"])
    assert storage.names() == ["a", "a.r1", "ab", "b"]
    assert storage.exists("a")
    storage.delete("a")
    assert not storage.exists("a")
    assert storage.names() == ["a.r1", "ab", "b"]
    storage.delete("b")
    storage.delete("b")
    assert storage.names() == ["a.r1", "ab"]


def test_what_is_missing_or_short_is_an_error_that_names_it(
    storage: Storage, server: Server, folder: str
) -> None:
    with pytest.raises(FileNotFoundError, match=f"s3://{BUCKET}/{folder}/a/none"):
        storage.read("a/none")
    with pytest.raises(FileNotFoundError):
        storage.size("a/none")
    storage.write("file", [bytes(100)])
    with pytest.raises(OSError, match=f"ends at byte 100, before 101.*{folder}/file"):
        storage.read_into("file", 90, memoryview(bytearray(11)))
    with pytest.raises(OSError, match=f"{folder}/file"):
        storage.read_into("file", 100, memoryview(bytearray(1)))
    other = open_storage(storage.url.replace(BUCKET, "nowhere"), config_of(server))
    with pytest.raises(FileNotFoundError, match="there is no bucket nowhere"):
        complete_folders(other)
    with pytest.raises(FileNotFoundError, match="s3://nowhere"):
        other.write("file", [b"1"])


def config_of(server: Server) -> StorageConfig:
    return StorageConfig(options=options(server.port), retries=0)


class Interrupted(Exception):
    pass


def test_a_write_that_breaks_off_leaves_what_was_there(
    storage: Storage, server: Server, folder: str
) -> None:
    def broken_off() -> Iterator[bytes]:
        yield bytes(2 * PIECE)
        raise Interrupted

    storage.write("a/file", [b"old"])
    with pytest.raises(Interrupted):
        storage.write("a/file", broken_off())
    assert storage.read("a/file") == b"old"
    assert uploads(server, folder) == [f"{folder}/a/file"]
    storage.delete("a")
    assert uploads(server, folder) == []


def test_a_folder_that_holds_nothing_but_an_upload_is_seen_and_pruned(
    storage: Storage, server: Server, folder: str
) -> None:
    def broken_off() -> Iterator[bytes]:
        yield bytes(2 * PIECE)
        raise Interrupted

    save(storage, 1)
    with pytest.raises(Interrupted):
        storage.write("step_00000002/part-00000.safetensors", broken_off())
    assert storage.names() == ["step_00000001", "step_00000002"]
    assert storage.names("step_00000002") == []
    save(storage, 3)
    deleted, problems = prune(storage, saved=3, keep=1, keep_every=0, rejected=())
    assert (deleted, problems) == (["step_00000001", "step_00000002"], [])
    assert uploads(server, folder) == []
    assert storage.names() == ["step_00000003"]


def test_a_file_that_ends_too_early_is_told(storage: Storage) -> None:
    storage.write("a/file", [bytes(100)])
    for begin, end in ((50, 101), (100, 101), (2 * PIECE, 2 * PIECE + 1)):
        with pytest.raises(ShortFileError, match=f"ends at byte 100, before {end}: 's3://"):
            storage.read_into("a/file", begin, memoryview(bytearray(end - begin)))


def test_a_step_saved_anew_replaces_the_old_when_it_stands(storage: Storage) -> None:
    save(storage, 1)
    old, _ = save(storage, 2, seed=1)
    fresh = prepare_folder(storage, 2)
    storage.write(f"{fresh}/part-00000.safetensors", [b"half"])
    assert complete_folders(storage) == {1: "step_00000001", 2: old}
    again, written = save(storage, 2, seed=2)
    assert (fresh, again) == ("step_00000002.r1", "step_00000002.r2")
    assert complete_folders(storage) == {1: "step_00000001", 2: again}
    assert prune(storage, saved=2, keep=1, keep_every=0, rejected=())[1] == []
    assert storage.names() == [again]
    manifest = read_manifest(storage, again)
    assert manifest == written
    assert check_files(storage, again, manifest, manifest.files) == {}


class Outage:
    """The link is mended when a client waits for the second time to try again."""

    def __init__(self, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
        self._link = link
        self.waits: list[float] = []
        monkeypatch.setattr(retry, "time", self)

    def monotonic(self) -> float:
        """As the time module's."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Instead of the time module's."""
        self.waits.append(seconds)
        if seconds > retry.FIRST_WAIT_S and self._link.is_cut.is_set():
            self._link.mend()


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    link = Link(server.port)
    yield link
    link.cut()


def test_an_outage_costs_the_pieces_on_their_way_and_no_more(
    server: Server, link: Link, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(link, monkeypatch)
    content = os.urandom(12 * PIECE)
    link.cut_after(7 * PIECE)
    storage = open_bucket(link.port, folder, piece_mb=5, retries=4)
    told: list[int] = []
    assert storage.write("file", [content], on_bytes=told.append) == len(content)
    assert told == [PIECE] * 12
    assert max(outage.waits) > retry.FIRST_WAIT_S  # it was refused, too
    assert len(content) <= link.sent < len(content) + 5 * PIECE  # four were on their way
    assert storage.read("file") == content
    assert uploads(server, folder) == []


def test_an_outage_while_reading(
    server: Server, link: Link, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3 * PIECE)
    storage = open_bucket(link.port, folder, piece_mb=5, retries=4)
    storage.write("file", [content])
    outage = Outage(link, monkeypatch)
    link.cut()
    found = bytearray(len(content))
    storage.read_into("file", 0, memoryview(found))
    assert found == content
    assert len(outage.waits) > 1


@pytest.mark.slow
def test_what_arrived_before_a_long_outage_is_not_sent_again(
    server: Server, link: Link, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    content = os.urandom(12 * PIECE)
    link.cut_after(9 * PIECE)
    storage = open_bucket(link.port, folder, piece_mb=5, retries=2)
    told: list[int] = []
    with pytest.raises(OSError, match=rf"tried 3 times in .*s3://{BUCKET}/{folder}/file"):
        storage.write("file", [content], on_bytes=told.append)
    assert 4 <= len(told) < 9
    link.mend()
    assert not storage.exists("file")
    before = link.sent
    again = open_bucket(link.port, folder, piece_mb=5)  # as another process would
    again.write("file", [content])
    assert link.sent - before < len(content) - len(told) * PIECE + MIB
    assert again.read("file") == content
    assert uploads(server, folder) == []


def test_other_bytes_than_before_the_break_are_sent(
    server: Server, link: Link, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    link.cut_after(9 * PIECE)
    storage = open_bucket(link.port, folder, piece_mb=5, retries=0)
    with pytest.raises(OSError, match="tried 1 times"):
        storage.write("file", [os.urandom(12 * PIECE)])
    link.mend()
    content = os.urandom(7 * PIECE)
    storage.write("file", [content])
    assert storage.read("file") == content
    assert uploads(server, folder) == []


def test_a_server_that_was_killed_is_used_again_when_it_is_back(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    server = Server()
    storage = open_bucket(server.port, folder, piece_mb=5, retries=2)
    content = os.urandom(4 * PIECE)

    def kills() -> Iterator[bytes]:
        yield content[: 2 * PIECE]
        server.kill()
        yield content[2 * PIECE :]

    with pytest.raises(OSError, match="tried 3 times") as caught:
        storage.write("file", kills())
    assert storage.url in str(caught.value)
    with pytest.raises(OSError, match="tried 3 times"):
        complete_folders(storage)
    back = Server(server.port)
    try:
        storage.write("file", [content])
        assert storage.read("file") == content
    finally:
        back.kill()


def test_a_server_that_hangs_is_an_error_and_used_again_when_it_answers(
    server: Server, folder: str
) -> None:
    config = {"config_kwargs": {"read_timeout": 0.3, "connect_timeout": 0.3}}
    storage = open_storage(
        f"s3://{BUCKET}/{folder}", StorageConfig(options=options(server.port) | config, retries=1)
    )
    storage.write("file", [b"1"])
    with server.hanging(), pytest.raises(OSError, match=r"Read timeout .*tried 2 times"):
        storage.read("file")
    assert storage.read("file") == b"1"


def test_what_the_server_refuses_to_delete_is_an_error(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("a/file", [b"1"])
    assert isinstance(storage, S3Storage)
    real = storage._fs.call_s3

    def refuses(method: str, **arguments: Any) -> Any:
        if method != "delete_objects":
            return real(method, **arguments)
        key = arguments["Delete"]["Objects"][0]["Key"]
        return {"Errors": [{"Key": key, "Code": "AccessDenied", "Message": "locked"}]}

    monkeypatch.setattr(storage._fs, "call_s3", refuses)
    with pytest.raises(PermissionError, match="cannot be deleted: AccessDenied locked.*a/file"):
        storage.delete("a")


def test_a_rate_limit_holds_for_all_threads(link: Link, folder: str) -> None:
    storage = open_bucket(link.port, folder, piece_mb=5, limit_mb_s=16)
    start = time.monotonic()
    writers = [Thread(target=storage.write, args=(name, [bytes(2 * PIECE)])) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    seconds = time.monotonic() - start
    assert link.sent / seconds < 16e6 * 1.35  # a quarter of a second's bytes may come at once
    assert storage.names() == ["a", "b"]


def test_a_process_forked_after_use_opens_its_own(
    server: Server, storage: Storage, folder: str
) -> None:
    """As ranks are, from a launcher that looked for a checkpoint to resume from."""
    storage.write("file", [b"from the parent"])
    child = os.fork()
    if child == 0:
        found = open_bucket(server.port, folder).read("file")
        os._exit(0 if found == b"from the parent" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
