"""Nodes of one machine that only a slow network joins: Linux network namespaces.

Each node is a namespace with one link, `eth0`, to a bridge that lies in a namespace of its own; tc
limits what leaves a node. A namespace lives as long as the process that holds it, which ends with
its standard input: nothing stays behind, however this process ends. No name on the machine is taken
and no address of it is used. Ranks are processes of the machine that `enter` a node.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

LINK = "eth0"
"""A node's link to the others."""
PORT = 29500
"""Where rank 0 listens; no one else does in its namespace."""
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
_CLONE_NEWNET = 0x40000000
_READY_S = 10.0
"""A namespace is there within a fraction of this."""


class NoNamespacesError(ValueError):
    """This machine cannot play nodes on a slow network; says what is missing."""


@dataclass(frozen=True)
class Node:
    """One namespace, as another process finds it."""

    number: int
    path: str
    """The file that stands for it."""

    @property
    def address(self) -> str:
        """Its IPv4 address on the bridge."""
        return f"10.77.0.{self.number + 1}"


def commands(number: int, holder: int, bridge: int) -> list[list[str]]:
    """What joins node `number` to the bridge; `holder` and `bridge` hold the two namespaces."""
    port = f"node{number}"
    inside, switch = entering(f"/proc/{holder}/ns/net"), entering(f"/proc/{bridge}/ns/net")
    return [
        [
            *("ip", "link", "add", LINK, "netns", str(holder), "type", "veth"),
            *("peer", "name", port, "netns", str(bridge)),
        ],
        [*switch, "ip", "link", "set", port, "master", "bridge", "up"],
        [*inside, "ip", "address", "add", f"{Node(number, '').address}/24", "dev", LINK],
        [*inside, "ip", "link", "set", "lo", "up"],
        [*inside, "ip", "link", "set", LINK, "up"],
    ]


def entering(path: str) -> list[str]:
    """What begins a command that runs in a namespace."""
    return ["nsenter", f"--net={path}"]


def limit(mbit: float) -> list[str]:
    """The command, run in a node, that lets `mbit` megabits a second leave it."""
    rate = f"{max(1, round(mbit * 1000))}kbit"
    return [
        *("tc", "qdisc", "replace", "dev", LINK, "root", "tbf"),
        *("rate", rate, "burst", "256kb", "latency", "100ms"),
    ]


def no_limit() -> list[str]:
    """The command, run in a node, that takes its limit off."""
    return ["tc", "qdisc", "delete", "dev", LINK, "root"]


@contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    """Make `count` nodes (254 at most) without a limit; they go away at exit.

    Raises:
        NoNamespacesError: they cannot be made here; names what is missing.
    """
    _check_tools()
    with ExitStack() as stack:
        bridge, *holders = (_hold(stack) for _ in range(count + 1))
        switch = entering(f"/proc/{bridge}/ns/net")
        _run([*switch, "ip", "link", "add", "bridge", "type", "bridge"])
        _run([*switch, "ip", "link", "set", "bridge", "up"])
        for number, holder in enumerate(holders):
            for command in commands(number, holder, bridge):
                _run(command)
        made = [Node(n, f"/proc/{holder}/ns/net") for n, holder in enumerate(holders)]
        for node in made:  # told now, not in a rank
            _run([*entering(node.path), *limit(1000.0)])
            _run([*entering(node.path), *no_limit()])
        yield made


def missing() -> str | None:
    """Why `nodes` would fail, or None."""
    try:
        with nodes(1):
            return None
    except NoNamespacesError as error:
        return str(error)


def enter(node: Node) -> None:
    """Move this process, which has one thread only, into a node's namespace.

    gloo is told to use the node's link.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(node.path) as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"setns: {os.strerror(code)}", node.path)
    os.environ["GLOO_SOCKET_IFNAME"] = LINK


def run_here(command: Sequence[str]) -> None:
    """Run a command of this module in the namespace that this process is in."""
    _run(command)


def sent_bytes(text: str | None = None) -> int:
    """Bytes, headers included, that left by LINK since this namespace was made.

    `text` is /proc/net/dev's, which is read where it is None.
    """
    if text is None:
        text = Path("/proc/self/net/dev").read_text()
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == LINK:
            return int(numbers.split()[8])
    raise RuntimeError(f"/proc/net/dev does not list {LINK}")


def _check_tools() -> None:
    if sys.platform != "linux":
        raise NoNamespacesError(f"network namespaces are Linux's; this is {sys.platform}")
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        packages = ", ".join(dict.fromkeys(_TOOLS[tool] for tool in absent))
        raise NoNamespacesError(f"not found: {', '.join(absent)}; install {packages}")


def _hold(stack: ExitStack) -> int:
    """Start a process in a network namespace of its own that ends with its input; its number."""
    ours = os.readlink("/proc/self/ns/net")
    holder = stack.enter_context(
        subprocess.Popen(
            ["unshare", "--net", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if holder.poll() is not None:
            assert holder.stderr is not None
            reason = holder.stderr.read().strip()
            raise NoNamespacesError(
                f"no network namespace can be made here ({reason}); run as root, in a container "
                "with CAP_SYS_ADMIN and CAP_NET_ADMIN, or under "
                "`unshare --user --map-root-user --net`"
            )
        try:
            if os.readlink(f"/proc/{holder.pid}/ns/net") != ours:
                return holder.pid
        except PermissionError:  # between two owners
            pass
        time.sleep(0.005)
    raise NoNamespacesError(f"unshare --net: no namespace after {_READY_S:.0f} s")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().replace("\n", "; ")
        raise NoNamespacesError(f"`{' '.join(command)}` failed: {reason}")
