"""Memory that several processes map and no file system shows: it is gone with the last of them.

Torch-free.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

import psutil

from phalanx.checkpoint.holder.spec import HolderError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


class Memory:
    """So many bytes, zeros at first; others map them by the file descriptor that they are sent."""

    def __init__(self, nbytes: int, *, name: str, populate: bool) -> None:
        """
        Args:
            name: shown in /proc/PID/maps.
            populate: take the memory now; without, each page is taken when it is first written.

        Raises:
            MemoryError: there is not so much.
        """
        self.nbytes = nbytes
        self.populated = populate
        self.fd = -1
        self.view = memoryview(b"")
        if not nbytes:
            return
        self.fd = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            # A process that cuts the memory short would kill every other that touches it.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            if populate:
                os.posix_fallocate(self.fd, 0, nbytes)
            self.view = map_memory(self.fd, nbytes, write=True, populate=populate)
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
            raise MemoryError(
                f"{nbytes} bytes of host memory for {name} cannot be had: {error.strerror}"
            ) from error

    @property
    def taken(self) -> int:
        """Bytes that are taken by now."""
        return os.fstat(self.fd).st_blocks * 512 if self.fd >= 0 else 0

    def close(self) -> None:
        """No longer give it to others; it is freed with the last view of it, here or elsewhere."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_memory(fd: int, nbytes: int, *, write: bool, populate: bool) -> memoryview:
    """Memory that was sent, in this process; `fd` may be closed then.

    Raises:
        OSError: it cannot be mapped.
    """
    mapped = mmap.mmap(
        fd,
        nbytes,
        flags=mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0),
        prot=mmap.PROT_READ | (mmap.PROT_WRITE if write else 0),
    )
    return memoryview(mapped)


def check_free(nbytes: int, what: str) -> None:
    """Refuse to take memory that is not there, which would end some process of the machine.

    Raises:
        HolderError: says how much is needed for `what`, and how much is free.
    """
    free = available_bytes()
    if nbytes > free:
        raise HolderError(
            f"{nbytes / GIB:.2f} GiB of host memory are needed for {what}, but {free / GIB:.2f} "
            "GiB are free"
        )


def available_bytes() -> int:
    """Host memory that can still be taken: the machine's, or what the container may have."""
    free = int(psutil.virtual_memory().available)
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            most, taken = int((CGROUP / limit).read_text()), int((CGROUP / used).read_text())
            stat = (CGROUP / limit).with_name("memory.stat").read_text()
            # Files that were read or written count as taken, but go as soon as memory is needed.
            rows = dict(row.split() for row in stat.splitlines())
            free = min(free, most - taken + int(rows.get(cached, 0)))
    return free
