"""Storage: files are whole or not there, errors name file and reason, limits and retries hold."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import pytest
from fsspec.registry import known_implementations

from phalanx.checkpoint.storage import rate_limit, retry
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.storage.rate_limit import RateLimit
from tests.checkpoint.stored import save

MIB = 1 << 20


@pytest.fixture(params=["folder", "file://", "memory://"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local one, and one that goes through fsspec's file objects."""
    roots = {
        "folder": str(tmp_path / "new" / "root"),
        "file://": f"file://{tmp_path}/new/root",
        "memory://": f"memory://{uuid4()}/root",
    }
    return open_storage(roots[request.param], StorageConfig(piece_mb=5, retries=0))


def test_files_come_back_as_they_were_written(storage: Storage) -> None:
    told: list[int] = []
    content = os.urandom(12 * MIB + 7)
    pieces = (content[:3], b"", bytearray(content[3 : 4 * MIB]), memoryview(content)[4 * MIB :])
    assert storage.write("a/b/file", pieces, on_bytes=told.append) == len(content)
    assert sum(told) == len(content)
    assert len(told) > 1
    assert storage.read("a/b/file") == content
    assert storage.size("a/b/file") == len(content)
    part = bytearray(11 * MIB)
    storage.read_into("a/b/file", 5, memoryview(part))
    assert part == content[5 : 5 + len(part)]
    assert storage.write("a/b/file", [b"another"]) == 7
    assert storage.read("a/b/file") == b"another"
    assert storage.write("none", []) == 0
    assert storage.read("none") == b""


def test_names_and_deleting(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.names("a/b") == []
    for path in ("b", "a/y", "a/x", "ab/z"):
        storage.write(path, [b"1"])
    assert storage.names() == ["a", "ab", "b"]
    assert storage.names("a") == ["x", "y"]
    assert storage.exists("a")
    assert storage.exists("a/x")
    assert not storage.exists("a/z")
    storage.delete("a/x")
    assert storage.names("a") == ["y"]
    storage.delete("a")
    assert not storage.exists("a/y")
    assert storage.names() == ["ab", "b"]
    storage.delete("a")
    storage.delete("a/y")


def test_what_is_missing_or_short_is_an_error_that_names_it(storage: Storage) -> None:
    for use in (storage.size, storage.read):
        with pytest.raises(FileNotFoundError, match="root/a/none"):
            use("a/none")
    with pytest.raises(FileNotFoundError, match="root/a/none"):
        storage.read_into("a/none", 0, memoryview(bytearray(1)))
    storage.write("a/file", [bytes(100)])
    with pytest.raises(OSError, match=r"ends at byte 100, before 101.*root/a/file"):
        storage.read_into("a/file", 90, memoryview(bytearray(11)))


class Interrupted(Exception):
    pass


def broken_off(size: int) -> Iterator[bytes]:
    yield bytes(size)
    raise Interrupted


def test_a_write_that_breaks_off_leaves_what_was_there(storage: Storage) -> None:
    with pytest.raises(Interrupted):
        storage.write("a/file", broken_off(6 * MIB))
    assert storage.names("a") == []
    storage.write("a/file", [b"old"])
    with pytest.raises(Interrupted):
        storage.write("a/file", broken_off(6 * MIB))

    def stop(_count: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        storage.write("a/file", [bytes(6 * MIB)], on_bytes=stop)
    assert storage.names("a") == ["file"]
    assert storage.read("a/file") == b"old"


def test_checkpoints_stand_in_any_storage(storage: Storage) -> None:
    from phalanx.checkpoint.format.checksums import check_files
    from phalanx.checkpoint.format.folders import complete_folders, prune
    from phalanx.checkpoint.format.manifest import read_manifest

    for step in (1, 2, 2):
        folder, written = save(storage, step, seed=step)
    assert complete_folders(storage) == {1: "step_00000001", 2: "step_00000002.r1"}
    assert read_manifest(storage, folder) == written
    assert check_files(storage, folder, written, written.files) == {}
    prune(storage, saved=2, keep=1, keep_every=0, rejected=())
    assert storage.names() == ["step_00000002.r1"]


def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("a/file", [b"old"])
    code = f"""
import time
from phalanx.checkpoint.storage.open import open_storage
def pieces():
    yield bytes(1 << 20)
    print("half", flush=True)
    time.sleep(100)
open_storage({str(tmp_path)!r}).write("a/file", pieces())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path / "a")) == 2
    assert storage.names("a") == ["file"]
    assert storage.read("a/file") == b"old"
    storage.delete("a")
    assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_the_system_cuts_is_an_error_and_not_there(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with file_size_limit(MIB), pytest.raises(OSError, match="File too large: .*/a/file'") as caught:
        storage.write("a/file", [bytes(MIB - 1), bytes(10)])
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path / "a") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a small disk: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_says_so_and_gives_the_space_back(small_disk: Path) -> None:
    storage = open_storage(small_disk)
    storage.write("a/old", [bytes(MIB // 2)])
    with pytest.raises(OSError, match="No space left on device: .*/a/new'") as caught:
        storage.write("a/new", [bytes(MIB // 4), bytes(MIB // 2)])
    assert caught.value.errno == errno.ENOSPC
    assert storage.names("a") == ["old"]
    assert storage.write("a/new", [bytes(MIB // 4)]) == MIB // 4


def test_a_file_where_a_folder_should_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    storage = open_storage(tmp_path / "root")
    with pytest.raises(OSError, match="root"):
        storage.write("a/file", [b"1"])
    with pytest.raises(NotADirectoryError, match="root"):
        storage.names()


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("nothing://x/y", {}, "nothing:// is no storage that fsspec knows; give a folder, or a"),
        ("s3://", {}, "names no bucket"),
        ("s3://b/x", {"endpoint_ulr": "http://h"}, r"options: .*given: endpoint_ulr.*endpoint_ulr"),
        ("lost://h/x", {}, r"driver of lost:// is not installed \(pip install lost_package\)"),
    ],
)
def test_urls_and_options_that_cannot_be_right(
    url: str, options: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(known_implementations, "lost", {"class": "lost_package.FileSystem"})
    with pytest.raises(ValueError, match=reason):
        open_storage(url, StorageConfig(options=options))


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (rate_limit, retry):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_rate_limit_lets_as_many_bytes_through_as_it_says(clock: Clock) -> None:
    limit = RateLimit(1e6)
    for _ in range(100):
        limit.take(40_000)
    assert clock.now - 1000 == pytest.approx(4 - 0.25)
    clock.now += 100  # what was not used is not saved up
    start = clock.now
    for _ in range(100):
        limit.take(40_000)
    assert clock.now - start == pytest.approx(4 - 0.25)
    limit.take(10_000_000)  # more than the bucket holds
    assert clock.now - start == pytest.approx(14 - 0.25)
    RateLimit(0).take(10**15)
    assert clock.now - start == pytest.approx(14 - 0.25)


def test_threads_share_a_rate_limit() -> None:
    limit = RateLimit(8e6)
    start = time.monotonic()
    threads = [Thread(target=limit.take, args=(1_000_000,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start > 0.2  # 4 MB less the 2 MB that the bucket holds


def test_a_limit_is_one_of_the_process(tmp_path: Path) -> None:
    config = StorageConfig(limit_mb_s=20)
    one, two = (open_storage(tmp_path / name, config) for name in "ab")
    start = time.monotonic()
    one.write("file", [bytes(5_000_000)])
    two.write("file", [bytes(5_000_000)])
    assert time.monotonic() - start > 0.2


def fails(times: int, error: Exception) -> Any:
    """An action that raises so many times and then returns how often it was called."""
    calls = 0

    def action() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error
        return calls

    return action


def test_a_request_is_tried_again_with_growing_waits(clock: Clock) -> None:
    error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert retry.retry(fails(8, error), where="s3://b/x", retries=8) == 9
    assert clock.slept == [0.5, 1, 2, 4, 8, 16, 30, 30]
    with pytest.raises(
        OSError, match=r"Connection reset by peer \(tried 3 times in 1.5 s\): 's3://b/x'"
    ):
        retry.retry(fails(3, error), where="s3://b/x", retries=2)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("no"),
        OSError(errno.EINVAL, "bad"),
        TypeError("x"),
    ],
)
def test_what_cannot_be_mended_is_not_tried_again(error: Exception, clock: Clock) -> None:
    raised = type(error) if isinstance(error, OSError) else OSError
    with pytest.raises(raised, match="s3://b/x"):
        retry.retry(fails(1, error), where="s3://b/x", retries=5)
    assert clock.slept == []
