"""What a checkpoint holds besides weights: random states, and the facts that a resume relies on."""

from collections.abc import Iterable
from dataclasses import asdict
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from phalanx.parallel.mesh import AXES, Mesh
from phalanx.train.config import Config

KIND = "training"
"""meta["kind"] of a checkpoint that a run can go on from; "weights" holds parameters alone."""


def random_states(rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's generator states by name, as byte tensors."""
    states = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set this rank's generators from tensors that `random_states` named."""
    for name, state in states.items():
        if name.startswith("rng.cuda."):
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def describe(config: Config, mesh: Mesh, step: int) -> dict[str, Any]:
    """The meta of a checkpoint taken after `step` steps, as JSON holds it."""
    return {
        "kind": KIND,
        "step": step,
        "samples": step_to_samples(config, step),
        "layout": {axis: mesh.size(axis) for axis in AXES},
        "config": _plain(asdict(config)),
    }


def step_to_samples(config: Config, step: int) -> int:
    """Samples that a run of one batch size has seen after `step` steps."""
    return step * config.training.global_batch_size


def changed_settings(meta: dict[str, Any], config: Config) -> list[str]:
    """What differs from the saved run among settings that change what is computed.

    Layout, launch and checkpoint settings may differ freely.
    """
    before, now = meta.get("config", {}), _plain(asdict(config))
    sections: Iterable[str] = ("training", "data", "model", "optim", "precision")
    return [
        f"{section}.{key}: {old!r} -> {now[section].get(key)!r}"
        for section in sections
        for key, old in before.get(section, {}).items()
        if now[section].get(key) != old and key not in ("prefetch", "eval_every", "eval_batches")
    ]


def check_continues(meta: dict[str, Any], config: Config) -> int:
    """The step that a run goes on from.

    Raises:
        ValueError: the samples seen so far are no whole number of this run's batches, or the
            order of samples would not be the one that the saved run followed.
    """
    step, samples = int(meta["step"]), int(meta["samples"])
    size = config.training.global_batch_size
    if samples != step * size:
        raise ValueError(
            f"training.global_batch_size={size}: the checkpoint was made with "
            f"{samples // max(1, step)}; keep it, or start a new run.dir from the weights alone "
            "(phalanx checkpoint export, then import)"
        )
    saved = meta.get("config", {}).get("training", {})
    for key in ("seed", "seq_len"):
        value = getattr(config.training, key)
        if saved.get(key, value) != value:
            raise ValueError(
                f"training.{key}={value}: the checkpoint was made with {saved[key]}, and another "
                "value would repeat or skip samples; keep it, or start a new run.dir"
            )
    return step


def _plain(value: Any) -> Any:
    """Enums as their names, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value
