"""`phalanx doctor`: what this machine can do; for what it cannot, the cause and what to do."""

import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phalanx.launch import env
from phalanx.launch.bad_input import BadInput
from phalanx.launch.ranks.failure import RankFailed
from phalanx.launch.ranks.local import warm_up
from phalanx.launch.ranks.start import launch
from phalanx.launch.verbs.doctor import machine
from phalanx.launch.verbs.doctor.machine import Finding, State, installed
from phalanx.launch.verbs.json_file import json_option, write_json
from phalanx.train.config import Device, LaunchConfig


def doctor(argv: Sequence[str]) -> None:
    """Print every finding; with `--json FILE` write them too. Exits with 1 when one failed."""
    json_file, folder = _parse(argv)
    warm_up()
    findings = []
    for finding in examine(folder):
        findings.append(finding)
        print(f"{finding.state.value:<5} {finding.name:<12} {finding.found}", flush=True)
        if finding.advice:
            print(f"{'':18} {finding.advice}", flush=True)
    failed = [finding.name for finding in findings if finding.state is State.fail]
    content = [asdict(finding) | {"state": finding.state.value} for finding in findings]
    write_json(json_file, {"ok": not failed, "findings": content})
    if failed:
        print(f"phalanx: doctor: failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _parse(argv: Sequence[str]) -> tuple[Path | None, Path]:
    json_file, rest = json_option(argv)
    folder = Path("runs")
    for text in rest:
        key, _, value = text.partition("=")
        if key != "run.dir" or not value:
            raise BadInput(f"doctor: {text}: takes run.dir=DIR and --json FILE only")
        folder = Path(value)
    return json_file, folder


def examine(folder: Path) -> Iterator[Finding]:
    """Every check, cheap ones first."""
    checks: tuple[Callable[[], Finding], ...] = (
        machine.check_python,
        machine.check_torch,
        machine.check_cpu,
        machine.check_memory,
        machine.check_shared_memory,
        lambda: machine.check_disk(folder),
        machine.check_open_files,
        machine.check_hostname,
        machine.check_loopback,
        machine.check_compiler,
        *(_package(*row) for row in PACKAGES),
        _erasure,
        _holder,
        _gloo,
        _nccl,
    )
    for check in checks:
        yield check()


PACKAGES = (
    ("tokenizers", State.fail, "phalanx data prepare needs it: pip install tokenizers"),
    ("tensorboard", State.fail, "monitor.tensorboard needs it: pip install tensorboard"),
    (
        "s3fs",
        State.warn,
        "checkpoint.dir=s3://... needs it: pip install 'phalanx-train[s3]'",
    ),
    ("ray", State.warn, "launch=ray needs it: pip install 'phalanx-train[ray]'"),
    (
        "transformers",
        State.warn,
        "only its comparison tests need it: pip install 'phalanx-train[hf]'",
    ),
)
"""Distribution, how bad its absence is, what to do."""


def _package(name: str, absent: State, advice: str) -> Callable[[], Finding]:
    def check() -> Finding:
        version = installed(name)
        if version is None:
            return Finding(name=name, state=absent, found="not installed", advice=advice)
        return Finding(name=name, state=State.ok, found=version)

    return check


def _erasure() -> Finding:
    from phalanx.checkpoint.erasure.codec import best_backend

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = best_backend().name
    if not caught:
        return Finding(name="erasure", state=State.ok, found=name)
    advice = "; ".join(str(warning.message) for warning in caught)
    return Finding(name="erasure", state=State.warn, found=name, advice=advice)


def _holder() -> Finding:
    """Start what keeps snapshots, ask it something, and end it."""
    from phalanx.checkpoint.holder.client import HolderClient, HolderError
    from phalanx.checkpoint.holder.start import start_holder

    job = secrets.token_hex(8)
    try:
        start_holder(job, 0, linger_s=1.0, log=None)
        client = HolderClient.connect(job, 0)
        client.inventory()
        client.finish()
    except (HolderError, OSError, ValueError) as error:
        return Finding(
            name="holder",
            state=State.fail,
            found=str(error),
            advice="checkpoints and snapshots need it",
        )
    return Finding(name="holder", state=State.ok, found="starts and answers")


def _gloo() -> Finding:
    return _all_reduce("gloo", LaunchConfig(device=Device.cpu, timeout_s=60), world_size=2)


def _nccl() -> Finding:
    gpus = env.gpu_count()
    if not gpus:
        return Finding(name="nccl", state=State.ok, found="no GPU, not tried")
    config = LaunchConfig(device=Device.cuda, timeout_s=60)
    return _all_reduce("nccl", config, world_size=gpus)


def _all_reduce(name: str, config: LaunchConfig, *, world_size: int) -> Finding:
    try:
        sums = launch(sum_over_ranks, world_size=world_size, config=config)
    except RankFailed as error:
        lines = error.traceback_text.strip().splitlines()
        return Finding(
            name=name,
            state=State.fail,
            found=f"rank {error.rank}: {lines[-1]}",
            advice="ranks cannot talk: see loopback and hostname; firewalls block high ports",
        )
    want = world_size * (world_size + 1) / 2
    if sums != [want] * world_size:
        found = f"an all-reduce gave {sums}, not {want}"
        return Finding(
            name=name, state=State.fail, found=found, advice="this torch build is broken"
        )
    return Finding(name=name, state=State.ok, found=f"all-reduce over {world_size} ranks works")


def sum_over_ranks(ranks: Any) -> float:
    """1 + 2 + ... over the ranks, by an all-reduce on their device."""
    import torch
    import torch.distributed as dist

    from phalanx.parallel.ranks import process_group

    with process_group(ranks):
        x = torch.full((1,), ranks.rank + 1.0, device=ranks.device)
        dist.all_reduce(x)
        return float(x.item())
