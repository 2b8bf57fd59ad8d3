"""What a checkpoint holds besides weights: random states, and the facts that a resume relies on."""

from typing import Any

import torch
from torch import Tensor

from phalanx.parallel.mesh import AXES, Mesh
from phalanx.train.config import Config
from phalanx.train.resume.check import KIND, plain_settings


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
        **progress(config, step),
        "layout": {axis: mesh.size(axis) for axis in AXES},
        "config": plain_settings(config),
    }


def progress(config: Config, step: int) -> dict[str, int]:
    """What of the meta changes from step to step."""
    return {"step": step, "samples": step * config.training.global_batch_size}
