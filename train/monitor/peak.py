"""How much arithmetic a device could do: what the model's FLOPs utilisation (MFU) is of.

FLOPs that are needed are in train/model/flops.py.
"""

import os
import re
import time
from dataclasses import dataclass

import psutil
import torch

DEVICE_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # Vendors' data sheets, dense (no sparsity), FLOP/s; the first pattern that is found counts.
    # fp32 is without TF32; fp64 with tensor (matrix) cores where the part has them.
    (r"GB200", {"bf16": 2500e12, "tf32": 1250e12, "fp32": 80e12, "fp64": 40e12}),
    (r"B200", {"bf16": 2250e12, "tf32": 1100e12, "fp32": 75e12, "fp64": 37e12}),
    (r"H[12]00 NVL", {"bf16": 835e12, "tf32": 417e12, "fp32": 60e12, "fp64": 60e12}),
    (r"H100 PCIe", {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12, "fp64": 51e12}),
    (r"H100|H200", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "fp64": 67e12}),
    (r"A100", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "fp64": 19.5e12}),
    (r"L40S", {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12}),
    (r"\bL4\b", {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12}),
    (r"MI3(00|25)X", {"bf16": 1307e12, "tf32": 653e12, "fp32": 163e12, "fp64": 163e12}),
)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peak:
    """The most arithmetic that all of a run's devices could do together."""

    flops: float
    """FLOP/s of all ranks."""
    source: str
    """Where the number comes from, for people."""


def gpu_peak(name: str, number_format: str) -> float | None:
    """FLOP/s of one GPU by the name that torch.cuda.get_device_name gives; None = not in the
    table, as are slices of a GPU (MIG).

    Args:
        name: such as "NVIDIA H100 80GB HBM3".
        number_format: bf16, tf32, fp32 or fp64.
    """
    if "MIG" in name:
        return None
    for pattern, peaks in DEVICE_PEAKS:
        if re.search(pattern, name):
            return peaks.get(number_format)
    return None


def measured_matmul(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.2) -> float:
    """FLOP/s of the best square matrix product that this rank gets in about `budget_s`."""
    size = 4096 if device.type == "cuda" else 768
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay untouched
    left, right = (
        torch.randn(size, size, generator=generator).to(device=device, dtype=dtype)
        for _ in range(2)
    )
    out = left @ right  # the first product also sets the libraries up
    best = float("inf")
    end = time.perf_counter() + budget_s
    while best == float("inf") or time.perf_counter() < end:
        _wait_for(device)
        begin = time.perf_counter()
        torch.matmul(left, right, out=out)
        _wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(
    device: torch.device, number_format: str, *, world_size: int, ranks_per_machine: int
) -> Peak:
    """What all ranks together could compute, at most.

    A GPU's number is its data sheet's, and for one that the table does not have a measured
    product's. A CPU's is a measured product's on this rank's threads, times the ranks, but no
    more than the machine's cores could do: ranks that share cores do not add to the peak.

    Args:
        device: this rank's device; all ranks are taken to have the same.
        number_format: bf16, fp32 or fp64, the format that the model computes in.
        world_size: ranks of the run.
        ranks_per_machine: ranks that share this machine's cores.
    """
    if device.type == "cuda":
        return _peak_of_gpus(device, number_format, world_size)
    threads, cores = torch.get_num_threads(), _cores()
    one = measured_matmul(device, DTYPES[number_format])
    used = min(ranks_per_machine * threads, cores)
    flops = one * cpu_speedup(threads, cores, ranks_per_machine) * world_size / ranks_per_machine
    source = f"measured {number_format} matmul, {used} of {cores} CPU cores of each machine"
    return Peak(flops, source)


def cpu_speedup(threads: int, cores: int, num_ranks: int) -> float:
    """How much faster `num_ranks` ranks of `threads` threads each compute than one of them, on a
    machine with `cores` cores."""
    return max(1.0, min(num_ranks * threads, cores) / threads)


def _cores() -> int:
    """Cores that this process may use; two hardware threads of one core count once."""
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def _peak_of_gpus(device: torch.device, number_format: str, world_size: int) -> Peak:
    name = torch.cuda.get_device_name(device)
    if number_format == "fp32" and torch.get_float32_matmul_precision() != "highest":
        number_format = "tf32"
    one = gpu_peak(name, number_format)
    if one is not None:
        return Peak(one * world_size, f"data sheet of {name}, {number_format}")
    dtype = DTYPES["fp32" if number_format == "tf32" else number_format]
    one = measured_matmul(device, dtype)
    return Peak(one * world_size, f"measured {number_format} matmul; {name} is not in the table")
