"""Checks of the machine itself: versions, memory, disk, network. Torch-free."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from phalanx.launch import env

GIB = 2**30
MIN_TORCH = (2, 11)


class State(Enum):
    """How a check ended."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's answer."""

    name: str
    state: State
    found: str
    advice: str = ""
    """What to do about it."""


def check_python() -> Finding:
    """The interpreter."""
    found = f"{sys.version.split()[0]} at {sys.executable}"
    return Finding(name="python", state=State.ok, found=found)


def check_torch() -> Finding:
    """The installed torch, and whether it fits the GPUs."""
    version = installed("torch")
    if version is None:
        return Finding(
            name="torch", state=State.fail, found="not installed", advice="pip install torch"
        )
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    gpus = env.gpu_count()
    found = f"{version}, {gpus} GPUs"
    if numbers < MIN_TORCH:
        return Finding(
            name="torch",
            state=State.fail,
            found=found,
            advice=f"Phalanx needs torch {'.'.join(map(str, MIN_TORCH))} or newer",
        )
    if not gpus and Path("/dev/nvidia0").exists():
        return Finding(
            name="torch",
            state=State.warn,
            found=f"{version} does not see this machine's GPUs",
            advice="install a CUDA build of torch that fits the driver (see `nvidia-smi`)",
        )
    return Finding(name="torch", state=State.ok, found=found)


def check_cpu() -> Finding:
    """The processor."""
    return Finding(name="cpu", state=State.ok, found=f"{cpu_name()}, {env.cpu_count()} cores")


def check_memory() -> Finding:
    """Free main memory."""
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < GIB:
        advice = "a rank takes about 0.3 GiB beside its model: stop other programs"
        return Finding(name="memory", state=State.warn, found=found, advice=advice)
    return Finding(name="memory", state=State.ok, found=found)


def check_shared_memory() -> Finding:
    """Room in /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        advice = "only Linux has it; NCCL and Ray then use slower ways"
        return Finding(name="/dev/shm", state=State.warn, found="missing", advice=advice)
    free = shutil.disk_usage(path).free / GIB
    if free < 1:
        advice = "in a container, start it with --shm-size=8g: NCCL and Ray share memory there"
        return Finding(name="/dev/shm", state=State.warn, found=f"{free:.2f} GiB", advice=advice)
    return Finding(name="/dev/shm", state=State.ok, found=f"{free:.1f} GiB free")


def check_disk(folder: Path) -> Finding:
    """Room where runs are written."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding(
            name="disk",
            state=State.fail,
            found=f"{place} cannot be written to",
            advice="choose another folder with run.dir=...",
        )
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:.1f} GiB free for {folder}"
    if free < 2:
        advice = "a checkpoint takes 12 bytes a parameter: make room, or set run.dir elsewhere"
        return Finding(name="disk", state=State.warn, found=found, advice=advice)
    return Finding(name="disk", state=State.ok, found=found)


def check_open_files() -> Finding:
    """The limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        advice = f"`ulimit -n {min(hard, 65536) if hard > 0 else 65536}`: ranks hold many sockets"
        return Finding(name="open files", state=State.warn, found=f"limit {soft}", advice=advice)
    return Finding(name="open files", state=State.ok, found=f"limit {soft}")


def check_hostname() -> Finding:
    """Whether this machine's name resolves."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Finding(
            name="hostname",
            state=State.warn,
            found=f"{name} does not resolve ({error})",
            advice=f"several nodes need it: add `ADDRESS {name}` to /etc/hosts on each",
        )
    return Finding(name="hostname", state=State.ok, found=f"{name} is {address}")


def check_loopback() -> Finding:
    """TCP between processes of this machine."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                client.sendall(b"x")
            connection, _ = server.accept()
            with connection:
                if connection.recv(1) != b"x":
                    raise OSError("nothing came through")
    except OSError as error:
        return Finding(
            name="loopback",
            state=State.fail,
            found=f"no TCP on 127.0.0.1: {error}",
            advice="ranks meet there: bring up the interface with `ip link set lo up`",
        )
    return Finding(name="loopback", state=State.ok, found="TCP on 127.0.0.1 works")


def check_compiler() -> Finding:
    """The C++ compiler that torch.compile needs on CPU."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if name is None:
        return Finding(
            name="compiler",
            state=State.warn,
            found="no C++ compiler",
            advice="parallel.compile=true needs one on CPU: apt install g++",
        )
    reply = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    return Finding(name="compiler", state=State.ok, found=reply.stdout.partition("\n")[0])


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
