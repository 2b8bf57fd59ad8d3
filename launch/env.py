"""What surrounds a run: cores, GPUs and torchrun's variables. The only reader of the environment.

Torch-free, and CUDA stays uninitialised: the launching process must be free to fork.
"""

import ctypes
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from phalanx.train.config import Device, LaunchConfig


@dataclass(frozen=True, kw_only=True)
class TorchrunPlace:
    """What torchrun tells a worker."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_machines: int

    @property
    def ranks_per_node(self) -> int:
        """Ranks that count as one node: this machine's where all have as many, else each alone."""
        equal = self.local_world_size * self.num_machines == self.world_size
        return self.local_world_size if equal else 1


def torchrun_place(environ: Mapping[str, str] = os.environ) -> TorchrunPlace | None:
    """This process's place under torchrun, or None when torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    return TorchrunPlace(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
        num_machines=int(environ["GROUP_WORLD_SIZE"]),
    )


def cpu_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_rank(config: LaunchConfig, local_world_size: int) -> int:
    """CPU threads of one rank: the same rule under every launcher, so that results agree."""
    return config.threads_per_rank or max(1, cpu_count() // local_world_size)


def wants_color(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour what goes to a stream: a terminal, and NO_COLOR (no-color.org) not set."""
    return stream.isatty() and not environ.get("NO_COLOR")


def gpu_count(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that torch would see, counted by the driver's NVML without initialising CUDA."""
    if not _torch_has_cuda():
        return 0
    present = _nvml_count()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    names = [name.strip() for name in visible.split(",")]
    count = 0
    for name in names:  # as CUDA does: the first invalid index ends the list
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= present):
            break
        count += 1
    return count


def ranks_here(config: LaunchConfig, world_size: int) -> int:
    """Ranks of this machine, of `world_size`."""
    place = torchrun_place()
    if place is not None:
        return place.local_world_size
    return world_size if config.emulate_nodes else -(-world_size // config.nodes)


def device_type(config: LaunchConfig, local_world_size: int) -> str:
    """`cpu` or `cuda` for the ranks of this machine.

    Raises:
        ValueError: launch.device=cuda without a GPU for each rank.
    """
    if config.device is Device.cpu:
        return "cpu"
    gpus = gpu_count()
    if gpus >= local_world_size:
        return "cuda"
    if config.device is Device.cuda:
        raise ValueError(
            f"launch.device=cuda: this machine shows {gpus} GPUs to torch, but "
            f"{local_world_size} ranks run on it; use fewer ranks, or launch.device=cpu"
        )
    return "cpu"


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text()
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def _nvml_count() -> int:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value if status == 0 else 0
